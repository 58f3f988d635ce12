"""Verifies, before the model is changed, that a cut computes the same as the dense model with the same units masked."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..anatomy import Anatomy, Group, Indices, tensor_of
from ..errors import Unsupported
from ..families.base import Family, fit_modules
from .cut import cut

__all__ = ["verify_cut"]

_TOLERANCE = 1e-10


def verify_cut(model: nn.Module, family: Family, anatomy: Anatomy, keep: Mapping[str, Indices]) -> None:
    """Compare a cut copy of a model with a masked one, on random images, in float64 and in evaluation mode.

    A unit is masked at its consumers: the entries of all its ``reader`` members are set to zero. A norm over units is
    taken over those that stay. Neither the model nor the states of torch's generators are changed.

    Args:
        model: the model, on any device. At most two copies of its weights are made in float64, one at a time.
        family: the family of the model, which adapts the cut copy.
        anatomy: the family's description of the model.
        keep: maps groups to the units that stay, (heads, kept), already checked for ``anatomy``.

    Raises:
        Unsupported: the outputs differ by more than 1e-10 of the largest, or the cut groups have no readers to mask;
            the text names the groups that do not fit.
    """
    groups = [group for group in anatomy.groups if group.name in keep and keep[group.name].shape[1] < group.size]
    reason = _difference(model, family, anatomy, groups, keep)
    if reason is None:
        return
    alone = {group.name: _difference(model, family, anatomy, [group], keep) for group in groups if len(groups) > 1}
    guilty = {name: found for name, found in alone.items() if found is not None}
    names = ", ".join(guilty or [group.name for group in groups])
    raise Unsupported(f"{names}: expected a cut that only removes units, got {next(iter(guilty.values()), reason)}")


def _difference(
    model: nn.Module, family: Family, anatomy: Anatomy, groups: Iterable[Group], keep: Mapping[str, Indices]
) -> str | None:
    """Describe what a cut of these groups changes in the outputs; None if nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        probe = _probe(model, generator)
        device = next((parameter.device for parameter in probe.parameters()), torch.device("cpu"))
        images = torch.randn(2, *anatomy.input_size, dtype=torch.float64, generator=generator).to(device)
        for group in groups:
            roles = {member.role for member in group.members}
            if group.traits.whole or ("norm" in roles and group.heads > 1) or "reader" not in roles:
                return f"{group.name}, which zeros at its readers do not mask"
        with ExitStack() as masks:
            for group in groups:
                _mask(probe, group, keep[group.name], masks)
            expected = _outputs(probe(images))
        try:
            # A cut removes exactly what is masked, so the masked copy itself can be cut.
            cut(probe, family, anatomy, {group.name: keep[group.name] for group in groups}, {})
            found = _outputs(probe(images))
        except Exception as error:  # modules raise anything for inputs of other shapes
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if [output.shape for output in found] != [output.shape for output in expected]:
        return "outputs of another shape"
    for ours, theirs in zip(found, expected, strict=True):
        apart, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if not apart <= _TOLERANCE * largest:  # refuses NaN too
            return f"outputs that differ by {apart:.3g} where the largest is {largest:.3g}"
    return None


def _probe(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Copy a model in float64, without hooks, and with random values for constant tensors, which would hide errors."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    probe = copy.deepcopy(model).to("cpu" if device.type == "mps" else device).double().eval()
    for module in probe.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for tensor in (*probe.parameters(), *probe.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64, generator=generator) + 0.5)
    return probe


def _mask(model: nn.Module, group: Group, kept: Indices, masks: ExitStack) -> None:
    removed = np.ones((group.heads, group.size), dtype=bool)
    np.put_along_axis(removed, kept, False, axis=1)
    readers = [member for member in group.members if member.role == "reader"]
    for member in readers:
        tensor = tensor_of(model, member.tensor)
        tensor.index_fill_(member.axis, torch.from_numpy(member.entries[removed].ravel()).to(tensor.device), 0)
    for name in dict.fromkeys(member.module for member in group.members if member.role == "norm"):
        # Its channels are in the order in which the reader takes them, whatever its own members say.
        weight = tensor_of(model, readers[0].tensor)
        staying = torch.from_numpy(readers[0].entries[~removed].ravel()).to(weight.device)
        hook = partial(_normed, staying, 1 if weight.ndim == 4 else -1)
        masks.enter_context(model.get_submodule(name).register_forward_hook(hook))


def _normed(kept: Tensor, axis: int, norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Return what a norm makes of the channels that stay, and zeros for the others."""
    part = copy.deepcopy(norm)
    part._forward_hooks.clear()
    for parameter in part.parameters():
        parameter.data = parameter.index_select(0, kept)
    fit_modules(part)
    return torch.zeros_like(out).index_copy_(axis, kept, part(args[0].index_select(axis, kept)))


def _outputs(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
