"""The handler of units that are ranked, and whose mean the next layer's bias takes over."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...anatomy import Group, Indices
from ...statistics.settings import Float
from ..weights import Weights
from .fit import Fit
from .ranking import Ranking

__all__ = ["MeanShifted"]


class MeanShifted(Ranking):
    """Keeps the units with the highest scores; the writer's bias takes over the mean of the others.

    Args:
        fit: the moments of the model that the method is bound to.
        score: returns the scores of a group, (heads, size).
    """

    follows_heads = True

    def __init__(self, fit: Fit, score: Callable[[Group], Float]) -> None:
        super().__init__(fit.bound, score, mean_kept=True)
        self._fit = fit

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Choose the units, and shift the bias; heads that are removed leave their mean as well."""
        chosen = super().cut(weights, group, count)
        heads, kept = weights.heads(group), torch.from_numpy(chosen)
        flat = (heads[:, None] * group.size + kept[heads]).flatten()
        self._fit.compensate(weights, self._fit.layer(group.name), flat, mean_alone=True)
        return chosen
