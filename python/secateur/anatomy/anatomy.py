"""What can be cut out of a model, and what is tied to it. Made by a family, read by everything after it."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from ..errors import InvalidArgument
from . import costs as cost
from .groups import Group, Indices, Member, parameter_name
from .layers import AttentionSite, FfnSite, NormSite, Source, Stream
from .show import render, units


@dataclass(frozen=True)
class Anatomy:
    """What can be cut out of a model: groups, the places to observe them, and the exact costs.

    ``refused`` maps a kind that this model cannot lose to the reason. ``input_size`` is (channels, height, width).
    ``stream`` says how the residual stream can be turned to another basis, or why it cannot.
    ``architecture`` and ``arguments`` build the dense form; where ``handmade`` nobody recorded how, and they are the
    class and nothing. ``embedding`` is what gives all tokens what enters the first block, None
    where a norm follows it. ``absent`` names the layers (groups of kind "block") that the dense form has and this model
    lost.
    """

    family: str
    architecture: str
    arguments: Mapping[str, Any]
    input_size: tuple[int, int, int]
    groups: tuple[Group, ...]
    attention: tuple[AttentionSite, ...]
    ffn: tuple[FfnSite, ...]
    norms: tuple[NormSite, ...]
    products: tuple[cost.Product, ...]
    shapes: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str] = field(default_factory=dict)
    handmade: bool = False
    stream: Stream | str = "not described"
    absent: tuple[str, ...] = ()
    embedding: Source | None = None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Group name to its present size."""
        return {group.name: group.size for group in self.groups}

    @property
    def remains(self) -> dict[str, int]:
        """What is left of the dense form: group name to size, 0 for layers that are absent."""
        return {**self.sizes, **dict.fromkeys(self.absent, 0)}

    @cached_property
    def members_of(self) -> dict[str, tuple[tuple[Group, Member], ...]]:
        """Parameter name to the group members that live in it."""
        found: dict[str, list[tuple[Group, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                found.setdefault(parameter_name(member.module, member.parameter), []).append((group, member))
        return {name: tuple(pairs) for name, pairs in found.items()}

    @cached_property
    def layers(self) -> dict[str, AttentionSite | FfnSite]:
        """The attention and FFN layers by their group of kind "block", in the order of the data."""
        every: list[AttentionSite | FfnSite] = [*self.attention, *self.ffn]
        sites = {site.layer: site for site in every}
        return {group.name: sites[group.name] for group in self.groups if group.name in sites}

    @cached_property
    def head_norms(self) -> tuple[str, ...]:
        """The norms of queries and keys."""
        return tuple(name for site in self.attention for name in (site.q_norm, site.k_norm) if name is not None)

    @cached_property
    def layer_of(self) -> dict[str, str]:
        """Name of a group to that of the layer that it is a part of."""
        parts = {site.layer: [site.qk, site.v, site.heads_group] for site in self.attention}
        parts |= {site.layer: [site.ffn] for site in self.ffn}
        return {name: layer for layer, names in parts.items() for name in names}

    @cached_property
    def layer_of_parameter(self) -> dict[str, str]:
        """Parameter name to the layer that takes it along."""
        return {name: layer for name in self.shapes if (layer := self.layer_holding(name)) is not None}

    def layer_holding(self, name: str) -> str | None:
        """The layer that a module or parameter leaves with."""
        for group in self.groups:
            if any(name == module or name.startswith(f"{module}.") for module in group.modules):
                return group.name
        return None

    def require_layers(self, sizes: Mapping[str, int], argument: str) -> None:
        """Refuse sizes that leave no attention or no FFN.

        Raises:
            InvalidArgument: they do.
        """
        for what, sites in (("attention", self.attention), ("FFN", self.ffn)):
            if not any(sizes.get(site.layer, 1) for site in sites):
                raise InvalidArgument(f"{argument}: expected at least one {what} layer to stay, got none")

    def before(self, layer: str, gone: Container[str] = ()) -> Source | None:
        """What writes last to the residual stream before a layer, but for the layers ``gone``.

        None where nothing can be added there, because a norm follows.
        """
        names = list(self.layers)
        if self.layers[layer].post_norm:
            return None
        for name in reversed(names[: names.index(layer)]):
            if name not in gone:
                site = self.layers[name]
                return None if site.post_norm else Source({site.writer: site.scale})
        return self.embedding

    def group(self, name: str) -> Group:
        """Return the group called ``name``.

        Raises:
            InvalidArgument: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise InvalidArgument(f"group: expected one of {', '.join(self.sizes)}, got {name!r}")

    def numel(self, name: str, sizes: Mapping[str, cost.Size]) -> cost.Size:
        """Number of entries that parameter ``name`` has when each group has the given size."""
        shape: list[cost.Size] = list(self.shapes[name])
        extra: cost.Size = 1
        for group, member in self.members_of.get(name, ()):
            kept = sizes.get(group.name, group.size)
            heads = group.heads if group.heads_group is None else sizes.get(group.heads_group, group.heads)
            if member.shared:
                # A norm that serves every head is given to each of them once it is cut.
                shape[member.dim] = kept
                extra = 1 + (kept != group.size) * (heads - 1)
            else:
                shape[member.dim] -= group.size * group.heads - kept * heads
        layer = self.layer_of_parameter.get(name)
        return math.prod(shape, start=extra) * (1 if layer is None else sizes.get(layer, 1))

    def params_at(self, sizes: Mapping[str, cost.Size]) -> cost.Size:
        """Number of parameters of the model when each named group has the given size, or array of sizes."""
        return sum(self.numel(name, sizes) for name in self.shapes)

    def macs_at(self, sizes: Mapping[str, cost.Size]) -> cost.Size:
        """MACs of one image when each named group has the given size, or array of sizes."""
        return cost.macs(
            self.products,
            lambda module, parameter: self.numel(parameter_name(module, parameter), sizes),
            lambda name: sizes.get(name, self.sizes[name]),
        )

    @cached_property
    def params(self) -> int:
        """Number of parameters."""
        return int(self.params_at({}))

    @cached_property
    def macs(self) -> int:
        """MACs of one image: patch embedding, linear layers, attention products, classifier."""
        return int(self.macs_at({}))

    def to_dict(self) -> dict[str, Any]:
        """The sizes and costs, for machines."""
        return {
            "family": self.family,
            "architecture": self.architecture,
            "input_size": list(self.input_size),
            "params": self.params,
            "macs": self.macs,
            "groups": [
                {"name": g.name, "kind": g.kind, "block": g.block, "size": g.size, "heads": g.heads}
                for g in self.groups
            ],
            "refused": dict(self.refused),
        }

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        title = f"{self.architecture}: {units(self.params)} parameters, {units(self.macs)} MACs at {size}"
        table = Table(box=box.SIMPLE)
        table.add_column("block")
        for column in ("heads", "qk per head", "v per head", "ffn"):
            table.add_column(column, justify="right")
        blocks: dict[int, dict[str, Group]] = {}
        for group in self.groups:
            if group.block is not None and group.kind in ("qk", "v", "ffn"):
                blocks.setdefault(group.block, {})[group.kind] = group
        for block, kinds in blocks.items():
            heads = next((g.heads for g in kinds.values() if g.per_head), "")
            sizes = (str(kinds[kind].size) if kind in kinds else "" for kind in ("qk", "v", "ffn"))
            table.add_row(str(block), str(heads), *sizes)
        notes = [f"residual width {g.size}" for g in self.groups if g.kind == "width"]
        notes += [f"without {', '.join(self.absent)}"] if self.absent else []
        notes += [f"{kind} cannot be cut: {reason}" for kind, reason in self.refused.items()]
        return "\n".join([title, render(table), *notes])


def kept_along_axes(anatomy: Anatomy, name: str, keep: Mapping[str, Indices]) -> dict[int, torch.Tensor]:
    """Axis to the entries of parameter ``name`` that stay, for the axes that lose any."""
    axes: dict[int, torch.Tensor] = {}
    masks: dict[int, torch.Tensor] = {}
    for group, member in anatomy.members_of.get(name, ()):
        whole_heads = group.heads_group is None or group.heads_group not in keep
        if group.name not in keep and (whole_heads or member.shared):
            continue
        heads = torch.arange(group.heads) if whole_heads else torch.from_numpy(keep[str(group.heads_group)][0])
        every = torch.arange(group.size).expand(group.heads, -1)
        indices = torch.from_numpy(keep[group.name]) if group.name in keep else every
        if member.shared:
            # One entry served every head; now each head has its own.
            axes[member.dim] = indices[heads].flatten()
            continue
        mask = masks.setdefault(member.dim, torch.ones(anatomy.shapes[name][member.dim], dtype=torch.bool))
        mask[member.offset : member.offset + group.heads * group.size] = False
        mask[member.offset + _flat(group, heads, indices)] = True
    return axes | {dim: mask.nonzero().flatten() for dim, mask in masks.items()}


def _flat(group: Group, heads: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return (heads[:, None] * group.size + indices[heads]).flatten()


def parameter_of(model: nn.Module, member: Member) -> nn.Parameter:
    """The parameter that a member lives in."""
    parameter = getattr(model.get_submodule(member.module), member.parameter)
    assert isinstance(parameter, nn.Parameter)
    return parameter
