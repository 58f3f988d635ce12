"""Handlers of queries and keys: neurons are selected and rescaled, or rotated to the best directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...anatomy import Group, Indices, Layer, Part
from ...statistics.settings import FOLDS, Float
from ..base import Handler
from ..linalg.bases import (
    HeadBasis,
    Normed,
    NormedHeads,
    behind_norms,
    improve,
    length_errors,
    query_key_bases,
    score_errors,
)
from ..linalg.regression import RIDGES, Moment, choose_ridge, solve
from ..weights import Weights
from .fit import Fit, Order, costs_to_errors, eliminate, length
from .rotation import leading, rotated

__all__ = ["RotatedScores", "SelectedScores"]

_PARTS: tuple[Part, Part] = ("query", "key")


class SelectedScores(Handler):
    """Keeps original neurons, each rescaled to make up for those that are removed."""

    def __init__(self, fit: Fit, selection: str = "greedy") -> None:
        self._fit, self._selection = fit, selection

    def errors(self, group: Group) -> Float | None:
        """Return the share of the squared centred scores that is lost."""
        return costs_to_errors(self._fit.order(group.name, lambda: self._order(group)), group.size)

    def _order(self, group: Group) -> Order:
        if self._selection == "snp":
            return torch.from_numpy(
                np.argsort(self._fit.statistics.importance(group.name), axis=1, kind="stable")
            ), None
        grams = self._fit.score_gram(group.name)
        if self._selection == "energy":
            return grams.diagonal(dim1=-2, dim2=-1).argsort(dim=1, stable=True), None
        ones = torch.ones(group.size, 1, dtype=torch.float64)
        parts = [eliminate(gram, ones, RIDGES[2]) for gram in grams]
        # As shares of each head's own scores.
        totals = grams.sum((-2, -1)).clamp_min(torch.finfo(torch.float64).tiny).numpy()
        costs = np.stack([part[1] / total for part, total in zip(parts, totals, strict=True)])
        return torch.stack([part[0] for part in parts]), costs.mean(0)

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Select neurons, and fold their scales into the queries, or into the norms after them."""
        layer = self._fit.layer(group.name)
        order, _ = self._fit.order(group.name, lambda: self._order(group))
        kept = order[:, group.size - count :].sort(1).values
        normed = self._fit.normed(layer)
        if normed is not None:
            self._rescale_norms(weights, layer, group, kept, normed)
        elif not layer.norms:
            scale = self._scales(group, kept).flatten()
            rows, bias = weights.rows(group, "query"), weights.row_bias(group, "query")
            weights.set_rows(group, "query", rows * scale[:, None])
            weights.set_row_bias(group, "query", bias * scale)
        return kept.numpy()

    def _scales(self, group: Group, kept: Tensor) -> Tensor:
        """Return the factor of each kept neuron's map that makes up for the removed ones, (heads, d)."""
        scale = torch.zeros(group.heads, group.size, dtype=torch.float64)
        for head, index in enumerate(kept):
            folds = [self._fit.score_gram(group.name, fold)[head] for fold in FOLDS]
            moments = [Moment(gram[index][:, index], gram[index].sum(1, keepdim=True)) for gram in folds]
            ridge = choose_ridge(moments)
            total = Moment(moments[0].xx + moments[1].xx, moments[0].xy + moments[1].xy)
            # The ridge pulls the factors to one, not to zero: a doubtful neuron keeps its weights.
            rest = Moment(total.xx, total.xy - total.xx.sum(1, keepdim=True))
            scale[head, index] = 1 + solve(rest, ridge)[:, 0]
        return scale

    def _rescale_norms(
        self, weights: Weights, layer: Layer, group: Group, kept: Tensor, normed: tuple[Normed, Normed]
    ) -> None:
        """Fold the scales into the queries' norm, and into both norms how their lengths change over fewer channels."""
        scale = self._scales(group, kept)
        for part, side, factor in zip(_PARTS, normed, (scale, torch.ones_like(scale)), strict=True):
            left = [length(side.second[head][index][:, index], layer.score_norm) for head, index in enumerate(kept)]
            whole = [length(second, layer.score_norm) for second in side.second]
            ratio = torch.stack([a / b if b > 0 else torch.ones_like(b) for a, b in zip(left, whole, strict=True)])
            weights.set_per_head(layer.norms[part], side.gain * ratio[:, None] * factor)
            weights.set_per_head(layer.norms[part], side.shift * factor, "bias")


class RotatedScores(SelectedScores):
    """Rotates each head's queries and keys to the basis where truncation changes the scores least.

    If queries and keys have norms, they are rotated before these, where the norms' input is known; else neurons are
    selected.
    """

    def _rotates(self, layer: Layer) -> bool:
        return "query" not in layer.fixed and (not layer.norms or self._fit.normed(layer) is not None)

    def errors(self, group: Group) -> Float | None:
        """Return the share of the squared centred scores of single images that is lost."""
        layer = self._fit.layer(group.name)
        if not self._rotates(layer):
            return super().errors(group)
        basis, normed = self._basis(group), self._fit.normed(layer)
        errors = score_errors(basis, *self._image_grams(group)).mean(0)
        if normed is not None:
            errors = errors + length_errors(basis, *normed).mean(0)
        found: Float = np.minimum.accumulate(np.clip(errors.numpy(), 0.0, 1.0))
        return found

    def _basis(self, group: Group) -> HeadBasis:
        statistics = self._fit.statistics
        grams = (statistics.gram(group.name, "query_gram"), statistics.gram(group.name, "key_gram"))
        return query_key_bases(*map(torch.from_numpy, grams))

    def _image_grams(self, group: Group) -> tuple[Tensor, Tensor]:
        query, key = self._fit.statistics.image_grams(group.name)
        return torch.from_numpy(query), torch.from_numpy(key)

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Rotate, and keep the leading directions."""
        layer = self._fit.layer(group.name)
        if not self._rotates(layer):
            return super().cut(weights, group, count)
        basis, normed = improve(self._basis(group).first(count), *self._image_grams(group)), self._fit.normed(layer)
        query, key = basis
        if normed is not None:
            heads = behind_norms(basis, *normed)
            query, key = heads.query, heads.key
            self._set_norms(weights, layer, group, heads)
            if layer.score_norm == "layer":
                # The weights subtract the mean over the old channels, and the new norm subtracts none.
                query, key = (turn - turn.mean(-1, keepdim=True) for turn in (query, key))
        for part, turn in zip(_PARTS, (query, key), strict=True):
            bias = rotated(turn, weights.row_bias(group, part)[:, None], group.heads)[:, 0]
            if part == "key" and normed is None:
                # The keys' bias adds the same to a whole row of scores, which softmax ignores, but a norm would not.
                bias = torch.zeros_like(bias)
            weights.set_rows(group, part, rotated(turn, weights.rows(group, part), group.heads))
            weights.set_row_bias(group, part, bias)
        return leading(group.heads, count)

    def _set_norms(self, weights: Weights, layer: Layer, group: Group, heads: NormedHeads) -> None:
        rank = heads.gain.shape[1]
        for part, shift in zip(_PARTS, (heads.shift, torch.zeros_like(heads.shift)), strict=True):
            name = layer.norms[part]
            for value, parameter in ((heads.gain, "weight"), (shift, "bias")):
                weights.set_per_head(name, F.pad(value, [0, group.size - rank]), parameter)
            norm: Any = self._fit.model.get_submodule(name)
            weights.eps[name] = float(norm.eps) * group.size / rank
            if layer.score_norm == "layer":
                weights.uncentred.append(name)
