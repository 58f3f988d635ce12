"""Handlers of values: neurons are selected, or rotated to the best directions; the projection is then refitted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...anatomy import Group, Indices
from ...statistics.settings import Float
from ..base import Handler
from ..linalg.regression import Moment, choose_ridge, sketch, solve
from ..linalg.values import value_bases, value_errors
from ..similarity import similarity
from ..weights import Weights
from .fit import Fit, Order, eliminate, falling
from .rotation import blocks, leading, rotated

__all__ = ["RotatedValues", "SelectedValues"]


class SelectedValues(Handler):
    """Keeps original neurons; the projection is refitted to make up for what the others contributed."""

    follows_heads = True

    def __init__(self, fit: Fit, selection: str = "greedy") -> None:
        self._fit, self._selection = fit, selection

    def errors(self, group: Group) -> Float | None:
        """Return the share of the variance of the projection's output that is lost."""
        _, costs = self._fit.order(group.name, lambda: self._order(group))
        if costs is None:
            return None
        layer = self._fit.layer(group.name)
        weight, moments = self._fit.metric(layer), self._fit.before_writer(layer)
        total = float((weight @ moments.covariance * weight).sum())
        # Costs in the joint order at multiples of the number of heads, as if each round removed one of every head.
        rising = np.concatenate([[0.0], np.cumsum(costs)])[:: group.heads] / max(total, np.finfo(float).tiny)
        return falling(rising, group.size)

    def _order(self, group: Group) -> Order:
        layer = self._fit.layer(group.name)
        weight, moments = self._fit.metric(layer), self._fit.before_writer(layer)
        if self._selection == "snp":
            similar = similarity(self._fit.model, group)
            return torch.from_numpy(np.argsort(similar, axis=1, kind="stable")), None
        if self._selection == "energy":
            scores = (moments.covariance.diagonal() * weight.square().sum(0)).reshape(group.heads, group.size)
            return scores.argsort(dim=1, stable=True), None
        order, costs, _ = eliminate(moments.covariance, weight.mT, self._fit.first_ridge(layer, weight))
        # Every head loses the same number: take each head's own order from the joint order.
        size = group.size
        return torch.stack([order[order // size == head] % size for head in range(group.heads)]), costs

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Select neurons, and refit the projection."""
        order, _ = self._fit.order(group.name, lambda: self._order(group))
        kept = order[:, group.size - count :].sort(1).values
        heads = weights.heads(group)
        flat = (heads[:, None] * group.size + kept[heads]).flatten()
        self._fit.compensate(weights, self._fit.layer(group.name), flat)
        return kept.numpy()


class RotatedValues(SelectedValues):
    """Rotates each head's values to what the projection needs most; where that is not allowed, selects neurons."""

    def errors(self, group: Group) -> Float | None:
        """Return an upper bound of the share of the projection's output variance that is lost."""
        layer = self._fit.layer(group.name)
        if "value" in layer.fixed:
            return super().errors(group)
        errors = value_errors(self._fit.metric(layer), self._fit.before_writer(layer).covariance, group.heads)
        found: Float = np.clip(errors.numpy(), 0.0, 1.0)
        return found

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Rotate, keep the leading directions, and refit the projection."""
        layer = self._fit.layer(group.name)
        if "value" in layer.fixed:
            return super().cut(weights, group, count)
        heads, moments = weights.heads(group), self._fit.before_writer(layer)
        metric = self._fit.metric(layer)
        basis = value_bases(metric, moments.covariance, group.heads, count, heads.tolist())
        weight = weights.weight(layer.writer)
        # The loss without a refit, W − W T⁺ T, is regressed on what is kept.
        own = weight.unflatten(1, (group.heads, group.size))[:, heads].flatten(1)
        turned = blocks(basis, heads, group.heads)
        plain = own @ torch.block_diag(*torch.linalg.pinv(turned[heads], rtol=1e-12))
        lost = (weight - plain @ basis).mT
        few = sketch(lost)

        def moment(covariance: Tensor, wanted: Tensor, beyond: Tensor | None = None) -> Moment:
            seen = basis @ covariance
            return Moment(seen @ basis.mT, seen @ wanted if beyond is None else seen @ wanted + basis @ beyond)

        further = self._fit.remainders.get(layer.writer)
        if further is None:
            folds, total = [moment(fold, few) for fold in moments.folds], moment(moments.covariance, lost)
        else:
            beyond = map(sketch, further.folds)
            folds = [moment(fold, few, more) for fold, more in zip(moments.folds, beyond, strict=True)]
            total = moment(moments.covariance, lost, further.total)
        refitted = plain + solve(total, choose_ridge(folds)).mT
        bias_of_values = weights.row_bias(group, "value")
        # Rows of the attention map sum to one, so the values' bias passes through it.
        bias = weights.bias(layer.writer) + weight @ moments.mean - refitted @ basis @ (moments.mean - bias_of_values)
        columns = torch.zeros_like(weight).unflatten(1, (group.heads, group.size))
        columns[:, heads, :count] = refitted.unflatten(1, (len(heads), count))
        weights.set_rows(group, "value", rotated(turned, weights.rows(group, "value"), group.heads))
        weights.set_row_bias(group, "value", torch.zeros_like(bias_of_values))
        weights.set(layer.writer, columns.flatten(1))
        weights.set(layer.writer, bias, "bias")
        return leading(group.heads, count)
