"""Methods that only select: the units of the highest score stay."""

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
    """Keeps the units of the highest score, as many in each head.

    Args:
        bound: what the method is bound to.
        score: of a group, (heads, size).
    """

    def __init__(self, bound: Bound, score: Callable[[Group], Float]) -> None:
        self._bound, self._score = bound, score

    def errors(self, group: Group) -> Float | None:
        """What is lost with the units of the lowest scores; a score itself only orders them."""
        bound = self._bound
        order = np.argsort(-self._score(group), axis=1, kind="stable")
        return of_selection(bound.model, bound.anatomy, bound.statistics, group, order)

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Ties go to the lower index."""
        del weights
        return core.select(self._score(group), count)


class Removal(Handler):
    """Whole layers, of which nothing stays; what a removed one lost is measured in calibration."""

    def errors(self, group: Group) -> Float | None:
        """All or nothing."""
        del group
        return np.array([1.0, 0.0])

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Nothing stays."""
        del weights, group, count
        return np.empty((1, 0), np.int64)
