"""Cut a model: compact its parameters in place and make the modules fit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from ..anatomy.anatomy import Anatomy, kept_along_axes
from ..anatomy.groups import Indices
from ..errors import InvalidArgument
from ..families.base import Family
from .compact import compact_parameter, replace_parameter
from .stock_layout import LAYOUTS

# Of all groups: what a file says a model has is counted out before its weights are looked at. ViT-22B has 1.8 million.
_MAX_UNITS = 1 << 21


def shape(
    model: nn.Module, family: Family, sizes: Mapping[str, int], layouts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Give a model of arbitrary weights, on any device, the sizes of a pruned one.

    Args:
        model: the dense model.
        family: its family.
        sizes: group to size, those that a stock attention module is padded to.
        layouts: attention module to layout; "exact" for those that it does not name.

    Raises:
        InvalidArgument: a group or module that the model does not have, a size that it cannot be cut to, or no layout
            of that name or for those sizes.
        Unsupported: the stock layout cannot hold the module.
    """
    anatomy = family.inspect(model)
    keep: dict[str, Indices] = {}
    units = sum(group.heads * group.size for group in anatomy.groups)
    if units > _MAX_UNITS:
        raise InvalidArgument(f"arguments: expected a model of at most {_MAX_UNITS:,} units in all, got {units:,}")
    for name, size in sizes.items():
        group = anatomy.group(name)
        if not group.least <= size <= group.size:
            raise InvalidArgument(f"sizes[{name!r}]: expected {group.least}…{group.size}, got {size}")
        keep[name] = np.tile(np.arange(size, dtype=np.int64), (group.heads, 1))
    stock = _stock_head_dims(anatomy, {**anatomy.sizes, **sizes}, layouts)
    cut(model, family, anatomy, keep, {})
    family.make_stock(model, stock)


def _stock_head_dims(anatomy: Anatomy, sizes: Mapping[str, int], layouts: Mapping[str, str]) -> dict[str, int]:
    sites = {site.name: site for site in anatomy.attention}
    found: dict[str, int] = {}
    for name, layout in layouts.items():
        if name not in sites:
            raise InvalidArgument(f"layouts: expected attention modules of this model, got {name!r}")
        if layout not in LAYOUTS:
            raise InvalidArgument(f"layouts[{name!r}]: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
        if layout == "stock":
            qk, v = sizes[sites[name].qk], sizes[sites[name].v]
            if qk != v:
                raise InvalidArgument(f"layouts[{name!r}]: expected 'exact' for heads of {qk} and {v}, got 'stock'")
            found[name] = qk
    return found


@torch.no_grad()
def cut(
    model: nn.Module,
    family: Family,
    anatomy: Anatomy,
    keep: Mapping[str, Indices],
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Keep some units of each group and give parameters other values; indices were checked."""
    # Sorted, unique and as many as there are: nothing to cut.
    keep = {name: indices for name, indices in keep.items() if indices.shape[1] < anatomy.sizes[name]}
    # All indices before the first cut: what does not fit fails here, with the model whole.
    gone = {name for name, layer in anatomy.layer_of_parameter.items() if layer in keep}
    axes = {name: kept_along_axes(anatomy, name, keep) for name in anatomy.members_of if name not in gone}
    for parameter in model.parameters():
        parameter.grad = None
    for name, kept in axes.items():
        if kept and name not in weights:
            compact_parameter(model.get_parameter(name), kept)
    for name, value in weights.items():
        replace_parameter(model, name, value)
    family.adapt(model, anatomy, {**anatomy.sizes, **{name: indices.shape[1] for name, indices in keep.items()}})
