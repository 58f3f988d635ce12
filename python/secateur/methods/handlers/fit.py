"""State shared by the handlers of one method: moments, orders of removal, ridges, and the refit of a layer's writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ... import core
from ...anatomy import Layer, NormSite, Part
from ...errors import InvalidArgument, NumericalError
from ...statistics.settings import FOLDS, Float
from ...statistics.statistics import Moments as Sums
from ...statistics.statistics import Statistics
from ..base import Bound
from ..linalg.bases import Normed
from ..linalg.regression import RIDGES, SKETCH, Moment, choose_ridge, ridged_inverse, sketch, solve
from ..selection_error import writer_metric
from ..weights import Weights

__all__ = ["Fit", "Moments", "costs_to_errors", "eliminate", "falling", "length"]

# The most inputs used to find a ridge before it is known which inputs stay.
_FIRST = 512
# The order of removal, (heads, size), first removed first, and the cost of each removal where it is known.
Order = tuple[Tensor, Float | None]
_SCORED: tuple[Part, Part] = ("query", "key")


class Moments:
    """Mean and covariance of an observation, over all rows and in each non-empty fold."""

    def __init__(self, statistics: Statistics, name: str) -> None:
        self._statistics, self._name = statistics, name

    @cached_property
    def mean(self) -> Tensor:
        """The mean over all rows."""
        return torch.from_numpy(self._statistics.mean(self._name))

    @cached_property
    def second(self) -> Tensor:
        """The second moment about zero."""
        return torch.from_numpy(self._statistics.moments(self._name).second)

    @cached_property
    def covariance(self) -> Tensor:
        """The second moment about the mean."""
        return _centred(self._statistics.moments(self._name))

    @property
    def folds(self) -> Iterator[Tensor]:
        """Yield the folds' covariances, reusing the same memory; nothing if a fold is empty."""
        try:
            for fold in FOLDS:
                self._statistics.mean(self._name, fold)
        except InvalidArgument:
            return
        out = None
        for fold in FOLDS:
            found = self._statistics.moments(self._name, fold, out)
            out = found.second
            yield _centred(found)


def _centred(moments: Sums) -> Tensor:
    mean = torch.from_numpy(moments.mean)
    return torch.from_numpy(moments.second).addr_(mean, mean, alpha=-1)


