"""SNP's importance of neurons by what others repeat (Shim et al., ECCV 2024, arXiv:2404.11630)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .. import core
from ..anatomy import Anatomy, Group, Member, tensor_of
from ..statistics.settings import Float
from ..statistics.statistics import Statistics

__all__ = ["channel_scores", "head_scores", "rows_of", "similarity"]


def similarity(model: nn.Module, group: Group, statistics: Statistics | None = None) -> Float:
    """Σ (1 − |cos|) of a unit to every other of its group, over all heads: what another repeats scores low.

    Args:
        model: the rows of its weights are compared.
        group: of values, hidden units or filters.
        statistics: where given, the same of activations, from their second moment.

    Returns:
        (heads, size).

    Raises:
        InvalidArgument: the statistics lack the moment.
    """
    if statistics is not None:
        found = core.value_similarity_from_moment(statistics.moments(group.name).second)
    else:
        # The branches of a gated FFN leave together: unit i is row i of each, joined.
        found = core.value_similarity(torch.cat([rows_of(model, group, each) for each in group.of("writer")], dim=1))
    return np.asarray(found).reshape(group.heads, group.size)


def channel_scores(model: nn.Module, group: Group) -> Float:
    """The same of a residual stream's channels, the mean over its writers, (1, size).

    Each writer's scores are scaled to sum to one first (the paper states the average, not the writers' own score).
    """
    total = np.zeros(group.size)
    writers = group.of("writer")
    for member in writers:
        found = np.asarray(core.value_similarity(rows_of(model, group, member)))
        # A layer of zeros (a fresh LayerScale-style init) says nothing about any channel.
        if found.sum() > 0:
            total += found / found.sum()
    return (total / len(writers)).reshape(1, group.size)


def head_scores(
    model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, score: str, *, activations: bool = False
) -> Float:
    """Importance of one layer's heads, (heads,).

    Args:
        model: that was calibrated.
        anatomy: of it.
        statistics: of it.
        group: of heads.
        score: "neurons": the mean of a head's query/key scores and of its value scores, each over the sum of these
            means over all heads (how neurons make a head's score is not stated in the paper); "michel": E |Att_h ·
            ∂L/∂Att_h| (Michel et al., 2019, arXiv:1905.10650).
        activations: take value scores from activations.

    Raises:
        InvalidArgument: the statistics lack what the score needs.
    """
    if score == "michel":
        return statistics.head_importance(group.name)
    layer = anatomy.layers[anatomy.layer_of[group.name]]
    value = similarity(model, anatomy.group(layer.groups["v"]), statistics if activations else None)
    means = [statistics.importance(layer.groups["qk"]).mean(1), value.mean(1)]
    shares = [mean / max(float(mean.sum()), np.finfo(float).tiny) for mean in means]
    found: Float = np.mean(shares, axis=0)
    return found


def rows_of(model: nn.Module, group: Group, member: Member) -> Tensor:
    """The entries of a weight that belong to each unit, (heads · size, entries), on the host in float64."""
    weight = tensor_of(model, member.tensor).detach().movedim(member.axis, 0)
    entries = torch.from_numpy(member.entries.reshape(group.heads * group.size, -1)).to(weight.device)
    return weight[entries].flatten(1).to("cpu", torch.float64)
