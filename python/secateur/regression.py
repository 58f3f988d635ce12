"""Ridge regression from second moments, with the ridge that the two folds of the statistics agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moment", "choose_ridge", "inverse", "solve", "square_root"]

# Shares of the mean diagonal. Below the least, float64 solves of Grams of float32 activations hold no more digits.
RIDGES = tuple(10.0**exponent for exponent in range(-10, 1))
# Of the largest eigenvalue: what lies below is rounding.
RANK_TOLERANCE = 1e-11
# Errors over more outputs than this are estimated from so many random combinations of them.
_SKETCH = 64


class Moment(NamedTuple):
    """Second moments of one fold: ``xx`` (n, n) of the regressors, ``xy`` (n, outputs) with what is regressed."""

    xx: Tensor
    xy: Tensor


def choose_ridge(folds: Sequence[Moment]) -> float:
    """The ridge whose solution from one fold predicts the other best, each way, summed.

    Where one fold is empty or all regressors are zero, there is nothing to compare, and the least ridge is returned.

    Args:
        folds: two, each of moments per row.

    Returns:
        A share of the mean diagonal of ``xx``.
    """
    if len(folds) != 2 or any(not bool(fold.xx.diagonal().sum() > 0) for fold in folds):
        return RIDGES[0]
    folds = _sketched(folds)
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for fit, held_out in (folds, reversed(folds)):
        values, basis = torch.linalg.eigh(fit.xx)
        target = basis.mT @ fit.xy
        against = basis.mT @ held_out.xy
        gram = basis.mT @ held_out.xx @ basis
        scale = held_out.xy.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        for index, ridge in enumerate(RIDGES):
            weights = target / (values.clamp_min(0) + ridge * fit.xx.diagonal().mean())[:, None]
            error = (weights * (gram @ weights)).sum() - 2 * (weights * against).sum()
            errors[index] += error / scale
    # Among equals the least: it changes least what the folds say nothing about.
    best = errors.min()
    within = errors <= best + 1e-6 * best.abs()
    return RIDGES[int(within.nonzero()[0, 0])]


def _sketched(folds: Sequence[Moment]) -> list[Moment]:
    """The same with few outputs, random signs of all: the squared error over them is the same in the mean."""
    outputs = folds[0].xy.shape[1]
    if outputs <= _SKETCH:
        return list(folds)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (outputs, _SKETCH), generator=generator).double().mul_(2).sub_(1)
    return [Moment(fold.xx, fold.xy @ signs) for fold in folds]


def solve(moment: Moment, ridge: float) -> Tensor:
    """Weights (n, outputs) that predict y from x: (xx + ridge · mean diagonal · I)⁻¹ xy; zero where x is zero."""
    diagonal = moment.xx.diagonal()
    alive = diagonal > RANK_TOLERANCE * diagonal.max()
    weights = torch.zeros_like(moment.xy)
    if bool(alive.any()):
        size = int(alive.sum())
        gram = moment.xx[alive][:, alive] + ridge * diagonal.mean() * torch.eye(size, dtype=moment.xx.dtype)
        weights[alive] = _solve_positive(gram, moment.xy[alive])
    return weights


def inverse(matrix: Tensor, ridge: float) -> Tensor:
    """Symmetric (matrix + ridge · mean diagonal · I)⁻¹, the ridge raised tenfold until it is positive definite."""
    mean = matrix.diagonal().mean()
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    if not bool(mean > 0):
        return identity
    while True:
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * mean * identity)
        if int(info) == 0:
            found: Tensor = torch.cholesky_inverse(factor)
            return found.add(found.mT) / 2
        ridge *= 10


def square_root(matrix: Tensor) -> Tensor:
    """R (..., n, n) with RᵀR = matrix, from the eigenvalues above rounding; the other rows are zero."""
    values, basis = torch.linalg.eigh(matrix)
    values = torch.where(values > RANK_TOLERANCE * values[..., -1:], values, 0)
    root: Tensor = values.sqrt()[..., None] * basis.mT
    return root


def _solve_positive(gram: Tensor, right: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) == 0:
        found: Tensor = torch.cholesky_solve(right, factor)
    else:
        found = torch.linalg.pinv(gram, rtol=RANK_TOLERANCE, hermitian=True) @ right
    return found
