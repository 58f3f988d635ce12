"""Ridge regression from second moments, with the ridge that the two folds of the statistics agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import NumericalError

__all__ = [
    "RIDGES",
    "SKETCH",
    "Moment",
    "cholesky",
    "choose_ridge",
    "inverse",
    "ridged_cholesky",
    "ridged_inverse",
    "shrunk",
    "sketch",
    "solve",
    "square_root",
]

# Shares of the mean diagonal. Below the least, float64 solves of float32 activations' Grams gain no digits; at the
# largest, hardly anything is left of a solution, but for directions of a thousand times the mean variance.
RIDGES = tuple(10.0**exponent for exponent in range(-10, 5))
# Share of the largest eigenvalue; anything below is rounding.
RANK_TOLERANCE = 1e-11
# With more outputs than this, errors are estimated from this many random combinations of them.
SKETCH = 64
# Errors whose relative difference is less count as equal: for singular Grams and least ridges, rounding exceeds 1e-6.
_EQUAL = 1e-5
# Up to this many regressors, every ridge is tried; for whole layers, of which there are few, up to more.
_SMALL, _WHOLE = 256, 1024
# Columns of a Cholesky factor that are computed at a time.
_PANEL = 128


class Moment(NamedTuple):
    """Second moments of one fold: ``xx`` (n, n) of the regressors, ``xy`` (n, outputs) with what is regressed."""

    xx: Tensor
    xy: Tensor


def choose_ridge(folds: Sequence[Moment], near: float = RIDGES[6], *, small: int = _SMALL) -> float:
    """Return the ridge whose solution from one fold best predicts the other, summed over both directions.

    If a fold is empty or all regressors are zero, there is nothing to compare and the least ridge is returned. From
    ``near``, the search follows the falling curve of errors over ridges until it rises again. Apart from noise such
    curves fall and then rise, so that is the global minimum, for a fraction of the factorisations.

    Args:
        folds: two, each of moments per row.
        near: where to begin: one of ``RIDGES``.
        small: up to this many regressors, every ridge is tried instead.

    Returns:
        A share of the mean diagonal of ``xx``.
    """
    if len(folds) != 2 or any(not bool(fold.xx.diagonal().sum() > 0) for fold in folds):
        return RIDGES[0]
    first, second = (Moment(fold.xx, sketch(fold.xy)) for fold in folds)
    # Memory for all factors: allocating it anew for each large one takes as long as the factorisation.
    room = torch.zeros_like(first.xx)

    @cache
    def at(index: int) -> tuple[float, float]:
        found = [_error(*pair, RIDGES[index], room) for pair in ((first, second), (second, first))]
        return sum(error for error, _ in found), sum(slope for _, slope in found)

    def error(index: int) -> float:
        return at(index)[0]

    everything = range(len(RIDGES))
    if len(first.xx) <= small:
        best = min(everything, key=error)
    else:
        tried = {RIDGES.index(near)}
        best = RIDGES.index(near)
        while True:
            # Go where the error falls, since it is higher on the other side. If it is level, go up: less does nothing.
            beside = best + 1 if at(best)[1] < _EQUAL * abs(error(best)) else best - 1
            if beside in tried or beside not in everything:
                break
            tried.add(beside)
            if error(beside) > error(best) + _EQUAL * abs(error(best)):
                break
            best = beside
        best = min(sorted(tried), key=error)
    # Among equals, take the least: it changes least where the folds say nothing.
    bound = error(best) + _EQUAL * abs(error(best))
    while best > 0 and at(best)[1] >= -_EQUAL * abs(error(best)) and error(best - 1) <= bound:
        best -= 1
    return RIDGES[best]


def shrunk(moment: Moment, folds: Sequence[Moment]) -> Tensor:
    """Return weights (n, outputs) to predict y from x, shrunk towards zero as far as the folds ask.

    The ridge is chosen by `choose_ridge`; where no ridge predicts the other fold better than zeros do, or a fold is
    empty, the weights are zero. For a prior other than zero, let y be what is left after it.
    """
    if len(folds) != 2 or any(not bool(fold.xx.diagonal().sum() > 0) for fold in folds):
        return torch.zeros_like(moment.xy)
    ridge = choose_ridge(folds, small=_WHOLE)
    first, second = (Moment(fold.xx, sketch(fold.xy)) for fold in folds)
    if not sum(_error(*pair, ridge)[0] for pair in ((first, second), (second, first))) < 0:
        return torch.zeros_like(moment.xy)
    return solve(moment, ridge)


def _error(fit: Moment, held_out: Moment, ridge: float, room: Tensor | None = None) -> tuple[float, float]:
    """Return the error of the solution from one fold on the other, and its derivative by ln ridge.

    The error is a share of what is to be predicted, without the part that no weights change. It is infinite, and
    falling, for a ridge that is lost in the rounding of the moments.
    """
    added = ridge * float(fit.xx.diagonal().mean())
    factor = cholesky(fit.xx, added, room)
    if factor is None:
        return math.inf, -math.inf
    weights = _solve_factored(factor, fit.xy)
    # The matrix is symmetric, so multiply from the left: wide products take half the time of tall ones.
    seen = (weights.mT @ held_out.xx).mT
    scale = held_out.xy.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    error = ((weights * seen).sum() - 2 * (weights * held_out.xy).sum()) / scale
    # d weights / d added = −(xx + added · I)⁻¹ weights.
    slope = -2 * added * (_solve_factored(factor, weights) * (seen - held_out.xy)).sum() / scale
    return float(error), float(slope)


def sketch(outputs: Tensor) -> Tensor:
    """Combine many outputs to few, (n, 64), with random signs: the expected squared error over them is the same."""
    count = outputs.shape[1]
    if count <= SKETCH:
        return outputs
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (count, SKETCH), generator=generator).double().mul_(2).sub_(1)
    return outputs @ signs


def solve(moment: Moment, ridge: float) -> Tensor:
    """Return weights (n, outputs) to predict y from x: (xx + ridge · mean diagonal · I)⁻¹ xy; zero where x is zero."""
    diagonal = moment.xx.diagonal()
    alive = diagonal > RANK_TOLERANCE * diagonal.max()
    weights = torch.zeros_like(moment.xy)
    if bool(alive.any()):
        gram = moment.xx if bool(alive.all()) else moment.xx[alive][:, alive]
        weights[alive] = _solve_positive(gram, ridge * float(diagonal.mean()), moment.xy[alive])
    return weights


def inverse(matrix: Tensor, ridge: float) -> Tensor:
    """Return (matrix + ridge · mean diagonal · I)⁻¹, symmetric, the ridge raised tenfold until positive definite."""
    return ridged_inverse(matrix, ridge)[0]


def ridged_inverse(matrix: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return the same, and what was added to the diagonal."""
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(matrix), dtype=matrix.dtype), 0.0
    factor, added = ridged_cholesky(matrix, ridge * mean)
    # One triangle is computed and copied to the other, so the result is symmetric to the bit.
    return torch.cholesky_inverse(factor.mT, upper=True), added


