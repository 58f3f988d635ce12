"""Reduces parameters to the entries that are kept, in their own storage where possible."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import core
from .stock_layout import assign


def replace_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter's values, in its own storage where possible; add a bias that the layer does not have."""
    module, _, parameter = name.rpartition(".")
    layer = model.get_submodule(module)
    present = getattr(layer, parameter)
    if present is None:
        like = layer.weight
        assert isinstance(like, nn.Parameter)
        layer.register_parameter(parameter, nn.Parameter(value.to(like, copy=True), like.requires_grad))
        return
    if _owns_its_storage(present):
        storage = present.untyped_storage()
        data = present.detach().as_strided(value.shape, value.stride())
        data.copy_(value)
        assign(present, data)
        storage.resize_(data.numel() * data.element_size())
    else:
        assign(present, value.to(present, copy=True))


def compact_parameter(parameter: nn.Parameter, axes: Mapping[int, torch.Tensor]) -> None:
    """Keep only some entries of a parameter along some axes."""
    if _owns_its_storage(parameter) and not any(_repeats(indices) for indices in axes.values()):
        storage = parameter.untyped_storage()
        data = parameter.detach()
        shape: tuple[int, ...] = tuple(data.shape)
        for dim, indices in axes.items():
            shape, strides = core.compact(data, dim, indices.numpy())
            data = data.as_strided(shape, strides)
        assign(parameter, data)
        storage.resize_(data.numel() * data.element_size())
    else:
        assign(parameter, _gather(parameter.detach(), axes))


def compact_buffer(model: nn.Module, name: str, axes: Mapping[int, torch.Tensor]) -> None:
    """Keep only some entries of a buffer, which gets a new storage."""
    module, _, leaf = name.rpartition(".")
    holder = model.get_submodule(module)
    setattr(holder, leaf, _gather(getattr(holder, leaf), axes))


def _gather(data: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return a new tensor of the kept entries; all axes are indexed at once, so that no intermediate is created."""
    if set(axes) == {0, 1}:
        rows, columns = (axes[dim].to(data.device) for dim in (0, 1))
        return data[rows[:, None], columns]
    for dim, indices in axes.items():
        data = data.index_select(dim, indices.to(data.device))
    return data


def _repeats(indices: torch.Tensor) -> bool:
    return bool((indices.diff() <= 0).any())


def _owns_its_storage(parameter: nn.Parameter) -> bool:
    """Whether the parameter fills a resizable host storage that nothing else refers to."""
    storage = parameter.untyped_storage()
    return (
        parameter.device.type == "cpu"
        and parameter.is_contiguous()
        and parameter.dtype in _CORE_DTYPES
        and storage.nbytes() == parameter.numel() * parameter.element_size()
        and storage.resizable()
        and not storage.is_shared()
        and _owners(storage) == _SOLE_OWNER
    )


def _owners(storage: torch.UntypedStorage) -> int:
    # torch has no public reference count; without one, every storage counts as shared and is replaced.
    count = getattr(torch._C, "_storage_Use_Count", None)
    return -1 if count is None else int(count(storage._cdata))


_CORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


_SOLE_OWNER = max(0, _owners(torch.empty(1).untyped_storage()))
