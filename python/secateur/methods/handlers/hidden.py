"""The handler of FFN hidden units: selects them after their activation and refits the second linear layer."""

from __future__ import annotations

import numpy as np
import torch

from ...anatomy import Group, Indices
from ...statistics.settings import Float
from ..base import Handler
from ..similarity import similarity
from ..weights import Weights
from .fit import Fit, Order, costs_to_errors, eliminate

__all__ = ["SelectedHidden"]


class SelectedHidden(Handler):
    """Keeps original units; the second layer is refitted to make up for what the others contributed."""

    def __init__(self, fit: Fit, selection: str = "greedy") -> None:
        self._fit, self._selection = fit, selection

    def errors(self, group: Group) -> Float | None:
        """Return the share of the variance of the second layer's output that is lost."""
        return costs_to_errors(self._fit.order(group.name, lambda: self._order(group)), group.size)

    def _order(self, group: Group) -> Order:
        layer = self._fit.layer(group.name)
        weight, moments = self._fit.metric(layer), self._fit.before_writer(layer)
        if self._selection == "snp":
            similar = similarity(self._fit.model, group)
            return torch.from_numpy(np.argsort(similar, axis=1, kind="stable")), None
        if self._selection == "energy":
            return (moments.covariance.diagonal() * weight.square().sum(0)).argsort(stable=True)[None], None
        found, costs, total = eliminate(moments.covariance, weight.mT, self._fit.first_ridge(layer, weight))
        return found[None], costs / max(total, np.finfo(float).tiny)

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Select units, and refit the second layer."""
        order, _ = self._fit.order(group.name, lambda: self._order(group))
        kept = order[:, group.size - count :].sort(1).values
        self._fit.compensate(weights, self._fit.layer(group.name), kept[0])
        return kept.numpy()
