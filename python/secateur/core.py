"""The C++ core, for scripts that own their buffers: NumPy and torch arrays of any strides, without a copy."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from . import _core
from ._core import (
    AttentionScorer,
    MomentAccumulator,
    compact,
    eliminate,
    runtime,
    select,
    unpack,
    value_similarity,
    value_similarity_from_moment,
)
from .errors import Unsupported

__all__ = [
    "AttentionScorer",
    "MomentAccumulator",
    "cmake_dir",
    "compact",
    "eliminate",
    "runtime",
    "select",
    "subnormals_flushed",
    "torch_threads",
    "unpack",
    "value_similarity",
    "value_similarity_from_moment",
]


def cmake_dir() -> Path:
    """Folder of the CMake package that this installation brings for C++ programs.

    ``cmake -Dsecateur_DIR=<it>`` lets ``find_package(secateur CONFIG)`` find headers and shared library.

    Raises:
        Unsupported: the package was built without them.
    """
    # Beside the extension: of an editable install, the Python files are somewhere else.
    folder = Path(_core.__file__).parent / "lib" / "cmake" / "secateur"
    if not (folder / "secateurConfig.cmake").is_file():
        raise Unsupported(f"cmake_dir: expected a package built with SECATEUR_INSTALL=ON, got none in {folder}")
    return folder


@contextmanager
def host_by_default() -> Iterator[None]:
    """Make new tensors on the CPU unless code says where, whatever ``torch.set_default_device`` was given."""
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def torch_threads() -> Iterator[None]:
    """Work on as many threads as torch does while the block runs, and on torch's own where they are OpenMP's.

    For scripts that call the core between operations of torch: torch's threads spin for a while after each, and threads
    of the core's own, which it works on outside of such a block, have to share the cores with them. Not for a forked
    child whose parent has used torch's threads: there torch cannot use them either.
    """
    threads, team = runtime.threads(), runtime.team()
    runtime.set_threads(torch.get_num_threads())
    try:
        with suppress(Unsupported):
            runtime.set_team("openmp")
        yield
    finally:
        runtime.set_team(team)
        runtime.set_threads(threads)


@contextmanager
def subnormals_flushed(device: torch.device) -> Iterator[None]:
    """Take floats below the normal range as zero while the block runs, on all threads that torch has for this one.

    For backward passes: behind the sharp attention maps of a trained model a tenth of the gradients can be there, which
    processors compute a hundred times slower than others. ``torch.set_flush_denormal`` reaches one thread alone. Where
    another ``device`` than the CPU computes, nothing is done.
    """
    if device.type != "cpu":
        yield
        return
    before = runtime.flush_subnormals(True, torch.get_num_threads())
    try:
        yield
    finally:
        runtime.flush_subnormals(before, torch.get_num_threads())
