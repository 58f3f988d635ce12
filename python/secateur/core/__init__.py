"""The C++ core, for scripts that own their buffers: NumPy and torch arrays of any strides, without copies."""

from .bindings import (
    AttentionScorer,
    MomentAccumulator,
    cmake_dir,
    compact,
    eliminate,
    runtime,
    select,
    unpack,
    value_similarity,
    value_similarity_from_moment,
)
from .threads import host_by_default, subnormals_flushed, torch_threads

__all__ = [
    "AttentionScorer",
    "MomentAccumulator",
    "cmake_dir",
    "compact",
    "eliminate",
    "host_by_default",
    "runtime",
    "select",
    "subnormals_flushed",
    "torch_threads",
    "unpack",
    "value_similarity",
    "value_similarity_from_moment",
]
