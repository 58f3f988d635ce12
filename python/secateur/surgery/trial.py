"""Cuts a copy of a model that shares the memory of everything the cut does not touch."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..anatomy import Anatomy, Indices
from ..families.base import Family
from .cut import cut
from .structure import set_norms

__all__ = ["cut_copy"]


def cut_copy(
    model: nn.Module,
    family: Family,
    anatomy: Anatomy,
    keep: Mapping[str, Indices],
    weights: Mapping[str, Tensor],
    eps: Mapping[str, float] | None = None,
    uncentred: Collection[str] = (),
) -> nn.Module:
    """Return a cut copy, to run once: what the cut does not change is shared with the model, and must stay as it is.

    Args:
        model: the model; it is not changed.
        family: its family.
        anatomy: its description.
        keep: for each group that is cut, the units that stay, checked.
        weights: new values of parameters, in their shape after the cut.
        eps: new eps of norms.
        uncentred: query/key norms that no longer subtract the mean.
    """
    touched = set(weights) | {
        name for name, members in anatomy.members_of.items() if any(group.name in keep for group, _ in members)
    }
    memo: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name not in touched:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for name, buffer in model.named_buffers():
        if name not in touched:
            memo[id(buffer)] = buffer
    found = copy.deepcopy(model, memo)
    cut(found, family, anatomy, keep, weights)
    set_norms(found, eps or {}, uncentred)
    return found
