"""The directions of a residual stream that its norms see most of; float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def residual_basis(moments: list[Tensor]) -> Tensor:
    """Orthonormal directions of the residual stream, (D, D) columns, those that its norms see most of first.

    The eigenvectors of the mean of the norms' input moments x̂x̂ᵀ: every norm counts alike.
    """
    basis: Tensor = torch.linalg.eigh(torch.stack(moments).mean(0))[1]
    return basis.flip(1)


def stock_basis(size: int) -> Tensor:
    """(size, size − 1) orthonormal columns, each of which sums to zero: what LayerNorm leaves of that many channels."""
    vector = torch.full((size,), size**-0.5, dtype=torch.float64)
    vector[0] += 1.0
    # The Householder reflection that sends the constant direction to the first axis.
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(vector, vector) / vector.dot(vector)
    return reflection[:, 1:]
