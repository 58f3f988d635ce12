"""Handlers of methods that only select: the units with the highest scores stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ... import core
from ...anatomy import Group, Indices
from ...statistics.settings import Float
from ..base import Bound, Handler
from ..selection_error import of_selection
from ..weights import Weights

__all__ = ["Ranking", "Removal"]


class Ranking(Handler):
    """Keeps the units with the highest scores, the same number in each head.

    Args:
        bound: the model, statistics and options that the method is bound to.
        score: returns the scores of a group, (heads, size).
        mean_kept: whether the next layer's bias takes over the mean of what is removed.
    """

    def __init__(self, bound: Bound, score: Callable[[Group], Float], *, mean_kept: bool = False) -> None:
        self._bound, self._score, self._mean_kept = bound, score, mean_kept

    def errors(self, group: Group) -> Float | None:
        """Return what is lost with the units of the lowest scores; the score itself only orders them."""
        bound = self._bound
        order = np.argsort(-self._score(group), axis=1, kind="stable")
        return of_selection(bound.model, bound.anatomy, bound.statistics, group, order, mean_kept=self._mean_kept)

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Choose the units; ties go to the lower index."""
        del weights
        return core.select(self._score(group), count)


class Removal(Handler):
    """Removes whole layers entirely; their loss is measured in calibration."""

    def errors(self, group: Group) -> Float | None:
        """Return the loss without the layer, and zero with it."""
        del group
        return np.array([1.0, 0.0])

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Keep nothing."""
        del weights, group, count
        return np.empty((1, 0), np.int64)
