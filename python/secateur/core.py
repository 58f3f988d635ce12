"""The C++ core, for scripts that own their buffers: NumPy and torch CPU arrays of any strides, without a copy."""

from ._core import (
    AttentionScorer,
    MomentAccumulator,
    compact,
    runtime,
    select,
    value_similarity,
    value_similarity_from_moment,
)

__all__ = [
    "AttentionScorer",
    "MomentAccumulator",
    "compact",
    "runtime",
    "select",
    "value_similarity",
    "value_similarity_from_moment",
]
