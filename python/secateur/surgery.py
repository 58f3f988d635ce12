"""Cut a model: compact its parameters in place and make the modules fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import nn

from . import core
from .anatomy import Anatomy, Indices, kept_along_axes, render
from .errors import InvalidArgument
from .families import Family, family_of
from .identity import Fingerprint
from .layout import LAYOUTS, assign, check_layout, pad_heads
from .modules import HeadNorm
from .plan import Plan


@dataclass(frozen=True)
class Report:
    """What a cut changed: each pair is (before, after), ``groups`` by name, sizes per head where per head."""

    params: tuple[int, int]
    macs: tuple[int, int]
    groups: Mapping[str, tuple[int, int]]

    @property
    def blocks(self) -> list[dict[str, tuple[int, int]]]:
        """Per block: kind to (before, after)."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, pair in self.groups.items():
            block, _, kind = name.rpartition(".")
            if block:
                found.setdefault(block, {})[kind] = pair
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "params": list(self.params),
            "macs": list(self.macs),
            "groups": {name: list(pair) for name, pair in self.groups.items()},
        }

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE)
        for column in ("", "before", "after", "kept"):
            table.add_column(column, justify="right" if column else "left")
        for name, (before, after) in (("parameters", self.params), ("MACs", self.macs)):
            table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
        for name, (before, after) in self.groups.items():
            if before == after and name.endswith((".heads", ".attn", ".mlp")):
                continue
            table.add_row(name, str(before), str(after), f"{after / before:.1%}")
        return render(table)


@core.host_by_default()
def prune(model: nn.Module, plan: Plan, *, layout: str = "exact", strict: bool = True) -> Report:
    """Cut the model in place as planned. Gradients are dropped; build optimizers afterwards.

    A parameter that owns its storage is compacted inside it, and the storage is shrunk; one that shares it (a
    state_dict you hold, a mapped file) or lives on another device gets a new one, and the old values stay with their
    other owner. The extra memory is never more than the largest new tensor.

    Args:
        model: the model that was planned for.
        plan: what to keep.
        layout: "exact": attention modules that lose anything become ours, which take the kept sizes as they are.
            "stock": all attention modules are timm's own afterwards, those of an earlier round too. Queries, keys and
            values have one size per head, the larger; what is missing is zeros, which the report counts. The query
            weights are multiplied by √(size / dense size), so that timm's 1/√size is the dense model's scale. Plans
            leave out the zeros in their own ``params`` and ``macs``.
        strict: refuse other weights than the plan was made for, by their checksums, for which a GPU's weights are read
            through the host; if false, the same dimensions are enough for a plan that only selects, and no weight
            leaves its device.

    Raises:
        InvalidArgument: another model than the plan's, or a plan whose indices do not fit; nothing is changed.
        Unsupported: the model is of no supported family, or its stock layout would compute something else: query/key
            norms over cut channels, an inner norm over padded values, an attention pool over a cut width. Nothing is
            changed.
    """
    check_layout(layout)
    if not isinstance(plan, Plan):
        raise InvalidArgument(f"plan: expected a Plan, got {type(plan).__name__}")
    family = family_of(model)
    anatomy = family.inspect(model)
    strict = strict or bool(plan.weights)
    plan.fingerprint.require(Fingerprint.of(model, anatomy, weights=strict), "model", strict=strict)
    sizes = plan.check(anatomy)
    if layout == "stock":
        sizes = family.stock_sizes(model, anatomy, sizes)
    # Inference tensors could never be trained; those of a model that was made as such stay what they are.
    inference = any(parameter.is_inference() for parameter in model.parameters())
    with torch.inference_mode(inference):
        _cut(model, family, anatomy, plan.keep, plan.weights)
    for name, eps in plan.eps.items():
        norm: Any = model.get_submodule(name)
        norm.eps = eps
    for name in plan.uncentred:
        head_norm = model.get_submodule(name)
        assert isinstance(head_norm, HeadNorm)
        head_norm.centred = False
    after = family.inspect(model)
    if layout == "stock":
        with torch.inference_mode(inference):
            pad_heads(model, after, sizes)
        family.make_stock(model, {site.name: sizes[site.qk] for site in after.attention})
        after = family.inspect(model)
    # A caller's autocast has kept what it cast of the weights before.
    torch.clear_autocast_cache()
    return Report(
        params=(anatomy.params, after.params),
        macs=(anatomy.macs, after.macs),
        groups={group.name: (group.size, after.sizes.get(group.name, 0)) for group in anatomy.groups},
    )


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
    _cut(model, family, anatomy, keep, {})
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
def _cut(
    model: nn.Module,
    family: Family,
    anatomy: Anatomy,
    keep: Mapping[str, Indices],
    weights: Mapping[str, torch.Tensor],
) -> None:
    # Sorted, unique and as many as there are: nothing to cut.
    keep = {name: indices for name, indices in keep.items() if indices.shape[1] < anatomy.sizes[name]}
    # All indices before the first cut: what does not fit fails here, with the model whole.
    gone = {name for name, layer in anatomy.layer_of_parameter.items() if layer in keep}
    axes = {name: kept_along_axes(anatomy, name, keep) for name in anatomy.members_of if name not in gone}
    for parameter in model.parameters():
        parameter.grad = None
    for name, kept in axes.items():
        if kept and name not in weights:
            _compact(model.get_parameter(name), kept)
    for name, value in weights.items():
        _replace(model, name, value)
    family.adapt(model, anatomy, {**anatomy.sizes, **{name: indices.shape[1] for name, indices in keep.items()}})


def _replace(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter other values, in the storage it has where it can; add a bias that a layer does not have."""
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


def _compact(parameter: nn.Parameter, axes: Mapping[int, torch.Tensor]) -> None:
    """Keep some entries along some axes."""
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


def _gather(data: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A new tensor of the kept entries; rows and columns at once, so that nothing between is ever whole."""
    if set(axes) == {0, 1}:
        rows, columns = (axes[dim].to(data.device) for dim in (0, 1))
        return data[rows[:, None], columns]
    for dim, indices in axes.items():
        data = data.index_select(dim, indices.to(data.device))
    return data


def _repeats(indices: torch.Tensor) -> bool:
    return bool((indices.diff() <= 0).any())


def _owns_its_storage(parameter: nn.Parameter) -> bool:
    """Is the parameter all there is in a resizable host storage that nothing else refers to?"""
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
    # torch has no public count; without it, every storage counts as shared and is replaced.
    count = getattr(torch._C, "_storage_Use_Count", None)
    return -1 if count is None else int(count(storage._cdata))


_CORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SOLE_OWNER = max(0, _owners(torch.empty(1).untyped_storage()))
