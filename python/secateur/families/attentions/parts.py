"""Collects what an attention module loses with each unit of its heads, by names within the module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...anatomy import Indices, Member, NormSite, Part, Role, Tap, shared_entries, tensor_of, unit_entries
from ..base import NORMS, refuse_computed, unsupported
from ..vision_transformer.modules import HeadNorm
from ..walk import Walk

__all__ = ["Parts", "UnitKind", "fit_bias", "fit_head_norms", "rows_of"]

UnitKind = Literal["qk", "v", "heads"]
_KIND: dict[Part, UnitKind] = {"query": "qk", "key": "qk", "value": "v", "output": "v"}


def _heads_with_all(heads: int, *sizes: int) -> list[Indices]:
    """Return the entries of parts that lie head by head, each head with all parts: (heads, size, 1) for each size."""
    starts, stride = np.cumsum([0, *sizes]), sum(sizes)
    return [
        (stride * np.arange(heads)[:, None] + start + np.arange(size))[..., None].astype(np.int64)
        for start, size in zip(starts, sizes, strict=False)  # the last start is the end
    ]


class Parts(Walk):
    """Which entries of which tensors belong to the units of a module.

    Args:
        module: the attention module.
        heads: number of heads.
        qk: query/key channels per head.
        v: value channels per head.
        scale: what multiplies the scores.
    """

    def __init__(self, module: nn.Module, heads: int, qk: int, v: int, scale: float = 1.0) -> None:
        super().__init__(module)
        self.heads, self.sizes, self.scale = heads, {"qk": qk, "v": v}, scale
        self.in_place_of: dict[str, str] = {}  # kinds without a group, whose channels are as many as another's
        self.channels, self.shared_by = 1, 1  # channels of a unit of "qk"; query heads that share keys and values
        self.depthwise: dict[str, UnitKind] = {}  # convolutions of all heads' channels, with one kernel for each
        self.products: list[tuple[str, int, tuple[str, ...]]] = []  # MACs beside weights and scores, by kinds
        self.members: dict[str, list[Member]] = {"qk": [], "v": [], "heads": []}
        self.tied: set[str] = set()  # kinds whose units are the same in all heads
        self.refused: dict[str, str] = {}
        self.buffers: dict[str, tuple[int, ...]] = {}
        self.taps: dict[Part, Tap] = {}
        self.norms: dict[Part, str] = {}
        self.fixed: dict[Part, str] = {}
        self.inner_site: NormSite | None = None
        self.writer, self.scored = "", True

    def write(self, part: Part, linear: str, entries: Indices, bias: str | None = None) -> None:
        """Add the rows that compute a part; ``bias`` is that of the part alone, which starts at its first row."""
        self.rows(linear, self.members[_KIND[part]], "writer", part, entries)
        if bias is not None and getattr(self.model, bias, None) is not None:
            self.along(_KIND[part], bias, 0, entries - entries.min(), part, "writer")
            self.fixed[part] = f"{bias}: the bias is not the linear layer's own"
        self.observe(part, linear, "output", entries)

    def fused(self, linear: str = "qkv", biases: Sequence[str | None] = (None, None, None)) -> None:
        """Add rows of queries, keys and values in this order, each head by head."""
        heads, (qk, v) = self.heads, self.sizes.values()
        for part, size, start, bias in zip(
            ("query", "key", "value"), (qk, qk, v), (0, heads * qk, 2 * heads * qk), biases, strict=True
        ):
            self.write(part, linear, unit_entries(size, heads, start=start), bias)  # type: ignore[arg-type]

    def by_head(self, linear: str) -> None:
        """Add rows that lie head by head, each with its queries, keys and values."""
        for part, entries in self._in_heads():
            self.write(part, linear, entries)

    def by_head_norm(self, name: str) -> None:
        """Add a batch norm after rows that lie head by head."""
        for part, entries in self._in_heads():
            self.batch_norm(part, name, entries)

    def _in_heads(self) -> list[tuple[Part, Indices]]:
        qk, v = self.sizes.values()
        query, key, value = _heads_with_all(self.heads, qk, qk, v)
        return [("query", query), ("key", key), ("value", value)]

    def read(self, linear: str = "proj", entries: Indices | None = None) -> None:
        """Add the columns that read values, head by head unless told otherwise."""
        entries = unit_entries(self.sizes["v"], self.heads) if entries is None else entries
        self.columns(linear, self.members["v"], "output", entries)
        self.writer = linear
        self.observe("output", linear, "input", entries)

    def along(
        self, kind: UnitKind, tensor: str, axis: int, entries: Indices, part: Part, role: Role = "elementwise"
    ) -> None:
        """Add one axis of a parameter or buffer."""
        module, _, leaf = tensor.rpartition(".")
        holder = self.model.get_submodule(module)
        if leaf in holder._buffers:
            self.buffers[tensor] = tuple(getattr(holder, leaf).shape)
        else:
            refuse_computed(module, holder, leaf)
        self.members[kind].append(Member(tensor, axis, entries, part, role))

    def per_head(self, part: Part, tensor: str, axis: int) -> None:
        """Add an axis that all heads share until it is cut; then each has its own channels."""
        size = self.sizes[_KIND[part]]
        own = tensor_of(self.model, tensor).shape[axis] == self.heads * size
        self.along(
            _KIND[part], tensor, axis, unit_entries(size, self.heads) if own else shared_entries(size, self.heads), part
        )

    def own_kernels(self, part: Part, conv: str) -> None:
        """Add the kernels of a depthwise convolution over the channels of each head."""
        layer = self.linear(conv)
        self.per_head(part, f"{conv}.weight", 0)
        if layer.bias is not None:
            self.per_head(part, f"{conv}.bias", 0)
        self.depthwise[conv] = _KIND[part]

    def of_heads(self, tensor: str, axis: int) -> None:
        """Add a tensor with one entry per head."""
        self.along("heads", tensor, axis, unit_entries(self.heads), "bias_table")

    def head_norm(self, part: Part, name: str, entries: Indices | None = None) -> None:
        """Add a norm of queries or keys, which all heads share until it is cut; ``entries`` if channels form pairs."""
        norm: Any = self.model.get_submodule(name)
        if type(norm) is nn.Identity:
            return
        kind = _KIND[part]
        entries = unit_entries(self.sizes[kind], self.heads) if entries is None else entries
        if type(norm) is HeadNorm:
            self.norm_members(name, norm, self.members[kind], part, entries)
        else:
            self.norm(name, self.members[kind], part, np.tile(entries[:1], (self.heads, 1, 1)))
        self.norms[part] = name
        self.fixed[part] = f"{name}: a norm is between projection and product"

    def inner_norm(self, name: str, entries: Indices | None = None) -> None:
        """Add a norm over all values, directly before the projection."""
        entries = unit_entries(self.sizes["v"], self.heads) if entries is None else entries
        self.norm(name, self.members["v"], "output", entries)
        self.inner_site = self.inner(name, entries.size)

    def gate(self, name: str, entries: Indices | None = None) -> None:
        """Add a linear layer whose outputs multiply the values, if there is one."""
        if getattr(self.model, name, None) is not None:
            entries = unit_entries(self.sizes["v"], self.heads) if entries is None else entries
            self.rows(name, self.members["v"], "elementwise", "output", entries)
            self.inner_site = None
            self.fixed["value"] = f"{name}: it multiplies the values"

    def batch_norm(self, part: Part, name: str, entries: Indices) -> None:
        """Add all of a batch norm: scale, shift, and its buffers."""
        norm: Any = self.model.get_submodule(name)
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            raise unsupported(name, norm, "BatchNorm")
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, leaf) is not None:
                self.along(_KIND[part], f"{name}.{leaf}", 0, entries, part)
        self.fixed[part] = f"{name}: a batch norm follows the projection"

    def bias_module(self, name: str) -> None:
        """Add what timm's relative position biases have per head."""
        bias: Any = self.model.get_submodule(name)
        if type(bias) is timm.layers.RelPosBias:
            self.of_heads(f"{name}.relative_position_bias_table", 1)
        elif type(bias) is timm.layers.RelPosBiasTf:
            self.of_heads(f"{name}.relative_position_bias_table", 0)
            (rows, _, across), (columns, _, along) = self._lookups(name)
            self.products.append((name, rows * rows * along * (across + columns * columns), ("heads",)))
        elif type(bias) is timm.layers.RelPosMlp:
            self.rows(f"{name}.mlp.fc2", self.members["heads"], "elementwise", "bias_table", unit_entries(self.heads))
        else:
            raise unsupported(name, bias, "RelPosBias, RelPosBiasTf or RelPosMlp")

    def _lookups(self, name: str) -> list[tuple[int, ...]]:
        bias: Any = self.model.get_submodule(name)
        return [tuple(table.shape) for table in (bias.height_lookup, bias.width_lookup)]

    def observe(self, part: Part, linear: str, at: Literal["input", "output"], entries: Indices) -> None:
        """Observe a part at a linear layer or convolution: queries and keys by head, others (B, N, channels)."""
        by_head = self.heads if part in ("query", "key") else 0
        conv = type(self.model.get_submodule(linear)) is nn.Conv2d
        order = entries.transpose(0, 2, 1).reshape(-1)
        straight = bool((np.diff(order) == 1).all())
        channels = slice(int(order[0]), int(order[-1]) + 1) if straight and not conv else None
        pick = None if channels is not None else order
        view = _View(pick, by_head, conv)
        self.taps[part] = Tap(part, part, linear, at, order.size, channels, view)

    def normalised(self, part: Part) -> None:
        """Observe queries or keys as they meet: with length one."""
        tap = self.taps[part]
        self.taps[part] = Tap(tap.name, tap.label, tap.module, tap.at, tap.size, tap.channels, _unit_length(tap.view))
        self.fixed[part] = "queries and keys have length one when they meet, head by head"


