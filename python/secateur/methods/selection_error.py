"""Computes the loss of a cut without a refit, for every size at once, from the second moments of calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Group, Indices, Kind, Layer, Stream
from ..statistics.settings import Float
from ..statistics.statistics import Statistics
from .weights import Weights

__all__ = ["of_selection", "writer_metric"]


def of_selection(
    model: nn.Module,
    anatomy: Anatomy,
    statistics: Statistics,
    group: Group,
    order: Indices,
    *,
    mean_kept: bool = False,
) -> Float | None:
    """Return the share of the group's output lost when only its first units in ``order`` stay, at every size.

    The share refers to the squared centred scores for query/key; to the variance of the writer's output for values,
    heads and FFN, without the part that the next norm ignores (the mean of the removed part is lost as well, so shares
    above one occur); and to the norms' inputs for the residual width, averaged over all norms.

    Args:
        model: the model that was calibrated.
        anatomy: its description.
        statistics: its statistics, with moments.
        group: any kind but a layer.
        order: (heads, size), the most important unit first.
        mean_kept: whether the writer's bias takes over the mean of what is removed of values, heads and FFN.

    Returns:
        (size + 1,), for 0 … size units, never rising; None where the statistics lack the moments.
    """
    of_kind = _OF_KIND.get(group.kind)
    if of_kind is None or statistics.settings.collect != "all":
        return None
    rows = torch.from_numpy(np.ascontiguousarray(order, dtype=np.int64))
    return of_kind(model, anatomy, statistics, group, rows, mean_kept)


def writer_metric(model: nn.Module, anatomy: Anatomy, layer: Layer) -> Tensor:
    """Return the weight of a layer's writer, (width, inputs), as the next norm sees it: scaled and centred."""
    weights = Weights(model, anatomy)
    weight = weights.matrix(layer.writer)
    factor = weights.scale(layer.scale)
    weight = weight * (factor[:, None] if isinstance(factor, Tensor) else factor)
    stream = anatomy.streams.get(layer.stream)
    return weight - weight.mean(0) if isinstance(stream, Stream) and stream.centred else weight


def _scores(
    _model: nn.Module, _anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor, _mean_kept: bool
) -> Float:
    grams = torch.from_numpy(statistics.gram(group.name, "score_gram"))
    shares = [_trailing(gram, index) / _positive(gram.sum()) for gram, index in zip(grams, order, strict=True)]
    return _falling(torch.stack(shares).mean(0))


def _channels(
    _model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor, _mean_kept: bool
) -> Float | None:
    norms = [norm for norm in anatomy.norms if norm.stream == group.name]
    seen = [statistics.moments(norm.name).second.diagonal() for norm in norms]
    if not seen:
        return None
    energy = torch.from_numpy(np.mean(seen, axis=0))
    return _falling(_trailing(torch.diag(energy / _positive(energy.sum())), order[0]))


def _written(
    model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, mean_kept: bool
) -> tuple[Tensor, Tensor]:
    """Return a matrix whose sum over any set of units is the energy they write together; and the total."""
    layer = anatomy.layers[anatomy.layer_of[group.name]]
    weight, moments = writer_metric(model, anatomy, layer), statistics.moments(layer.before_writer.name)
    covariance = torch.from_numpy(moments.covariance)
    lost = covariance if mean_kept else torch.from_numpy(moments.second)
    return (weight.mT @ weight) * lost, _positive((weight @ covariance * weight).sum())


def _heads(
    model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor, mean_kept: bool
) -> Float:
    energy, total = _written(model, anatomy, statistics, group, mean_kept)
    size = len(energy) // group.size
    channels = (order.mT * size + torch.arange(size)).flatten()
    return _falling(_trailing(energy, channels)[::size] / total)


def _units(
    model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor, mean_kept: bool
) -> Float:
    energy, total = _written(model, anatomy, statistics, group, mean_kept)
    # Every size keeps the same number in each head: one of each head per round.
    joint = (order + group.size * torch.arange(group.heads)[:, None]).mT.flatten()
    return _falling(_trailing(energy, joint)[:: group.heads] / total)


_OF_KIND: Mapping[Kind, Callable[[nn.Module, Anatomy, Statistics, Group, Tensor, bool], Float | None]] = {
    "qk": _scores,
    "v": _units,
    "ffn": _units,
    "heads": _heads,
    "width": _channels,
}


def _trailing(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the sums of all elements between the units from r on, for r from 0 to their number."""
    ordered = matrix[order][:, order]
    sums = ordered.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def _positive(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(torch.float64).tiny)


def _falling(errors: Tensor) -> Float:
    found: Float = np.minimum.accumulate(errors.clamp_min(0).numpy())
    return found
