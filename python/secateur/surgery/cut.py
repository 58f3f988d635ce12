"""Cuts a model: compacts its parameters and buffers in place and makes its modules fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Indices, kept_along_axes, tensor_of
from ..families.base import Family
from .compact import compact_buffer, compact_parameter, replace_parameter

__all__ = ["cut"]


@torch.no_grad()
def cut(
    model: nn.Module,
    family: Family,
    anatomy: Anatomy,
    keep: Mapping[str, Indices],
    weights: Mapping[str, Tensor],
) -> None:
    """Keep some units of each group and set new values of parameters; the indices must have been checked."""
    # Indices are sorted and unique, so a full number of them cuts nothing.
    keep = {name: indices for name, indices in keep.items() if indices.shape[1] < anatomy.sizes[name]}
    # Compute all indices before the first cut, so that anything that does not fit fails while the model is whole.
    gone = {name for name in anatomy.members_of if anatomy.layer_holding(name) in keep}
    axes = {name: kept_along_axes(anatomy, name, keep) for name in anatomy.members_of if name not in gone}
    for parameter in model.parameters():
        parameter.grad = None
    for name, kept in axes.items():
        if not kept or name in weights:
            continue
        tensor = tensor_of(model, name)
        if isinstance(tensor, nn.Parameter):
            compact_parameter(tensor, kept)
        else:
            compact_buffer(model, name, kept)
    for name, value in weights.items():
        replace_parameter(model, name, value)
    family.adapt(model, anatomy, {**anatomy.sizes, **{name: indices.shape[1] for name, indices in keep.items()}})