class _View:
    """Reorders channels, and flattens places to tokens."""

    def __init__(self, order: Indices | None, heads: int, conv: bool) -> None:
        self.order, self.heads, self.conv = order, heads, conv

    def __call__(self, x: Tensor) -> Tensor:
        if self.conv:
            x = x.movedim(1, -1)
        x = x[:, None] if x.ndim == 2 else x.flatten(1, -2)
        if self.order is not None:
            x = x[..., torch.from_numpy(self.order).to(x.device)]
        return x.unflatten(-1, (self.heads, -1)) if self.heads else x


def _unit_length(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: F.normalize(view(x), dim=-1)


def rows_of(module: nn.Module, name: str) -> int:
    """Return the number of rows of a linear layer or convolution within a module.

    Raises:
        Unsupported: it is of another class, or a hook computes its weight.
    """
    return len(Walk(module).linear(name).weight)


def fit_head_norms(module: Any, names: Sequence[str], heads: int, size: int) -> None:
    """Let norms of queries and keys be over ``size`` channels of each of ``heads`` heads, in place of timm's."""
    for name in names:
        norm: Any = getattr(module, name)
        if type(norm) is HeadNorm:
            vars(norm).update(heads=heads, size=size)
        elif type(norm) in NORMS and tuple(norm.normalized_shape) != (size,):
            bias, upcast = getattr(norm, "bias", None), type(norm).__name__.endswith("Fp32")
            made = HeadNorm(heads, size, norm.eps, NORMS[type(norm)], upcast, norm.weight, bias)
            setattr(module, name, made.train(norm.training))


def fit_bias(bias: Any, heads: int) -> None:
    """Set the number of heads of one of timm's relative position biases."""
    if bias is None:
        return
    axis = 0 if type(bias) is timm.layers.RelPosBiasTf else -1
    shape = list(bias.bias_shape)
    shape[axis] = heads
    bias.bias_shape = tuple(shape)
    if hasattr(bias, "num_heads"):
        bias.num_heads = heads
