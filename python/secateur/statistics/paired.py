"""Weighted second moments of an input and of what is to be predicted from it, in two folds of whole images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import core
from ..core import fallback
from ..errors import InvalidArgument
from ..runtime.ranks import Ranks
from .settings import FOLDS, Float
from .statistics import unpack

__all__ = ["PairedMoments", "Sums"]

# Rows of a product in float32, before it is added up in float64.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class PairedMoments:
    """Means and covariances of rows x (d,) and y (m,), float64 on the CPU.

    ``xx`` is (d, d), ``xy`` (d, m); ``rows`` is how many rows there were, whatever their weights.
    """

    rows: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor


class Sums:
    """Adds up w x xᵀ, w x yᵀ, w x and w y over rows, apart for even and odd images.

    Args:
        size: d, the length of x.
        wanted: m, the length of y.
        name: what x is, for errors.
        stride: of every image, each stride-th token is used, from another one on in the next image of a fold.
    """

    def __init__(self, size: int, wanted: int, *, name: str, stride: int = 1) -> None:
        self._stride = stride
        self._second = [core.MomentAccumulator(size, name=name) for _ in FOLDS]
        self._totals = [torch.zeros(2, dtype=torch.float64) for _ in FOLDS]
        self._x = [torch.zeros(size, dtype=torch.float64) for _ in FOLDS]
        self._y = [torch.zeros(wanted, dtype=torch.float64) for _ in FOLDS]
        self._xy = [torch.zeros(size, wanted, dtype=torch.float64) for _ in FOLDS]

    def update(self, start: int, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens x (B, N, d) and y (B, N, m) with weights (B, N); ``start`` is the number of the first image.

        Raises:
            NumericalError: a value of x that is not finite.
        """
        for turn in range(min(2, len(x))):
            fold = (start + turn) % 2
            rows = [each[turn::2] for each in (x, y)]
            stride, phase = min(self._stride, x.shape[1]), (start + turn) // 2
            a, b = (fallback.chosen_rows(each, stride, phase) for each in rows)
            w = fallback.chosen_rows(weights[turn::2, :, None], stride, phase)[:, 0]
            precision = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
            w = w.to(precision)
            roots = (a.to(precision) * w.sqrt()[:, None])[None]
            fallback.update_moments([self._second[fold]], roots, phases=[0])
            self._totals[fold] += torch.stack([w.double().sum().cpu(), torch.tensor(float(len(w)))])
            for p, q, s in zip(a.split(_ROWS), b.split(_ROWS), w.split(_ROWS), strict=True):
                scaled = p.to(precision) * s[:, None]
                self._x[fold] += scaled.double().sum(0).cpu()
                self._y[fold] += (q.to(precision) * s[:, None]).double().sum(0).cpu()
                self._xy[fold] += (scaled.mT @ q.to(precision)).cpu()

    def moments(self, ranks: Ranks) -> tuple[PairedMoments, list[PairedMoments]]:
        """Return the moments over all rows of all ranks, and those of the two folds, where one may have no rows.

        A fold counts by its number of rows, so that both are as `Statistics` would have them.

        Raises:
            InvalidArgument: there are no rows.
        """
        seconds = [torch.from_numpy(each.state()["second_moment"].copy()) for each in self._second]
        ranks.add([*seconds, *self._totals, *self._x, *self._y, *self._xy])
        folds = []
        for total, second, *others in zip(self._totals, seconds, self._x, self._y, self._xy, strict=True):
            weight, rows = total.tolist()
            x, y, xy = (each / (weight or 1.0) for each in others)
            folds.append((int(rows), x, y, torch.from_numpy(unpack(second.numpy(), None, weight or 1.0)), xy))
        count = sum(fold[0] for fold in folds)
        if count == 0:
            raise InvalidArgument("loader: expected at least one image, got none")
        shares = [fold[0] / count for fold in folds]
        x, y, xx, xy = (
            shares[0] * first + shares[1] * second for first, second in zip(*(f[1:] for f in folds), strict=True)
        )
        return _centred(count, x, y, xx, xy), [_centred(*fold) for fold in folds]


def _centred(rows: int, x: Tensor, y: Tensor, xx: Tensor, xy: Tensor) -> PairedMoments:
    return PairedMoments(rows, x, y, xx - torch.outer(x, x), xy - torch.outer(x, y))


def as_statistics(name: str, folds: Sequence[PairedMoments]) -> dict[str, Float]:
    """Return the moments of x as the arrays that `Statistics` holds under this name, by fold."""
    tensors: dict[str, Float] = {}
    for fold, part in zip(FOLDS, folds, strict=False):
        second = part.xx + torch.outer(part.x, part.x)
        upper = torch.triu_indices(*second.shape)
        tensors[f"{fold}/{name}/rows"] = np.array([part.rows])
        tensors[f"{fold}/{name}/sum"] = (part.x * part.rows).numpy()
        tensors[f"{fold}/{name}/second_moment"] = (second[upper[0], upper[1]] * part.rows).numpy()
    return tensors
