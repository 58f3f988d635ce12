"""Threads and devices for a block of work: torch's threads for the core, subnormal numbers, the default device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch

from .._core import runtime
from ..errors import Unsupported


@contextmanager
def host_by_default() -> Iterator[None]:
    """Create new tensors on the CPU unless code says otherwise, whatever ``torch.set_default_device`` was given."""
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def torch_threads() -> Iterator[None]:
    """Use as many threads as torch while the block runs, and torch's own threads if they are OpenMP's.

    It is for scripts that alternate between the core and torch: torch's threads spin for a while after each operation,
    and outside of such a block the core's own threads compete with them. Do not use it in a forked child whose parent
    has used torch's threads: torch cannot use them there either.
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
    """Treat subnormal floats as zero while the block runs, on all threads that torch has for this thread.

    It is for backward passes: with the sharp attention maps of a trained model, a tenth of the gradients can be
    subnormal, and processors compute those a hundred times more slowly. ``torch.set_flush_denormal`` affects only one
    thread. If ``device`` is not the CPU, nothing is done.
    """
    if device.type != "cpu":
        yield
        return
    before = runtime.flush_subnormals(True, torch.get_num_threads())
    try:
        yield
    finally:
        runtime.flush_subnormals(before, torch.get_num_threads())
