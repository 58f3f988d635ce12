"""What can be cut out of a model, and what is tied to it. Made by a family, read by everything after it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from . import cost
from .errors import InvalidArgument

Indices = npt.NDArray[np.int64]
Kind = Literal["qk", "v", "ffn", "heads", "width", "conv", "block"]
Role = Literal["writer", "reader", "norm", "elementwise"]
Layout = Literal["exact", "stock"]


@dataclass(frozen=True)
class Member:
    """One axis of one parameter that loses entries when its group does.

    Unit u of the group is entry ``offset + u`` of axis ``dim``; in a per-head group u = head · size + i. A ``shared``
    parameter (a query/key norm) has one entry per i that serves every head; it is given one per head when cut.
    Role ``writer`` produces the units (and is scored), ``reader`` consumes them, ``norm`` normalises over them.
    """

    module: str
    parameter: str
    dim: int
    role: Role
    offset: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Group:
    """Units that can only leave together, with every parameter axis they live in.

    ``size`` counts units per head where ``per_head``, else all of them. Kept counts are multiples of ``multiple``.
    """

    name: str
    kind: Kind
    block: int | None
    size: int
    members: tuple[Member, ...]
    heads: int = 1
    per_head: bool = False
    multiple: int = 1


@dataclass(frozen=True)
class AttentionSite:
    """Where one attention layer's queries, keys and values can be read during a forward pass.

    ``qkv`` outputs (B, N, heads · (2 qk_dim + v_dim)): queries, keys, values. ``q_norm`` and ``k_norm``, where there
    are any, output (B, heads, N, qk_dim) and are what the scores see. ``proj`` takes (B, N, heads · v_dim).
    ``softmax_scale`` multiplies the scores. ``layout`` is "stock" where the module is the library's own class, cut or
    not, and "exact" where it is ours.
    """

    name: str
    qk: str
    v: str
    heads: int
    qk_dim: int
    v_dim: int
    softmax_scale: float
    layout: Layout
    qkv: str
    q_norm: str | None
    k_norm: str | None
    proj: str
    scale: str | None = None
    between: str | None = None


@dataclass(frozen=True)
class FfnSite:
    """Where one FFN's hidden units, after the activation, enter the second layer: (B, N, size); LayerScale follows."""

    name: str
    ffn: str
    size: int
    fc2: str
    scale: str | None = None


@dataclass(frozen=True)
class Stream:
    """The residual stream, where every reader of it is a norm: then an orthogonal change of its basis changes nothing.

    ``writers`` are the linear layers and convolutions that add to it, each with the LayerScale that follows or None;
    ``tokens`` the parameters (1, N, width) that do; ``readers`` maps each norm to the linear layers behind it. Norms
    are LayerNorms if ``centred``, else RMSNorms.
    """

    centred: bool
    writers: Mapping[str, str | None]
    tokens: tuple[str, ...]
    readers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class NormSite:
    """A norm over the ``size`` channels of the residual stream.

    ``centred`` for LayerNorm, not for RMSNorm; ``pooled`` where it comes after pooling.
    """

    name: str
    size: int
    centred: bool
    pooled: bool


