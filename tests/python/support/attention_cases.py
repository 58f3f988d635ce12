"""Attention modules of timm by themselves, and where the rows of their parts are, written down a second time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


def fused(linear: str = "qkv", biases: Any = None):
    """[queries | keys | values], each head by head."""

    def where(sizes, part, head, unit):
        heads, qk, v = sizes
        start = {"query": 0, "key": heads * qk, "value": 2 * heads * qk}[part]
        bias = biases[part] if biases else None
        size = v if part == "value" else qk
        return [(linear, start + head * size + unit, (bias, head * size + unit) if bias else None)]

    return where


def by_head(linear: str = "qkv", order=("query", "key", "value")):
    """[queries keys values of head 0 | of head 1 | …]."""

    def where(sizes, part, head, unit):
        _, qk, v = sizes
        widths = {"query": qk, "key": qk, "value": v}
        stride = sum(widths[each] for each in order)
        before = sum(widths[each] for each in order[: order.index(part)])
        return [(linear, head * stride + before + unit, None)]

    return where


def apart(**linears):
    """Each part has a layer of its own, or a part of one: (name, heads · qk rows before it, so many times)."""

    def where(sizes, part, head, unit):
        heads, qk, v = sizes
        found = linears[part]
        linear, after = found if isinstance(found, tuple) else (found, 0)
        size = v if part == "value" else qk
        return [(linear, after * heads * qk + head * size + unit, None)]

    return where


def rotary(linears, half: bool, shared: int = 1):
    """Pairs of channels, with ``shared`` heads of queries for one of keys; each linear layer with its first row."""

    def where(sizes, part, head, unit):
        _, qk, v = sizes
        linear, start = linears[part]
        if part == "value":
            return [(linear, start + head * v + unit, None)]
        channels = [unit, unit + qk] if half else [2 * unit, 2 * unit + 1]
        heads = range(head * shared, (head + 1) * shared) if part == "query" else [head]
        return [(linear, start + each * 2 * qk + channel, None) for each in heads for channel in channels]

    return where


def with_biases(where, biases):
    """The same rows in biases apart, which begin at the first row of their part."""

    def both(sizes, part, head, unit):
        places = where(sizes, part, head, unit)
        first = min(where(sizes, part, 0, 0))[1]
        return [(linear, row, (biases[part], row - first)) for linear, row, _ in places]

    return both


@dataclass
class Column:
    """A column of a layer, which reads a unit."""

    layer: str
    index: int


def rows_of_a_map(sizes, part, head, unit):
    """Attention between channels: without the row, its output is not read."""
    return [Column("proj", head * sizes[2] + unit)] if part == "value" else []


def together(sizes, part, head, unit):
    """Queries, keys and values of one channel, where queries are added to the outputs."""
    heads, _, size = sizes
    return [("qkv", (each * heads + head) * size + unit, None) for each in range(3)] if part == "value" else []


def in_all_heads(sizes, part, head, unit):
    """One head of keys and values for all heads of queries."""
    row = head * sizes[1] + unit if part == "query" else unit
    return [(f"{part}.proj", row, None)]


@dataclass
class Case:
    """One module: how it is built, its inputs, and where its parts are.

    ``sizes`` are heads, and units of queries and values per head. ``pairs`` says which channels rotate together, and
    ``shared`` how many heads of queries have the same keys. If ``joined``, queries and keys leave with values.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    where: Callable
    images: int = 2
    sizes: tuple[int, int, int] = (3, 6, 6)
    kinds: tuple[str, ...] = ("qk", "v", "heads")
    norms: dict[str, str] = field(default_factory=dict)
    inner: str | None = None
    pairs: str = ""
    shared: int = 1
    joined: bool = False
    tapped: bool = True
    refused: tuple[str, ...] = ()

    def channels(self, unit: int) -> list[int]:
        """Channels of a head's unit of kind "qk"."""
        size = self.sizes[1]
        return {"": [unit], "half": [unit, unit + size], "next": [2 * unit, 2 * unit + 1]}[self.pairs]

    def __str__(self) -> str:
        return self.name


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters everywhere, in float64: biases, tables, norms and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    module.eval()  # some of timm's return nothing
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or "coord" in name or "lookup" in name:
                continue
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5
            tensor.copy_(value.abs() + 0.5 if "running_var" in name else value)
    return module


def structured(module: nn.Module) -> nn.Module:
    """Weights as training leaves them: a few directions are large, others nearly nothing; keys follow queries."""
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.ndim >= 2 and min(tensor.shape[:2]) > 2:
                flat = tensor.flatten(1)
                u, s, v = torch.linalg.svd(flat, full_matrices=False)
                decay = 3.0 * 2.0 ** -torch.arange(len(s), dtype=s.dtype)
                tensor.copy_(((u * decay) @ v).view_as(tensor))
    return module
