"""The stock layout: heads padded with zeros to one size, so that the library's own attention takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from torch import nn

from ..anatomy import Anatomy, Layer, Layout
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
    for layer in anatomy.attention:
        _rescale_queries(model, anatomy, layer, sizes[layer.groups["qk"]])


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
    here = anatomy.members_of[name]
    for axis in {member.axis for group, member in here if sizes[group.name] > group.size}:
        # How many entries stand in front of each one that is there.
        added = np.zeros(anatomy.shapes[name][axis] + 1, np.int64)
        for group, member in here:
            if member.axis == axis:
                # After the last unit of every head.
                np.add.at(added, member.entries[:, -1].flatten() + 1, sizes[group.name] - group.size)
        shift = added.cumsum()
        place = torch.zeros(len(shift) - 1 + int(shift[-1]), dtype=torch.bool)
        place[torch.from_numpy(np.arange(len(shift) - 1) + shift[:-1])] = True
        axes[axis] = place
    return axes


def _spread(data: torch.Tensor, places: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Put the entries where ``places`` is true, zeros elsewhere."""
    for dim, place in places.items():
        shape = list(data.shape)
        shape[dim] = len(place)
        data = data.new_zeros(shape).index_copy_(dim, place.nonzero().flatten().to(data.device), data)
    return data


def _rescale_queries(model: nn.Module, anatomy: Anatomy, layer: Layer, size: int) -> None:
    factor = layer.softmax_scale / size**-0.5
    if factor == 1:
        return
    for member in anatomy.group(layer.groups["qk"]).members:
        if member.part == "query" and member.role == "writer":
            parameter = model.get_parameter(member.tensor)
            # Never in place: a state_dict that someone holds may share the storage.
            data = parameter.detach().clone()
            # The queries come first, and have grown.
            rows = data.narrow(member.axis, int(member.entries[0, 0, 0]), len(member.entries) * size)
            rows.copy_(rows.to("cpu", torch.float64) * factor)
            parameter.data = data
