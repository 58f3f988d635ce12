"""SNP: structured neuron-level pruning of vision transformers (Shim et al., ECCV 2024, arXiv:2404.11630)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from .. import core
from ..anatomy.anatomy import Anatomy, parameter_of
from ..anatomy.groups import Group, Member
from ..statistics.statistics import Float, Statistics
from .base import Ranking

NAME = "snp"
# "weights" is the paper's; "activations" takes the same cosines from the calibration set's second moments.
# The paper combines neurons with heads and leaves the heads' score open: the mean over their neurons, or Michel's.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "similarity": ("weights", "activations"),
    "head_score": ("neurons", "michel"),
}


def prepare(model: nn.Module, anatomy: Anatomy, statistics: Statistics, options: Mapping[str, str]) -> Ranking:
    """Bind the criterion to a model: the highest scores stay."""

    def scored(group: Group) -> Float:
        if group.kind == "heads":
            return head_scores(model, anatomy, statistics, group, options["head_score"], options["similarity"])[None]
        return score(model, statistics, group, options)

    return Ranking(model, anatomy, statistics, scored)


def head_scores(
    model: nn.Module,
    anatomy: Anatomy,
    statistics: Statistics,
    group: Group,
    head_score: str,
    similarity: str = "weights",
) -> Float:
    """Importance of one layer's heads, (heads,).

    Args:
        model: that was calibrated.
        anatomy: of it.
        statistics: of it.
        group: of heads.
        head_score: "neurons": the mean of a head's query/key scores and of its value scores, each over the sum of these
            means over all heads (how neurons make a head's score is not stated in the paper); "michel": E |Att_h ·
            ∂L/∂Att_h| (Michel et al., 2019, arXiv:1905.10650).
        similarity: of the value scores.

    Raises:
        InvalidArgument: the statistics lack what the score needs.
    """
    if head_score == "michel":
        return statistics.head_importance(group.name)
    site = next(site for site in anatomy.attention if site.heads_group == group.name)
    means = [
        score(model, statistics, anatomy.group(name), {"similarity": similarity}).mean(1) for name in (site.qk, site.v)
    ]
    shares = [mean / max(float(mean.sum()), np.finfo(float).tiny) for mean in means]
    found: Float = np.mean(shares, axis=0)
    return found


def score(model: nn.Module, statistics: Statistics, group: Group, options: Mapping[str, str]) -> Float:
    """SNP's importance of a group's units.

    Query/key: how much of the attention scores' leading singular directions a neuron carries, from the statistics.
    Value and FFN: Σ (1 − |cos|) to every other neuron of the layer, over all heads, so that what another neuron repeats
    goes first. Residual width: the same on the output rows of each layer that writes to it, each layer's scores scaled
    to sum to one, then averaged (the paper states the average, not the writers' own score).

    Returns:
        (heads, size), or (1, size) where the group is not per head.

    Raises:
        InvalidArgument: the statistics lack what the score needs.
    """
    if group.kind == "qk":
        return statistics.importance(group.name)
    if group.kind == "width":
        return _width(model, group)
    if options["similarity"] == "activations":
        similarity = core.value_similarity_from_moment(statistics.moments(group.name).second)
    else:
        writers = [_rows(model, group, member) for member in _writers(group)]
        # The branches of a gated FFN leave together: unit i is row i of each, joined.
        similarity = core.value_similarity(torch.cat(writers, dim=1))
    return np.asarray(similarity).reshape(group.heads, group.size)


def _width(model: nn.Module, group: Group) -> Float:
    total = np.zeros(group.size)
    writers = _writers(group)
    for member in writers:
        similarity = np.asarray(core.value_similarity(_rows(model, group, member)))
        # A layer of zeros (a fresh LayerScale-style init) says nothing about any channel.
        if similarity.sum() > 0:
            total += similarity / similarity.sum()
    return (total / len(writers)).reshape(1, group.size)


def _writers(group: Group) -> list[Member]:
    return [member for member in group.members if member.role == "writer" and member.parameter == "weight"]


def _rows(model: nn.Module, group: Group, member: Member) -> torch.Tensor:
    """One row of the writer's weight per unit, (heads · size, inputs), on the host in float64."""
    weight = parameter_of(model, member).detach()
    rows = weight.narrow(member.dim, member.offset, group.heads * group.size).movedim(member.dim, 0)
    return rows.flatten(1).to("cpu", torch.float64)
