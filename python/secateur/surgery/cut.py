"""Cut a model: compact its parameters and buffers in place and make the modules fit."""

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
    """Keep some units of each group and give parameters other values; indices were checked."""
    # Sorted, unique and as many as there are: nothing to cut.
    keep = {name: indices for name, indices in keep.items() if indices.shape[1] < anatomy.sizes[name]}
    # All indices before the first cut: what does not fit fails here, with the model whole.
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
