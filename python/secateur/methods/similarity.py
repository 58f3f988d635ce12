"""SNP's importance of neurons: those that others repeat score low (Shim et al., ECCV 2024, arXiv:2404.11630)."""

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
    """Score each unit by Σ (1 − |cos|) to all others of its group, over all heads: repeated units score low.

    Args:
        model: the model whose weight rows are compared.
        group: a group of values, hidden units or filters.
        statistics: if given, activations are compared instead, by their second moment.

    Returns:
        (heads, size).

    Raises:
        InvalidArgument: the statistics lack the moment.
    """
    if statistics is not None:
        found = core.value_similarity_from_moment(statistics.moments(group.name).second)
    else:
        # The branches of a gated FFN are cut together: unit i is row i of each, joined.
        found = core.value_similarity(torch.cat([rows_of(model, group, each) for each in group.of("writer")], dim=1))
    return np.asarray(found).reshape(group.heads, group.size)


def channel_scores(model: nn.Module, group: Group) -> Float:
    """Score a residual stream's channels in the same way, averaged over its writers, (1, size).

    Each writer's scores are scaled to sum to one first (the paper states the average, not the writers' own score).
    """
    total = np.zeros(group.size)
    writers = group.of("writer")
    for member in writers:
        found = np.asarray(core.value_similarity(rows_of(model, group, member)))
        # A layer of zeros (as after a zero init) says nothing about any channel.
        if found.sum() > 0:
            total += found / found.sum()
    return (total / len(writers)).reshape(1, group.size)


def head_scores(
    model: nn.Module, anatomy: Anatomy, statistics: Statistics, group: Group, score: str, *, activations: bool = False
) -> Float:
    """Return the importance of one layer's heads, (heads,).

    Args:
        model: the model that was calibrated.
        anatomy: its description.
        statistics: its statistics.
        group: a group of heads.
        score: "neurons": the mean of a head's query/key scores and of its value scores, each over the sum of these
            means over all heads (how neurons make a head's score is not stated in the paper); "michel": E |Att_h ·
            ∂L/∂Att_h| (Michel et al., 2019, arXiv:1905.10650).
        activations: compare values by activations, not weights.

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
    """Return the entries of a weight that belong to each unit, (heads · size, entries), on the host in float64."""
    weight = tensor_of(model, member.tensor).detach().movedim(member.axis, 0)
    entries = torch.from_numpy(member.entries.reshape(group.heads * group.size, -1)).to(weight.device)
    return weight[entries].flatten(1).to("cpu", torch.float64)
