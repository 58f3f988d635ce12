"""The C++ core, for scripts that own their buffers: NumPy and torch CPU arrays of any strides, without a copy."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from ._core import (
    AttentionScorer,
    MomentAccumulator,
    compact,
    eliminate,
    runtime,
    select,
    value_similarity,
    value_similarity_from_moment,
)
from .errors import Unsupported

__all__ = [
    "AttentionScorer",
    "MomentAccumulator",
    "compact",
    "eliminate",
    "runtime",
    "select",
    "torch_threads",
    "use_torch_threads",
    "value_similarity",
    "value_similarity_from_moment",
]


@contextmanager
def torch_threads() -> Iterator[None]:
    """Use as many threads as torch does while the block runs, then as many as before."""
    before = runtime.threads()
    runtime.set_threads(torch.get_num_threads())
    try:
        yield
    finally:
        runtime.set_threads(before)


def use_torch_threads() -> None:
    """Work on torch's OpenMP threads where it has such; on the core's own otherwise.

    Called when this module is imported. torch's threads spin for a while after each of its operations, and threads of
    the core's own would have to share the cores with them: ``runtime.set_team("own")`` goes back to those.
    """
    with suppress(Unsupported):
        runtime.set_team("openmp")


use_torch_threads()
