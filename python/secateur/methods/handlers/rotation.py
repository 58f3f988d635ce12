"""Rows of heads in another basis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...anatomy import Indices

__all__ = ["blocks", "leading", "rotated"]


def rotated(turn: Tensor, rows: Tensor, heads: int) -> Tensor:
    """Each head's rows (heads · d, n) times its (rank, d); the rows past the rank are zero."""
    parts = rows.unflatten(0, (heads, -1))
    turned = torch.zeros_like(parts)
    turned[:, : turn.shape[1]] = turn @ parts
    return turned.flatten(0, 1)


def blocks(matrix: Tensor, staying: Tensor, heads: int) -> Tensor:
    """The diagonal blocks of (staying heads · r, heads · d), as (heads, r, d); zeros for heads that leave."""
    parts = matrix.unflatten(0, (len(staying), -1)).unflatten(2, (heads, -1))
    found = matrix.new_zeros(heads, parts.shape[1], parts.shape[3])
    for index, head in enumerate(staying.tolist()):
        found[head] = parts[index, :, head]
    return found


def leading(heads: int, count: int) -> Indices:
    """The first ``count`` units of every head."""
    return np.tile(np.arange(count, dtype=np.int64), (heads, 1))