def square_root(matrix: Tensor) -> Tensor:
    """Return R (..., n, n) with RᵀR = matrix, from the eigenvalues above rounding; the other rows are zero."""
    values, basis = torch.linalg.eigh(matrix)
    values = torch.where(values > RANK_TOLERANCE * values[..., -1:], values, 0)
    root: Tensor = values.sqrt()[..., None] * basis.mT
    return root


def cholesky(matrix: Tensor, added: float = 0.0, out: Tensor | None = None) -> Tensor | None:
    """Return the factor L (n, n) of matrix + added · I = L Lᵀ, row-major with zeros above; None if there is none.

    It is computed by panels: torch's function takes three times as long for a large matrix, mostly to write zeros
    column by column.

    Args:
        matrix: symmetric (n, n); only the lower triangle is read.
        added: the number added to the diagonal.
        out: where to write the factor; it has zeros above the diagonal.
    """
    size = len(matrix)
    factor = matrix.new_zeros(size, size) if out is None else out
    for begin in range(0, size, _PANEL):
        end = min(begin + _PANEL, size)
        panel = factor[begin:, begin:end].copy_(matrix[begin:, begin:end])
        panel.diagonal().add_(added)
        if begin > 0:
            panel.addmm_(factor[begin:, :begin], factor[begin:end, :begin].mT, alpha=-1)
        top, below = panel[: end - begin], panel[end - begin :]
        found, info = torch.linalg.cholesky_ex(top)
        if int(info) != 0:
            return None
        top.copy_(found)
        if len(below) > 0:
            below.copy_(torch.linalg.solve_triangular(found, below.mT, upper=False).mT)
    return factor


def ridged_cholesky(matrix: Tensor, added: float) -> tuple[Tensor, float]:
    """Return the factor of matrix + added · I, and what was added, which is raised tenfold until there is one.

    Raises:
        NumericalError: the matrix is not finite.
    """
    if not bool(matrix.isfinite().all()):
        raise NumericalError("covariance: expected finite values, got nan or inf")
    # Rounding can leave a mean diagonal of 0 or below.
    added = max(added, 1e-30 * float(matrix.diagonal().abs().max()), 1e-300)
    while True:
        factor = cholesky(matrix, added)
        if factor is not None:
            return factor, added
        added *= 10


def _solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return found


def _solve_positive(gram: Tensor, added: float, right: Tensor) -> Tensor:
    factor = cholesky(gram, added)
    if factor is not None:
        return _solve_factored(factor, right)
    ridged = gram.clone()
    ridged.diagonal().add_(added)
    found: Tensor = torch.linalg.pinv(ridged, rtol=RANK_TOLERANCE, hermitian=True) @ right
    return found
