"""What a cut loses when nothing is refitted, for every size at once, from the second moments of calibration."""

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
    model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Indices
) -> Float | None:
    """Share of the group's output that is lost when its first units in ``order`` stay and the others are zero.

    Query/key: of the squared centred scores. Values, heads and FFN: of the variance of what they write, without the
    part that the next norm does not see; the mean of what is removed is lost as well, so that shares above one occur.
    Residual width: of what the norms see, the mean over all norms.

    Args:
        model: the model that was calibrated.
        anatomy: its description.
        statistics: with moments, else nothing can be said.
        group: any kind but a layer.
        order: (heads, size), first to last to stay.

    Returns:
        (size + 1,), for 0 … size units, never rising; None where the statistics lack the moments.
    """
    of_kind = _OF_KIND.get(group.kind)
    if of_kind is None or statistics.settings.collect != "all":
        return None
    rows = torch.from_numpy(np.ascontiguousarray(order, dtype=np.int64))
    return of_kind(model, anatomy, statistics, group, rows)


def writer_metric(model: nn.Module, anatomy: Anatomy, layer: Layer) -> Tensor:
    """A layer's writer's weight, (width, inputs), as the next norm sees it: after LayerScale, without the mean."""
    weights = Weights(model, anatomy)
    weight = weights.weight(layer.writer)
    factor = weights.scale(layer.scale)
    weight = weight * (factor[:, None] if isinstance(factor, Tensor) else factor)
    stream = anatomy.streams.get(layer.stream)
    return weight - weight.mean(0) if isinstance(stream, Stream) and stream.centred else weight


def _scores(_model: nn.Module, _anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor) -> Float:
    grams = torch.from_numpy(statistics.gram(group.name, "score_gram"))
    shares = [_trailing(gram, index) / _positive(gram.sum()) for gram, index in zip(grams, order, strict=True)]
    return _falling(torch.stack(shares).mean(0))


def _channels(_model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor) -> Float | None:
    norms = [norm for norm in anatomy.norms if norm.stream == group.name]
    seen = [statistics.moments(norm.name).second.diagonal() for norm in norms]
    if not seen:
        return None
    energy = torch.from_numpy(np.mean(seen, axis=0))
    return _falling(_trailing(torch.diag(energy / _positive(energy.sum())), order[0]))


def _written(model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group) -> tuple[Tensor, Tensor]:
    """The energy of what units write together is the sum over a set of them of this matrix; and the total."""
    layer = anatomy.layers[anatomy.layer_of[group.name]]
    weight, moments = writer_metric(model, anatomy, layer), statistics.moments(layer.before_writer.name)
    energy = (weight.mT @ weight) * torch.from_numpy(moments.second)
    return energy, _positive((weight @ torch.from_numpy(moments.covariance) * weight).sum())


def _heads(model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor) -> Float:
    energy, total = _written(model, anatomy, statistics, group)
    size = len(energy) // group.size
    channels = (order.mT * size + torch.arange(size)).flatten()
    return _falling(_trailing(energy, channels)[::size] / total)


def _units(model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Tensor) -> Float:
    energy, total = _written(model, anatomy, statistics, group)
    # As many of every head at each size: head after head in each round.
    joint = (order + group.size * torch.arange(group.heads)[:, None]).mT.flatten()
    return _falling(_trailing(energy, joint)[:: group.heads] / total)


_OF_KIND: Mapping[Kind, Callable[[nn.Module, Anatomy, Statistics, Group, Tensor], Float | None]] = {
    "qk": _scores,
    "v": _units,
    "ffn": _units,
    "heads": _heads,
    "width": _channels,
}


def _trailing(matrix: Tensor, order: Tensor) -> Tensor:
    """Sums of all elements between the units from r on, for r from 0 to their number."""
    ordered = matrix[order][:, order]
    sums = ordered.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def _positive(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(torch.float64).tiny)


def _falling(errors: Tensor) -> Float:
    found: Float = np.minimum.accumulate(errors.clamp_min(0).numpy())
    return found
