"""What a cut loses when nothing is refitted, for every size at once, from the second moments of calibration."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy.anatomy import Anatomy
from ..anatomy.groups import Group, Indices
from ..anatomy.layers import Stream
from ..statistics.statistics import Float, Statistics
from .weights import Draft

__all__ = ["of_selection", "writer_metric"]


def of_selection(
    model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, order: Indices
) -> Float | None:
    """Share of the group's output that is lost when its first units in ``order`` stay and the others are zero.

    Query/key: of the squared centred scores. Values, heads and FFN: of the variance of what they write, without the
    part that the next norm does not see; the mean of what leaves is lost as well, so that shares above one occur.
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
    if statistics.settings.collect != "all":
        return None
    if group.kind == "qk":
        grams = torch.from_numpy(statistics.gram(group.name, "score_gram"))
        shares = [
            _trailing(gram, index) / _positive(gram.sum()) for gram, index in zip(grams, _rows(order), strict=True)
        ]
        return _falling(torch.stack(shares).mean(0))
    if group.kind == "width":
        seen = [statistics.moments(norm.name).second.diagonal() for norm in anatomy.norms]
        if not seen:
            return None
        energy = torch.from_numpy(np.mean(seen, axis=0))
        return _falling(_trailing(torch.diag(energy / _positive(energy.sum())), _rows(order)[0]))
    if group.kind in ("v", "heads"):
        attention = next(site for site in anatomy.attention if group.name in (site.v, site.heads_group))
        name, layer, scale = attention.proj, attention.proj, attention.scale
    else:
        ffn = next(site for site in anatomy.ffn if site.ffn == group.name)
        name, layer, scale = ffn.ffn, ffn.fc2, ffn.scale
    weight, moments = writer_metric(model, anatomy, layer, scale), statistics.moments(name)
    # Σ over a set of units of this matrix is the energy of what they write together.
    energy = (weight.mT @ weight) * torch.from_numpy(moments.second)
    total = _positive((weight @ torch.from_numpy(moments.covariance) * weight).sum())
    if group.kind == "heads":
        size = len(energy) // group.size
        channels = (_rows(order).mT * size + torch.arange(size)).flatten()
        return _falling(_trailing(energy, channels)[::size] / total)
    # As many of every head at each size: head after head in each round.
    joint = (_rows(order) + group.size * torch.arange(group.heads)[:, None]).mT.flatten()
    return _falling(_trailing(energy, joint)[:: group.heads] / total)


def writer_metric(model: nn.Module, anatomy: Anatomy, layer: str, scale: str | None) -> Tensor:
    """A writer's weight, (width, inputs), as the next norm sees its output: after LayerScale, without the mean."""
    draft = Draft(model, anatomy)
    weight = draft.weight(layer)
    factor = draft.scale(scale)
    weight = weight * (factor[:, None] if isinstance(factor, Tensor) else factor)
    stream = anatomy.stream
    return weight - weight.mean(0) if isinstance(stream, Stream) and stream.centred else weight


def _rows(order: Indices) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(order, dtype=np.int64))


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
