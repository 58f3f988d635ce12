"""SNP: structured neuron-level pruning of vision transformers (Shim et al., ECCV 2024, arXiv:2404.11630)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from .. import core
from ..anatomy import Anatomy, Group, Member, parameter_of
from ..statistics import Float, Statistics
from .base import Ranking

NAME = "snp"
# "weights" is the paper's; "activations" takes the same cosines from the calibration set's second moments.
OPTIONS: Mapping[str, tuple[str, ...]] = {"similarity": ("weights", "activations")}


def prepare(model: nn.Module, anatomy: Anatomy, statistics: Statistics, options: Mapping[str, str]) -> Ranking:
    """Bind the criterion to a model: the highest scores stay."""
    return Ranking(model, anatomy, statistics, lambda group: score(model, statistics, group, options))


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
