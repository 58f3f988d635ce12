"""The directions of a residual stream that its norms see most; float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def residual_basis(moments: list[Tensor]) -> Tensor:
    """Return orthonormal directions of the residual stream, (D, D) columns, those that its norms see most first.

    They are the eigenvectors of the mean of the norms' input moments x̂x̂ᵀ: every norm counts equally.
    """
    basis: Tensor = torch.linalg.eigh(torch.stack(moments).mean(0))[1]
    return basis.flip(1)


def stock_basis(size: int) -> Tensor:
    """Return (size, size − 1) orthonormal columns that each sum to zero: what LayerNorm preserves of its channels."""
    vector = torch.full((size,), size**-0.5, dtype=torch.float64)
    vector[0] += 1.0
    # The Householder reflection that sends the constant direction to the first axis.
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(vector, vector) / vector.dot(vector)
    return reflection[:, 1:]
