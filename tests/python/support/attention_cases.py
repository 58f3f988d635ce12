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
        heads, qk, v = sizes
        widths = {"query": qk, "key": qk, "value": v}
        stride = sum(widths[each] for each in order)
        before = sum(widths[each] for each in order[: order.index(part)])
        return [(linear, head * stride + before + unit, None)]

    return where


def apart(**linears):
    """Each part has a layer of its own, or those named ``key`` and ``value`` share one: (name, offset in heads · qk)."""

    def where(sizes, part, head, unit):
        heads, qk, v = sizes
        found = linears[part]
        linear, after = found if isinstance(found, tuple) else (found, 0)
        size = v if part == "value" else qk
        return [(linear, after * heads * qk + head * size + unit, None)]

    return where


@dataclass
class Case:
    """One module: how it is built, its inputs, and where its parts are."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    where: Callable
    images: int = 2
    sizes: tuple[int, int, int] = (3, 6, 6)
    kinds: tuple[str, ...] = ("qk", "v", "heads")
    norms: dict[str, str] = field(default_factory=dict)
    inner: str | None = None
    writer: str = "proj"
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters everywhere, in float64: biases, tables, norms and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
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
