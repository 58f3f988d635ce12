"""The C++ core, for scripts that own their buffers: NumPy and torch CPU arrays of any strides, without a copy."""

from collections.abc import Iterator
from contextlib import contextmanager

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

__all__ = [
    "AttentionScorer",
    "MomentAccumulator",
    "compact",
    "eliminate",
    "runtime",
    "select",
    "torch_threads",
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
