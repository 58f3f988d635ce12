"""Which entries of a tensor stay when units are removed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .groups import Group, Indices

__all__ = ["kept_along_axes", "kept_units", "tensor_of"]


def kept_units(group: Group, keep: Mapping[str, Indices]) -> tuple[Tensor, Tensor]:
    """Return the heads of a group that stay, (h,), and the kept units of all its heads, removed heads included."""
    heads = torch.arange(group.heads)
    if group.within is not None and group.within in keep:
        heads = torch.from_numpy(keep[group.within][0])
    if group.name in keep:
        return heads, torch.from_numpy(keep[group.name])
    return heads, torch.arange(group.size).expand(group.heads, -1)


def kept_along_axes(anatomy: Anatomy, name: str, keep: Mapping[str, Indices]) -> dict[int, Tensor]:
    """Map each axis of a parameter or buffer that loses entries to the entries that stay."""
    axes: dict[int, Tensor] = {}
    masks: dict[int, Tensor] = {}
    shape = anatomy.shapes[name] if name in anatomy.shapes else anatomy.buffers[name]
    for group, member in anatomy.members_of.get(name, ()):
        whole_heads = group.within is None or group.within not in keep
        if group.name not in keep and (whole_heads or member.shared):
            continue
        heads, units = kept_units(group, keep)
        entries = torch.from_numpy(member.entries)
        if member.shared:
            # All heads shared the entries; now each head has its own, in their order.
            axes[member.axis] = entries[0, units[heads]].flatten(1).sort(dim=1).values.flatten()
            continue
        mask = masks.setdefault(member.axis, torch.ones(shape[member.axis], dtype=torch.bool))
        mask[entries.flatten()] = False
        mask[entries[heads[:, None], units[heads]].flatten()] = True
    return axes | {axis: mask.nonzero().flatten() for axis, mask in masks.items()}


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer with a dotted name."""
    module, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(module), leaf)
    assert isinstance(found, Tensor)
    return found
