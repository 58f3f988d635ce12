"""Tests on several workers (``pytest -n``): they share the processors, and one that measures time has them alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:  # Windows: nobody waits, times are noisier
    fcntl = None

# Before torch is loaded: threads that spin for work take the processor from the other worker, and from processes that
# tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Inductor's pool of processes, each of which imports torch, takes longer to start than the few kernels to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: measures time; with pytest -n no other test runs meanwhile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those that run alone behind all others, where the least waits for them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a file's lock. It ends with the process, however that ends."""
    with path.open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_UN)  # a child may have the file open as well


def _shared_folder(config: pytest.Config) -> Path:
    """A folder of all workers; with ``-p no:cacheprovider`` there is no cache to hold it."""
    cache: pytest.Cache | None = getattr(config, "cache", None)
    if cache is not None:
        return cache.mkdir("secateur")
    folder = Path(tempfile.gettempdir(), f"secateur-{os.environ['PYTEST_XDIST_TESTRUNUID']}")
    folder.mkdir(exist_ok=True)
    return folder


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Share the room with other workers' tests, or have it alone; who waits at the door is let in first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    folder = _shared_folder(item.config)
    with contextlib.ExitStack() as room:
        with locked(folder / "door"):
            room.enter_context(locked(folder / "room", shared=item.get_closest_marker("alone") is None))
        return (yield)
