"""The handler of whole heads of an attention layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...anatomy import Group, Indices
from ...statistics.settings import Float
from ..base import Handler
from ..linalg.heads import eliminate_heads, head_errors
from ..similarity import head_scores
from ..weights import Weights
from .fit import Fit, Order

__all__ = ["RefittedHeads"]


class RefittedHeads(Handler):
    """Removes heads by the loss of the refitted projection, or by a score; the values' handler does the refit."""

    def __init__(self, fit: Fit, score: str = "error") -> None:
        self._fit, self._score = fit, score

    def errors(self, group: Group) -> Float | None:
        """Return the share of the variance of the projection's output that is lost."""
        layer = self._fit.layer(group.name)
        metric, moments = self._fit.metric(layer), self._fit.before_writer(layer)
        return head_errors(metric, moments.covariance, self._order(group)).numpy()

    def _order(self, group: Group) -> Tensor:
        """Return the heads in order of removal."""
        if self._score != "error":
            scores = head_scores(self._fit.model, self._fit.anatomy, self._fit.statistics, group, self._score)
            return torch.from_numpy(np.argsort(scores, kind="stable"))

        def order() -> Order:
            layer = self._fit.layer(group.name)
            metric, moments = self._fit.metric(layer), self._fit.before_writer(layer)
            ridge = self._fit.first_ridge(layer, metric)
            return eliminate_heads(metric, moments.covariance, group.size, ridge), None

        return self._fit.order(group.name, order)[0]

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Choose the heads that stay."""
        del weights
        return self._order(group)[group.size - count :].sort().values.numpy()[None]
