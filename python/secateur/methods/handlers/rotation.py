"""Rotates rows of heads to another basis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...anatomy import Indices

__all__ = ["blocks", "leading", "rotated"]


def rotated(turn: Tensor, rows: Tensor, heads: int) -> Tensor:
    """Multiply each head's rows (heads · d, n) by its matrix (rank, d); the rows past the rank are zero."""
    parts = rows.unflatten(0, (heads, -1))
    turned = torch.zeros_like(parts)
    turned[:, : turn.shape[1]] = turn @ parts
    return turned.flatten(0, 1)


def blocks(matrix: Tensor, staying: Tensor, heads: int) -> Tensor:
    """Return the diagonal blocks of (staying heads · r, heads · d) as (heads, r, d); zeros for removed heads."""
    parts = matrix.unflatten(0, (len(staying), -1)).unflatten(2, (heads, -1))
    found = matrix.new_zeros(heads, parts.shape[1], parts.shape[3])
    for index, head in enumerate(staying.tolist()):
        found[head] = parts[index, :, head]
    return found


def leading(heads: int, count: int) -> Indices:
    """Return the first ``count`` units of every head."""
    return np.tile(np.arange(count, dtype=np.int64), (heads, 1))