@dataclass(frozen=True)
class Anatomy:
    """What can be cut out of a model: groups, the places to observe them, and the exact costs.

    ``refused`` maps a kind that this model cannot lose to the reason. ``input_size`` is (channels, height, width).
    ``stream`` says how the residual stream can be turned to another basis, or why it cannot.
    ``architecture`` and ``arguments`` build the dense form; where ``handmade`` nobody recorded how, and they are the
    class and nothing.
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

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Group name to its present size."""
        return {group.name: group.size for group in self.groups}

    @cached_property
    def members_of(self) -> dict[str, tuple[tuple[Group, Member], ...]]:
        """Parameter name to the group members that live in it."""
        found: dict[str, list[tuple[Group, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                found.setdefault(parameter_name(member.module, member.parameter), []).append((group, member))
        return {name: tuple(pairs) for name, pairs in found.items()}

    def group(self, name: str) -> Group:
        """Return the group called ``name``.

        Raises:
            InvalidArgument: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise InvalidArgument(f"group: expected one of {', '.join(self.sizes)}, got {name!r}")

    def numel(self, name: str, sizes: Mapping[str, int]) -> int:
        """Number of entries that parameter ``name`` has when each group has the given size."""
        shape = list(self.shapes[name])
        extra = 1
        for group, member in self.members_of.get(name, ()):
            kept = sizes.get(group.name, group.size)
            if member.shared:
                shape[member.dim] = kept
                extra = group.heads if kept != group.size else 1
            else:
                shape[member.dim] -= (group.size - kept) * group.heads
        return math.prod(shape) * extra

    def params_at(self, sizes: Mapping[str, int]) -> int:
        """Number of parameters of the model when each named group has the given size."""
        return sum(self.numel(name, sizes) for name in self.shapes)

    def macs_at(self, sizes: Mapping[str, int]) -> int:
        """MACs of one image when each named group has the given size."""
        return cost.macs(
            self.products,
            lambda module, parameter: self.numel(parameter_name(module, parameter), sizes),
            lambda name: sizes.get(name, self.sizes[name]),
        )

    @cached_property
    def params(self) -> int:
        """Number of parameters."""
        return self.params_at({})

    @cached_property
    def macs(self) -> int:
        """MACs of one image: patch embedding, linear layers, attention products, classifier."""
        return self.macs_at({})

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
            if group.block is not None:
                blocks.setdefault(group.block, {})[group.kind] = group
        for block, kinds in blocks.items():
            heads = next((g.heads for g in kinds.values() if g.per_head), "")
            sizes = (str(kinds[kind].size) if kind in kinds else "" for kind in ("qk", "v", "ffn"))
            table.add_row(str(block), str(heads), *sizes)
        notes = [f"residual width {g.size}" for g in self.groups if g.kind == "width"]
        notes += [f"{kind} cannot be cut: {reason}" for kind, reason in self.refused.items()]
        return "\n".join([title, render(table), *notes])


def parameter_name(module: str, parameter: str) -> str:
    """Dotted name of a module's parameter; the model itself is module ''."""
    return f"{module}.{parameter}" if module else parameter


def kept_along_axes(anatomy: Anatomy, name: str, keep: Mapping[str, Indices]) -> dict[int, torch.Tensor]:
    """Axis to the entries of parameter ``name`` that stay, for the axes that lose any."""
    axes: dict[int, torch.Tensor] = {}
    masks: dict[int, torch.Tensor] = {}
    for group, member in anatomy.members_of.get(name, ()):
        if group.name not in keep:
            continue
        indices = torch.from_numpy(keep[group.name])
        if member.shared:
            # One entry served every head; now each head has its own.
            axes[member.dim] = indices.flatten()
            continue
        mask = masks.setdefault(member.dim, torch.ones(anatomy.shapes[name][member.dim], dtype=torch.bool))
        mask[member.offset : member.offset + group.heads * group.size] = False
        mask[member.offset + _flat(group, indices)] = True
    return axes | {dim: mask.nonzero().flatten() for dim, mask in masks.items()}


def _flat(group: Group, indices: torch.Tensor) -> torch.Tensor:
    return (torch.arange(group.heads)[:, None] * group.size + indices).flatten()


def parameter_of(model: nn.Module, member: Member) -> nn.Parameter:
    """The parameter that a member lives in."""
    parameter = getattr(model.get_submodule(member.module), member.parameter)
    assert isinstance(parameter, nn.Parameter)
    return parameter


def units(count: int) -> str:
    """A count in thousands, millions or billions, to three digits or more."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.{3 if unit == 'G' else 2}f} {unit}"
    return str(count)


def render(table: Table) -> str:
    """Draw a rich table as plain text."""
    console = Console(file=io.StringIO(), width=120, color_system=None, legacy_windows=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