class Fit:
    """One method bound to a model and its moments."""

    def __init__(self, bound: Bound) -> None:
        if bound.statistics.settings.collect != "all":
            raise InvalidArgument(
                f"stats: expected moments (calibrate(collect='all')), got collect={bound.statistics.settings.collect!r}"
            )
        self.bound = bound
        self.model, self.anatomy, self.statistics = bound.model, bound.anatomy, bound.statistics
        self.remainders = bound.remainders
        # Where the search for the next ridge begins: at the same layer's last ridge, else at any layer's last one.
        self.last_ridge = RIDGES[6]
        self._ridges: dict[str, float] = {}
        self._orders: dict[str, Order] = {}
        self._normed: dict[str, tuple[Normed, Normed] | None] = {}

    def layer(self, group: str) -> Layer:
        """Return the layer that a group is part of."""
        return self.anatomy.layers[self.anatomy.layer_of[group]]

    def moments(self, name: str) -> Moments:
        """Return the moments of one observation."""
        return Moments(self.statistics, name)

    def before_writer(self, layer: Layer) -> Moments:
        """Return the moments of the input of a layer's writer."""
        return self.moments(layer.before_writer.name)

    def metric(self, layer: Layer) -> Tensor:
        """Return the weight of a layer's writer in the metric in which errors are measured, (width, inputs)."""
        return writer_metric(self.model, self.anatomy, layer)

    def order(self, group: str, make: Callable[[], Order]) -> Order:
        """Return the order in which units are removed; it is computed once."""
        if group not in self._orders:
            self._orders[group] = make()
        return self._orders[group]

    def score_gram(self, group: str, fold: str | None = None) -> Tensor:
        """Return the Gram matrix of the neurons' rank-one score maps, (heads, d, d)."""
        return torch.from_numpy(self.statistics.gram(group, "score_gram", fold))

    def normed(self, layer: Layer) -> tuple[Normed, Normed] | None:
        """Describe the norms of queries and keys, and what enters them; None where that is not known."""
        if layer.name not in self._normed:
            self._normed[layer.name] = self._find_normed(layer)
        return self._normed[layer.name]

    def _find_normed(self, layer: Layer) -> tuple[Normed, Normed] | None:
        if layer.score_norm is None or layer.input_norm is None:
            return None
        # Before their norms, queries and keys are linear in the output of the layer's input norm.
        weights, moments = Weights(self.model, self.anatomy), self.moments(layer.input_norm)
        gain, shift = weights.affine(layer.input_norm, len(moments.mean))
        group = self.anatomy.group(layer.groups["qk"])
        sides = []
        for part in _SCORED:
            (member,) = group.of("writer", part)
            # All rows at once, since the last bit of a sum depends on how many rows there are.
            weight = weights.weight(member.module)
            centre = weight @ (gain * moments.mean + shift) + weights.bias(member.module)
            rows, centre = (each[torch.from_numpy(member.entries[..., 0])] for each in (weight * gain, centre))
            second = rows @ moments.covariance @ rows.mT + centre[:, :, None] * centre[:, None]
            if layer.score_norm == "layer":
                second = second - second.mean(-1, keepdim=True)
                second = second - second.mean(-2, keepdim=True)
            name = layer.norms[part]
            norm = (weights.per_head(name, group.heads, group.size, each) for each in ("weight", "bias"))
            sides.append(Normed(second, *norm))
        return sides[0], sides[1]

    def first_ridge(self, layer: Layer, weight: Tensor) -> float:
        """Return the ridge for keeping the half of the inputs with most energy; used before it is known which stay.

        Of many inputs only some are used: the ridge tells how far the statistics can be trusted, and more inputs do not
        improve that.
        """
        moments = self.before_writer(layer)
        score = moments.covariance.diagonal() * weight.square().sum(0)
        order = score.argsort(descending=True)
        count = min(len(order) // 2, _FIRST)
        return self._ridge(layer.writer, moments, weight, order[:count].sort().values, order[count:])

    def _ridge(self, module: str, moments: Moments, weight: Tensor, kept: Tensor, cut: Tensor) -> float:
        """Return the folds' ridge for regressing what the removed inputs contribute on the kept ones."""
        # Sketch the outputs before the products, which is cheaper than after.
        few = torch.zeros(weight.shape[1], min(len(weight), SKETCH), dtype=weight.dtype)
        few[cut] = sketch(weight[:, cut].mT)
        rows = (fold[kept] for fold in moments.folds)
        folds = [Moment(part[:, kept], part @ few) for part in rows]
        if module in self.remainders:
            # The same signs combine these outputs, since there are as many.
            beyond = (sketch(each[kept]) for each in self.remainders[module].folds)
            folds = [Moment(fold.xx, fold.xy + more) for fold, more in zip(folds, beyond, strict=True)]
        self.last_ridge = choose_ridge(folds, self._ridges.get(module, self.last_ridge))
        self._ridges[module] = self.last_ridge
        return self.last_ridge

    def compensate(self, weights: Weights, layer: Layer, kept: Tensor, *, mean_alone: bool = False) -> None:
        """Refit the layer's writer: kept inputs take over what the removed ones contributed, the bias its mean.

        With ``mean_alone`` the bias takes over the mean, and the kept inputs nothing.
        """
        module, moments = layer.writer, self.before_writer(layer)
        weight = weights.matrix(module)
        cut = torch.ones(weight.shape[1], dtype=torch.bool)
        cut[kept] = False
        cut = cut.nonzero().flatten()
        ridge = None if mean_alone else self._ridge(module, moments, weight, kept, cut)
        part, beside = (moments.covariance[kept[:, None], index] for index in (kept, cut))
        mean, lost = moments.mean[kept], beside @ weight[:, cut].mT
        if module in self.remainders:
            lost = lost + self.remainders[module].total[kept]
        bias = weights.bias(module) + weight[:, cut] @ moments.mean[cut]
        divisor = 1.0
        if layer.inner is not None:
            change, shift, divisor = self._renormalised(weights, layer.inner, moments, kept)
            # After the cut, the inputs are x + change @ (x - shift).
            bias -= weight[:, kept] @ change @ (mean - shift)
            mean = mean + change @ (mean - shift)
            lost -= part @ change.mT @ weight[:, kept].mT
            lost = lost + change @ lost
            part = part + change @ part
            part = part + part @ change.mT
        gained = weight.new_zeros(lost.mT.shape) if ridge is None else solve(Moment(part, lost), ridge).mT
        refitted = torch.zeros_like(weight)
        refitted[:, kept] = (weight[:, kept] + gained) * divisor
        weights.set_matrix(module, refitted)
        weights.shift(layer, bias - gained @ mean)

    def _renormalised(
        self, weights: Weights, norm: NormSite, moments: Moments, kept: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Describe what a norm over the kept inputs alone outputs: x + change @ (x - shift), over a length.

        ``change`` subtracts the mean over the kept channels, where the dense norm subtracts that of all. If the norm
        has a scale, the length is folded into it and 1 is returned.
        """
        gain, shift = weights.affine(norm.name, norm.size)
        living = gain[kept].abs() > 1e-12 * gain.abs().max()
        inverse = torch.where(living, 1 / torch.where(living, gain[kept], 1), 0)
        # The mean of vectors whose mean square is one.
        normal = (moments.mean - shift)[kept] * inverse
        second = moments.covariance[kept[:, None], kept] * inverse * inverse[:, None] + torch.outer(normal, normal)
        second.diagonal().add_((~living).to(second.dtype))
        divisor = float(length(second, "layer" if norm.centred else "rms")) or 1.0
        if getattr(self.model.get_submodule(norm.name), "weight", None) is not None:
            weights.set(norm.name, gain * divisor)
            divisor = 1.0
        change = -torch.outer(gain[kept], inverse) / len(kept)
        return change if norm.centred else torch.zeros_like(change), shift[kept], divisor


def costs_to_errors(order: Order, size: int) -> Float | None:
    """Convert the cost of each removal to the share lost at each size; None where costs are not known."""
    costs = order[1]
    if costs is None:
        return None
    return falling(np.concatenate([[0.0], np.cumsum(costs)]), size)


def length(second: Tensor, normed: str | None) -> Tensor:
    """Return what a norm over these channels alone divides by, at the mean of the squares."""
    square = second.diagonal().mean()
    return (square - second.mean() if normed == "layer" else square).clamp_min(0).sqrt()


def eliminate(moment: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Float, float]:
    """Order all inputs by removal; return the order, the cost of each, and the energy tr(Wᵀ C W) without the ridge.

    Dead inputs are removed first: a ridge relative to the mean would have to be large to make them regular.
    """
    diagonal = moment.diagonal()
    living = diagonal > 1e-12 * diagonal.max().clamp_min(torch.finfo(torch.float64).tiny)
    alive, dead = living.nonzero().flatten(), (~living).nonzero().flatten()
    if len(alive) < 2:
        return torch.cat([dead, alive]), np.zeros(len(moment)), 0.0
    part = moment if len(dead) == 0 else moment[alive][:, alive]
    outputs = weights[alive].contiguous()
    while True:
        try:
            inverted, added = ridged_inverse(part, ridge)
            order, costs = core.eliminate(inverted.numpy(), outputs.numpy(), len(alive))
            break
        except NumericalError:
            ridge *= 10
    # The costs of all inputs add up to the energy of the ridged moments.
    total = max(0.0, float(np.sum(costs)) - added * float(outputs.square().sum()))
    complete = alive[torch.from_numpy(np.asarray(order, np.int64))]
    return torch.cat([dead, complete]), np.concatenate([np.zeros(len(dead)), costs]), total


def falling(rising: Float, size: int) -> Float:
    """Convert the cost of removing 0 … size units to the share lost when 0 … size stay, within [0, 1]."""
    errors: Float = np.clip(rising[: size + 1][::-1], 0.0, 1.0)
    return np.minimum.accumulate(errors)
