"""The stock layout: heads are padded with zeros to one size, so that the library's own attention can hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from torch import nn

from ..anatomy import Anatomy, Layer, Layout
from ..engines import preferred_layout
from ..errors import InvalidArgument

__all__ = ["LAYOUTS", "chosen_layout", "pad_heads"]

LAYOUTS: tuple[str, ...] = get_args(Layout)


def chosen_layout(layout: object, engine: object = None) -> str:
    """Return the layout, or the engine's if it is "auto"; torch is the engine where none is given.

    Raises:
        InvalidArgument: no such layout or engine, an engine without "auto", or an engine that prefers no layout there
            is.
    """
    if layout != "auto":
        if layout not in LAYOUTS:
            raise InvalidArgument(f"layout: expected one of {', '.join((*LAYOUTS, 'auto'))}, got {layout!r}")
        if engine is not None:
            raise InvalidArgument(f"engine: expected none unless layout is 'auto', got {engine!r} with {layout!r}")
        return str(layout)
    name = "torch" if engine is None else engine
    preferred = preferred_layout(name)
    if preferred not in LAYOUTS:
        raise InvalidArgument(f"engine: expected {name!r} to prefer one of {', '.join(LAYOUTS)}, got {preferred!r}")
    return preferred


@torch.no_grad()
def pad_heads(model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Pad queries, keys and values to the given sizes, so that a softmax scale of 1/√size computes the same.

    Zero rows of queries and keys add nothing to the scores, and zero columns of the projection ignore their inputs. The
    query weights are multiplied, in float64, by the ratio of the module's present scale to the new one. A parameter
    that changes gets a new storage.

    Args:
        model: a model whose parameters have the sizes of ``anatomy``; the family adapts its modules afterwards.
        anatomy: description of the model as it is now.
        sizes: maps groups to sizes; those of a layer's query/key and value groups are the same, and at least the
            present sizes.
    """
    for name in anatomy.members_of:
        places = _places(anatomy, name, sizes)
        if places:
            parameter = model.get_parameter(name)
            assign(parameter, _spread(parameter.detach(), places))
    for layer in anatomy.attention:
        _rescale_queries(model, anatomy, layer, sizes[layer.groups["qk"]])


def assign(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Set new values of a parameter, of another shape.

    While anything from an earlier forward pass exists (such as a loss that somebody kept), the parameter's gradient
    accumulator exists too, and expects the old shape. Changing the type makes torch create a new one.
    """
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def _places(anatomy: Anatomy, name: str, sizes: Mapping[str, int]) -> dict[int, torch.Tensor]:
    """Map each axis of parameter ``name`` that grows to a mask of its new length; true where present entries go."""
    axes: dict[int, torch.Tensor] = {}
    here = anatomy.members_of[name]
    for axis in {member.axis for group, member in here if sizes[group.name] > group.size}:
        # The number of entries added before each present entry.
        added = np.zeros(anatomy.shapes[name][axis] + 1, np.int64)
        for group, member in here:
            if member.axis == axis:
                # The zeros go after the last unit of every head.
                np.add.at(added, member.entries[:, -1].flatten() + 1, sizes[group.name] - group.size)
        shift = added.cumsum()
        place = torch.zeros(len(shift) - 1 + int(shift[-1]), dtype=torch.bool)
        place[torch.from_numpy(np.arange(len(shift) - 1) + shift[:-1])] = True
        axes[axis] = place
    return axes


def _spread(data: torch.Tensor, places: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Put the entries where ``places`` is true, and zeros elsewhere."""
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
            # Not in place, because a state_dict that someone holds may share the storage.
            data = parameter.detach().clone()
            # The queries come first, and are already padded.
            rows = data.narrow(member.axis, int(member.entries[0, 0, 0]), len(member.entries) * size)
            rows.copy_(rows.to("cpu", torch.float64) * factor)
            parameter.data = data
