"""The stock layout: heads padded with zeros to one size, so that the library's own attention takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import nn

from ..anatomy.anatomy import Anatomy
from ..anatomy.layers import AttentionSite, Layout
from ..errors import InvalidArgument

__all__ = ["LAYOUTS", "check_layout", "pad_heads"]

LAYOUTS: tuple[str, ...] = get_args(Layout)


def check_layout(layout: object) -> None:
    """Refuse what is no layout.

    Raises:
        InvalidArgument: it is none.
    """
    if layout not in LAYOUTS:
        raise InvalidArgument(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


@torch.no_grad()
def pad_heads(model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Pad queries, keys and values to the given sizes, and let a softmax scale of 1/√size compute the same.

    Zero rows of queries and keys add nothing to the scores, zero columns of the projection read nothing. The scale is
    brought to what the module has now by the query weights, in float64. A parameter that changes gets a storage of its
    own.

    Args:
        model: a model whose parameters have the sizes of ``anatomy``; its modules are left to the family.
        anatomy: of the model as it is.
        sizes: group to size; of a layer's query/key and value group the same, and at least the present ones.
    """
    for name in anatomy.members_of:
        places = _places(anatomy, name, sizes)
        if places:
            parameter = model.get_parameter(name)
            assign(parameter, _spread(parameter.detach(), places))
    for site in anatomy.attention:
        _rescale_queries(model, site, sizes[site.qk])


def assign(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter other values, of another shape.

    While anything of an earlier forward pass lives (a loss that somebody kept), so does the node that takes the
    parameter's gradients, for those of the old shape; torch makes a new one when the type changes.
    """
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def _places(anatomy: Anatomy, name: str, sizes: Mapping[str, int]) -> dict[int, torch.Tensor]:
    """Axis to where the entries that parameter ``name`` has will stand, and the new length, for axes that grow."""
    axes: dict[int, torch.Tensor] = {}
    for dim in {member.dim for group, member in anatomy.members_of[name] if sizes[group.name] > group.size}:
        pieces: list[torch.Tensor] = []
        end = 0
        here = [(member.offset, group) for group, member in anatomy.members_of[name] if member.dim == dim]
        for offset, group in sorted(here, key=lambda pair: pair[0]):
            pieces.append(torch.ones(offset - end, dtype=torch.bool))
            head = torch.arange(sizes[group.name]) < group.size
            pieces.append(head.repeat(group.heads))
            end = offset + group.heads * group.size
        pieces.append(torch.ones(anatomy.shapes[name][dim] - end, dtype=torch.bool))
        axes[dim] = torch.cat(pieces)
    return axes


def _spread(data: torch.Tensor, places: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Put the entries where ``places`` is true, zeros elsewhere."""
    for dim, place in places.items():
        shape = list(data.shape)
        shape[dim] = len(place)
        data = data.new_zeros(shape).index_copy_(dim, place.nonzero().flatten().to(data.device), data)
    return data


def _rescale_queries(model: nn.Module, site: AttentionSite, size: int) -> None:
    factor = site.softmax_scale / size**-0.5
    if factor == 1:
        return
    layer: Any = model.get_submodule(site.qkv)
    for parameter in (layer.weight, layer.bias):
        if parameter is None:
            continue
        # Never in place: a state_dict that someone holds may share the storage.
        data = parameter.detach().clone()
        queries = data[: site.heads * size]
        queries.copy_(queries.to("cpu", torch.float64) * factor)
        parameter.data = data
