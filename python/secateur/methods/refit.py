"""Selection of original neurons, and what reads them refitted in closed form.

Greedy backward elimination (the optimal brain surgeon for groups, OB²C, arXiv:2608.17657) or a one-shot criterion picks
the neurons; least squares over the calibration rows then gives their readers what the others contributed (CORP,
arXiv:2602.05243), the mean of it through the bias. No labels, no gradients; the moments are those of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from .. import core
from ..anatomy.anatomy import Anatomy
from ..anatomy.groups import Group, Indices
from ..anatomy.layers import AttentionSite, FfnSite, NormSite
from ..errors import InvalidArgument, NumericalError
from ..statistics.statistics import FOLDS, Float, Statistics
from ..statistics.statistics import Moments as Sums
from . import snp
from .base import Decision
from .linalg.bases import Normed
from .linalg.heads import eliminate_heads, head_errors
from .linalg.regression import RIDGES, SKETCH, Moment, choose_ridge, ridged_inverse, sketch, solve
from .selection_error import of_selection, writer_metric
from .weights import Draft

NAME = "refit"
# What the refitted projection loses with a head, or a score of heads (see the method "snp").
HEAD_SCORES = ("error", *snp.OPTIONS["head_score"])
OPTIONS: Mapping[str, tuple[str, ...]] = {"selection": ("greedy", "snp", "energy"), "head_score": HEAD_SCORES}


# Most inputs whose ridge is sought before it is known which stay.
_FIRST = 512


def prepare(model: nn.Module, anatomy: Anatomy, statistics: Statistics, options: Mapping[str, str]) -> Refit:
    """Bind the method to a model.

    Raises:
        InvalidArgument: statistics without moments.
    """
    return Refit(model, anatomy, statistics, options["selection"], options["head_score"])


class Moments:
    """Mean and covariance of an observation, over all rows and in each fold that has any."""

    def __init__(self, statistics: Statistics, name: str) -> None:
        self._statistics, self._name = statistics, name

    @cached_property
    def mean(self) -> Tensor:
        """Of all rows."""
        return torch.from_numpy(self._statistics.mean(self._name))

    @cached_property
    def second(self) -> Tensor:
        """Second moment about zero."""
        return torch.from_numpy(self._statistics.moments(self._name).second)

    @cached_property
    def covariance(self) -> Tensor:
        """Second moment about the mean."""
        return _centred(self._statistics.moments(self._name))

    @property
    def folds(self) -> Iterator[Tensor]:
        """Covariances of the folds, in turn and in the same memory; of none where one is empty."""
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


class Refit:
    """The method bound to a model and its statistics."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, statistics: Statistics, selection: str, head_score: str
    ) -> None:
        if statistics.settings.collect != "all":
            raise InvalidArgument(
                f"stats: expected moments (calibrate(collect='all')), got collect={statistics.settings.collect!r}"
            )
        self._model, self._anatomy, self._statistics, self._selection = model, anatomy, statistics, selection
        self._head_score = head_score
        self._orders: dict[str, tuple[Tensor, Float | None]] = {}
        # Where the search for the next ridge begins: at the same layer's last one, or at the last of all.
        self._ridges: dict[str, float] = {}
        self._last_ridge = RIDGES[6]
        self._cached_errors: dict[str, Float | None] = {}
        self._cached_normed: dict[str, tuple[Normed, Normed] | None] = {}

    def errors(self, group: Group) -> Float | None:
        """Share of the group's output that is lost when 0 … size units stay, (size + 1,)."""
        if group.name not in self._cached_errors:
            self._cached_errors[group.name] = self._errors(group)
        return self._cached_errors[group.name]

    def decide(self, sizes: Mapping[str, int]) -> Decision:
        """Choose what stays at these sizes, and refit what reads it."""
        draft = Draft(self._model, self._anatomy)
        keep: dict[str, Indices] = {}
        for name, site in self._anatomy.layers.items():
            if not sizes[name]:
                keep[name] = np.empty((1, 0), np.int64)
            elif isinstance(site, FfnSite):
                if sizes[site.ffn] < site.size:
                    keep[site.ffn] = self._hidden(draft, site, sizes[site.ffn])
            else:
                self._attention(draft, site, sizes, keep)
        # Means last, onto the biases that the layers before them were given.
        for name, site in self._anatomy.layers.items():
            if name in keep:
                self._leave_mean(draft, site, keep)
        if "width" in sizes and sizes["width"] < self._anatomy.sizes["width"]:
            keep["width"] = self._width(draft, sizes["width"], keep)
        return Decision(keep, draft.finish(keep), draft.eps, tuple(draft.uncentred))

    def _attention(self, draft: Draft, site: AttentionSite, sizes: Mapping[str, int], keep: dict[str, Indices]) -> None:
        heads = torch.arange(site.heads)
        if sizes[site.heads_group] < site.heads:
            heads = self._head_order(site)[site.heads - sizes[site.heads_group] :].sort().values
            keep[site.heads_group] = heads.numpy()[None]
        if sizes[site.qk] < site.qk_dim:
            keep[site.qk] = self._queries_and_keys(draft, site, sizes[site.qk])
        if sizes[site.v] < site.v_dim or len(heads) < site.heads:
            kept = self._values(draft, site, sizes[site.v], heads)
            if sizes[site.v] < site.v_dim:
                keep[site.v] = kept

    def _errors(self, group: Group) -> Float | None:
        if group.kind == "qk":
            return self._score_errors(next(site for site in self._anatomy.attention if site.qk == group.name))
        if group.kind == "v":
            site = next(site for site in self._anatomy.attention if site.v == group.name)
            return self._value_errors(site)
        if group.kind == "heads":
            site = next(site for site in self._anatomy.attention if site.heads_group == group.name)
            metric, moments = self._writer_metric(site.proj, site.scale), Moments(self._statistics, site.proj)
            return head_errors(metric, moments.covariance, self._head_order(site)).numpy()
        if group.kind == "block":
            whole, mean_kept = self._statistics.removal(group.name)
            shifts = whole > 0 and self._anatomy.before(group.name) is not None
            return np.array([max(0.0, mean_kept) / whole if shifts else 1.0, 0.0])
        if group.kind == "ffn":
            ffn = next(site for site in self._anatomy.ffn if site.ffn == group.name)
            return self._costs(self._hidden_order(ffn), ffn.size)
        order = np.argsort(-self._channel_scores(), axis=1, kind="stable")
        return of_selection(self._model, self._anatomy, self._statistics, group, order)

    # Queries and keys

    def _score_gram(self, site: AttentionSite, fold: str | None = None) -> Tensor:
        return torch.from_numpy(self._statistics.gram(site.qk, "score_gram", fold))

    def _score_orders(self, site: AttentionSite) -> tuple[Tensor, Float | None]:
        """Neurons of each head, (heads, d), from the first to leave, and what their leaving costs."""
        if self._selection == "snp":
            return torch.from_numpy(np.argsort(self._statistics.importance(site.qk), axis=1, kind="stable")), None
        grams = self._score_gram(site)
        if self._selection == "energy":
            return grams.diagonal(dim1=-2, dim2=-1).argsort(dim=1, stable=True), None
        ones = torch.ones(site.qk_dim, 1, dtype=torch.float64)
        parts = [_eliminate(gram, ones, RIDGES[2]) for gram in grams]
        # In shares of each head's own scores.
        totals = grams.sum((-2, -1)).clamp_min(torch.finfo(torch.float64).tiny).numpy()
        costs = np.stack([part[1] / total for part, total in zip(parts, totals, strict=True)])
        return torch.stack([part[0] for part in parts]), costs.mean(0)

    def _score_errors(self, site: AttentionSite) -> Float | None:
        return self._costs(self._order(site.qk, lambda: self._score_orders(site)), site.qk_dim)

    def _queries_and_keys(self, draft: Draft, site: AttentionSite, count: int) -> Indices:
        order, _ = self._order(site.qk, lambda: self._score_orders(site))
        kept = order[:, site.qk_dim - count :].sort(1).values
        normed = self._normed(site)
        if normed is not None:
            self._rescale_norms(draft, site, kept, normed)
        elif site.q_norm is None and site.k_norm is None:
            rows = slice(0, site.heads * site.qk_dim)
            _scale_rows(draft, site.qkv, rows, self._score_scales(site, kept).flatten())
        return kept.numpy()

    def _score_scales(self, site: AttentionSite, kept: Tensor) -> Tensor:
        """What each kept neuron's map is multiplied by to make up for those that leave, (heads, d); zero for these."""
        scale = torch.zeros(site.heads, site.qk_dim, dtype=torch.float64)
        for head, index in enumerate(kept):
            folds = [self._score_gram(site, fold)[head] for fold in FOLDS]
            moments = [Moment(gram[index][:, index], gram[index].sum(1, keepdim=True)) for gram in folds]
            ridge = choose_ridge(moments)
            total = Moment(moments[0].xx + moments[1].xx, moments[0].xy + moments[1].xy)
            # Towards one, not towards zero: a neuron that the ridge doubts stays as it was.
            rest = Moment(total.xx, total.xy - total.xx.sum(1, keepdim=True))
            scale[head, index] = 1 + solve(rest, ridge)[:, 0]
        return scale

    def _rescale_norms(self, draft: Draft, site: AttentionSite, kept: Tensor, normed: tuple[Normed, Normed]) -> None:
        """Fold the scales into the norm of the queries, and into both what their lengths over fewer channels change."""
        scale = self._score_scales(site, kept)
        for name, side, factor in zip((site.q_norm, site.k_norm), normed, (scale, torch.ones_like(scale)), strict=True):
            assert name is not None
            length = [_length(side.second[head][index][:, index], site.qk_normed) for head, index in enumerate(kept)]
            whole = [_length(second, site.qk_normed) for second in side.second]
            ratio = torch.stack([a / b if b > 0 else torch.ones_like(b) for a, b in zip(length, whole, strict=True)])
            draft.set_per_head(name, side.gain * ratio[:, None] * factor)
            draft.set_per_head(name, side.shift * factor, "bias")

    def _normed(self, site: AttentionSite) -> tuple[Normed, Normed] | None:
        """What the norms of queries and keys do, and what enters them; None where that is not known."""
        if site.name not in self._cached_normed:
            self._cached_normed[site.name] = self._find_normed(site)
        return self._cached_normed[site.name]

    def _find_normed(self, site: AttentionSite) -> tuple[Normed, Normed] | None:
        if site.qk_normed is None or site.norm is None:
            return None
        # Queries and keys in front of their norms are linear in what the norm before them lets through.
        draft, moments = Draft(self._model, self._anatomy), Moments(self._statistics, site.norm)
        gain, shift = draft.affine(site.norm, len(moments.mean))
        weight = draft.weight(site.qkv)
        mean = weight @ (gain * moments.mean + shift) + draft.bias(site.qkv)
        spread = weight * gain
        sides, span = [], site.heads * site.qk_dim
        for part, name in enumerate((site.q_norm, site.k_norm)):
            assert name is not None
            rows, centre = (
                each[part * span : (part + 1) * span].unflatten(0, (site.heads, site.qk_dim)) for each in (spread, mean)
            )
            second = rows @ moments.covariance @ rows.mT + centre[:, :, None] * centre[:, None]
            if site.qk_normed == "layer":
                second = second - second.mean(-1, keepdim=True)
                second = second - second.mean(-2, keepdim=True)
            norm = (draft.per_head(name, site.heads, site.qk_dim, each) for each in ("weight", "bias"))
            sides.append(Normed(second, *norm))
        return sides[0], sides[1]

    # Values

    def _head_order(self, site: AttentionSite) -> Tensor:
        """Heads from the first to leave."""
        if self._head_score != "error":
            group = self._anatomy.group(site.heads_group)
            scores = snp.head_scores(self._model, self._anatomy, self._statistics, group, self._head_score)
            return torch.from_numpy(np.argsort(scores, kind="stable"))

        def order() -> tuple[Tensor, Float | None]:
            metric, moments = self._writer_metric(site.proj, site.scale), Moments(self._statistics, site.proj)
            ridge = self._first_ridge(site.proj, moments, metric)
            return eliminate_heads(metric, moments.covariance, site.heads, ridge), None

        return self._order(site.heads_group, order)[0]

    def _value_orders(self, site: AttentionSite) -> tuple[Tensor, Float | None]:
        weight, moments = self._writer_metric(site.proj, site.scale), Moments(self._statistics, site.proj)
        size = site.v_dim
        if self._selection == "snp":
            group = self._anatomy.group(site.v)
            similar = snp.score(self._model, self._statistics, group, {"similarity": "weights"})
            return torch.from_numpy(np.argsort(similar, axis=1, kind="stable")), None
        if self._selection == "energy":
            scores = (moments.covariance.diagonal() * weight.square().sum(0)).reshape(site.heads, size)
            return scores.argsort(dim=1, stable=True), None
        order, costs, _ = _eliminate(moments.covariance, weight.mT, self._first_ridge(site.proj, moments, weight))
        # As many leave each head as another: of the joint order, each head's own.
        return torch.stack([order[order // size == head] % size for head in range(site.heads)]), costs

    def _value_errors(self, site: AttentionSite) -> Float | None:
        _, costs = self._order(site.v, lambda: self._value_orders(site))
        if costs is None:
            return None
        weight, moments = self._writer_metric(site.proj, site.scale), Moments(self._statistics, site.proj)
        total = float((weight @ moments.covariance * weight).sum())
        # Joint costs at multiples of the number of heads: as if each round took one of every head.
        rising = np.concatenate([[0.0], np.cumsum(costs)])[:: site.heads] / max(total, np.finfo(float).tiny)
        return _falling(rising, site.v_dim)

    def _values(self, draft: Draft, site: AttentionSite, count: int, heads: Tensor) -> Indices:
        order, _ = self._order(site.v, lambda: self._value_orders(site))
        kept = order[:, site.v_dim - count :].sort(1).values
        flat = (heads[:, None] * site.v_dim + kept[heads]).flatten()
        self._compensate(draft, site, Moments(self._statistics, site.proj), flat)
        return kept.numpy()

    # FFN

    def _hidden_order(self, site: FfnSite) -> tuple[Tensor, Float | None]:
        def order() -> tuple[Tensor, Float | None]:
            weight, moments = self._writer_metric(site.fc2, site.scale), Moments(self._statistics, site.ffn)
            if self._selection == "snp":
                group = self._anatomy.group(site.ffn)
                similar = snp.score(self._model, self._statistics, group, {"similarity": "weights"})
                return torch.from_numpy(np.argsort(similar, axis=1, kind="stable")), None
            if self._selection == "energy":
                return (moments.covariance.diagonal() * weight.square().sum(0)).argsort(stable=True)[None], None
            ridge = self._first_ridge(site.fc2, moments, weight)
            found, costs, total = _eliminate(moments.covariance, weight.mT, ridge)
            return found[None], costs / max(total, np.finfo(float).tiny)

        return self._order(site.ffn, order)

    def _hidden(self, draft: Draft, site: FfnSite, count: int) -> Indices:
        order, _ = self._hidden_order(site)
        kept = order[:, site.size - count :].sort(1).values
        self._compensate(draft, site, Moments(self._statistics, site.ffn), kept[0])
        return kept.numpy()

    # Whole layers

    def _leave_mean(self, draft: Draft, site: AttentionSite | FfnSite, keep: Mapping[str, Indices]) -> None:
        """Let the next writer before a layer that leaves add the mean of what the layer added."""
        before = self._anatomy.before(site.layer, gone=keep)
        if before is None:
            return
        seen = site.proj if isinstance(site, AttentionSite) else site.ffn
        added = draft.weight(site.writer) @ Moments(self._statistics, seen).mean + draft.bias(site.writer)
        added = added * draft.scale(site.scale)
        for writer, scale in before.writers.items():
            gain = draft.scale(scale)
            # A channel that the writer's own LayerScale shuts stays without, or as good as shuts: its share would be
            # no number of the parameter's type.
            share = added / gain.where(gain != 0, torch.inf) if isinstance(gain, Tensor) else added
            bias = draft.bias(writer)
            draft.set(writer, bias + share.where((bias + share).abs() <= draft.largest(writer), 0), "bias")
        for token in before.tokens:
            draft.set("", draft.weight("", token) + added, token)

    # Residual width

    def _width(self, draft: Draft, count: int, gone: Collection[str]) -> Indices:
        """SNP's channels; what the norms' readers lose with the others is not refitted."""
        del draft, gone
        return core.select(self._channel_scores(), count)

    def _channel_scores(self) -> Float:
        return snp.score(self._model, self._statistics, self._anatomy.group("width"), {})

    # What they share

    def _order(self, group: str, make: Callable[[], tuple[Tensor, Float | None]]) -> tuple[Tensor, Float | None]:
        if group not in self._orders:
            self._orders[group] = make()
        return self._orders[group]

    def _writer_metric(self, module: str, scale: str | None) -> Tensor:
        return writer_metric(self._model, self._anatomy, module, scale)

    def _first_ridge(self, module: str, moments: Moments, weight: Tensor) -> float:
        """The ridge of half of the inputs, those of most energy; before it is known which stay.

        Of many inputs, fewer: it says how far the statistics can be trusted, and more inputs say it no better.
        """
        score = moments.covariance.diagonal() * weight.square().sum(0)
        order = score.argsort(descending=True)
        count = min(len(order) // 2, _FIRST)
        return self._ridge(module, moments, weight, order[:count].sort().values, order[count:])

    def _ridge(self, module: str, moments: Moments, weight: Tensor, kept: Tensor, cut: Tensor) -> float:
        """The folds' ridge for what the cut inputs of a layer contribute to its outputs."""
        # The sketch of the outputs before the products, not after.
        few = torch.zeros(weight.shape[1], min(len(weight), SKETCH), dtype=weight.dtype)
        few[cut] = sketch(weight[:, cut].mT)
        rows = (fold[kept] for fold in moments.folds)
        folds = [Moment(part[:, kept], part @ few) for part in rows]
        self._last_ridge = choose_ridge(folds, self._ridges.get(module, self._last_ridge))
        self._ridges[module] = self._last_ridge
        return self._last_ridge

    def _compensate(self, draft: Draft, site: AttentionSite | FfnSite, moments: Moments, kept: Tensor) -> None:
        """Give the kept inputs of a layer's last linear one what the others contributed, and the bias its mean."""
        module = site.writer
        weight = draft.weight(module)
        cut = torch.ones(weight.shape[1], dtype=torch.bool)
        cut[kept] = False
        cut = cut.nonzero().flatten()
        ridge = self._ridge(module, moments, weight, kept, cut)
        part, beside = (moments.covariance[kept[:, None], index] for index in (kept, cut))
        mean, lost = moments.mean[kept], beside @ weight[:, cut].mT
        bias = draft.bias(module) + weight[:, cut] @ moments.mean[cut]
        length = 1.0
        if site.inner is not None:
            change, shift, length = self._renormalised(draft, site.inner, moments, kept)
            # The inputs are x + change @ (x - shift) after the cut.
            bias -= weight[:, kept] @ change @ (mean - shift)
            mean = mean + change @ (mean - shift)
            lost -= part @ change.mT @ weight[:, kept].mT
            lost = lost + change @ lost
            part = part + change @ part
            part = part + part @ change.mT
        gained = solve(Moment(part, lost), ridge).mT
        refitted = torch.zeros_like(weight)
        refitted[:, kept] = (weight[:, kept] + gained) * length
        draft.set(module, refitted)
        draft.set(module, bias - gained @ mean, "bias")

    def _renormalised(
        self, draft: Draft, norm: NormSite, moments: Moments, kept: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """What a norm leaves of its kept inputs when it counts no others: x + change @ (x - shift), over a length.

        ``change`` takes off the mean over the kept channels, where that of all had been taken off. The length is folded
        into the norm's scale, and 1 is returned, where it has one.
        """
        gain, shift = draft.affine(norm.name, norm.size)
        living = gain[kept].abs() > 1e-12 * gain.abs().max()
        inverse = torch.where(living, 1 / torch.where(living, gain[kept], 1), 0)
        # Of vectors whose mean square is one.
        normal = (moments.mean - shift)[kept] * inverse
        second = moments.covariance[kept[:, None], kept] * inverse * inverse[:, None] + torch.outer(normal, normal)
        second.diagonal().add_((~living).to(second.dtype))
        length = float(_length(second, "layer" if norm.centred else "rms")) or 1.0
        if getattr(self._model.get_submodule(norm.name), "weight", None) is not None:
            draft.set(norm.name, gain * length)
            length = 1.0
        change = -torch.outer(gain[kept], inverse) / len(kept)
        return change if norm.centred else torch.zeros_like(change), shift[kept], length

    def _costs(self, order: tuple[Tensor, Float | None], size: int) -> Float | None:
        costs = order[1]
        if costs is None:
            return None
        return _falling(np.concatenate([[0.0], np.cumsum(costs)]), size)


def _scale_rows(draft: Draft, module: str, rows: slice, scale: Tensor) -> None:
    weight, bias = draft.weight(module).clone(), draft.bias(module).clone()
    weight[rows] *= scale[:, None]
    bias[rows] *= scale
    draft.set(module, weight)
    draft.set(module, bias, "bias")


def _length(second: Tensor, normed: str | None) -> Tensor:
    """What a norm divides by, at the mean of the squares: of these channels alone."""
    square = second.diagonal().mean()
    return (square - second.mean() if normed == "layer" else square).clamp_min(0).sqrt()


def _eliminate(moment: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Float, float]:
    """All inputs from the first to leave, what each costs, and the energy of all: tr(Wᵀ C W), without the ridge.

    Dead inputs leave at once: a ridge relative to the mean would have to be large to keep them regular.
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
    # All costs add up to the energy of the ridged moments.
    total = max(0.0, float(np.sum(costs)) - added * float(outputs.square().sum()))
    complete = alive[torch.from_numpy(np.asarray(order, np.int64))]
    return torch.cat([dead, complete]), np.concatenate([np.zeros(len(dead)), costs]), total


def _falling(rising: Float, size: int) -> Float:
    """From the cost of removing 0 … size units to the share lost when 0 … size stay, within [0, 1]."""
    errors: Float = np.clip(rising[: size + 1][::-1], 0.0, 1.0)
    return np.minimum.accumulate(errors)
