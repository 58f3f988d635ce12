"""Properties of a VisionTransformer's norms."""

from __future__ import annotations

from typing import Any, Literal

from timm.layers import LayerNormFp32, RmsNormFp32
from torch import nn

from ...anatomy import Tap
from ..base import NORMS
from .modules import HeadNorm

__all__ = ["FP32_NORMS", "head_tap", "is_there", "score_norm"]

FP32_NORMS = (LayerNormFp32, RmsNormFp32)


def is_there(module: nn.Module | None) -> bool:
    """Return whether a module exists and is not an identity."""
    return module is not None and type(module) is not nn.Identity


def score_norm(*norms: Any) -> Literal["layer", "rms"] | None:
    """Return the common type of query and key norms, with a scale; None if they differ or have no scale."""
    kinds = set()
    for norm in norms:
        if type(norm) is nn.Identity or norm.weight is None:
            return None
        kinds.add(norm.centred if type(norm) is HeadNorm else NORMS[type(norm)])
    if len(kinds) > 1:
        return None
    return "layer" if kinds.pop() else "rms"


def head_tap(group: str, layer: str, qkv: str, norm: str | None, rows: slice, heads: int) -> Tap:
    """Return the tap for queries or keys as the scores see them, (B, N, heads, head_dim): after any norm."""
    if norm is not None:
        return Tap(group, layer, norm, "output", rows.stop - rows.start, view=lambda x: x.transpose(1, 2))
    size = rows.stop - rows.start
    return Tap(group, layer, qkv, "output", size, rows, view=lambda x: x.unflatten(-1, (heads, -1)))
