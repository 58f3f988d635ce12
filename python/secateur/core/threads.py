"""Threads and devices of a block of work: torch's threads for the core, subnormal numbers, the default device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch

from .._core import runtime
from ..errors import Unsupported


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
