"""Queries, keys and values from layers of their own: class attention, and keys of a map that was made smaller."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from timm.models import cait, crossvit, pvt_v2, tnt, twins, volo

from ...anatomy import unit_entries
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts, rows_of

__all__ = ["ClassToken", "OwnValues", "Reduced"]


class _FromReduced(Sized):
    """Attention of all tokens to those of a smaller map."""

    if TYPE_CHECKING:
        q: Any
        kv: Any
        sr: Any
        norm: Any
        act: Any

    def forward(self, x: torch.Tensor, feat_size: Any) -> torch.Tensor:
        """Attend over (B, N, C), whose tokens are ``feat_size`` (height, width)."""
        q = self.of_heads(self.q(x), self.qk_dim)
        if self.sr is not None:
            x = x.transpose(1, 2).unflatten(2, (feat_size[0], feat_size[1]))
            pool = getattr(self, "pool", None)
            x = self.norm(self.sr(x if pool is None else pool(x)).flatten(2).transpose(1, 2))
            x = x if pool is None else self.act(x)
        k, v = self.kv(x).split([self.num_heads * self.qk_dim, self.num_heads * self.v_dim], dim=-1)
        return self.project(self.attend(q, self.of_heads(k, self.qk_dim), self.of_heads(v, self.v_dim)))


class PrunedPvtAttention(_FromReduced, pvt_v2.Attention):
    """timm's ``Attention`` of PVTv2 with heads of any sizes."""


class PrunedGlobalSubSampleAttn(_FromReduced, twins.GlobalSubSampleAttn):
    """timm's ``GlobalSubSampleAttn`` with heads of any sizes."""


class _OfClassToken(Sized):
    """Attention of the first of (B, N, C) tokens to all; ``layers`` are those of queries, keys and values."""

    layers: ClassVar[tuple[str, str, str]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the first token gets, (B, 1, C)."""
        queries, keys, values = self.layers
        q, k = getattr(self, queries)(x[:, :1]), getattr(self, keys)(x)
        if values == keys:
            k, v = k.split([self.num_heads * self.qk_dim, self.num_heads * self.v_dim], dim=-1)
        else:
            v = getattr(self, values)(x)
        q, k, v = self.of_heads(q, self.qk_dim), self.of_heads(k, self.qk_dim), self.of_heads(v, self.v_dim)
        return self.project(self.attend(q, k, v))


class PrunedClassAttn(_OfClassToken, cait.ClassAttn):
    """timm's ``ClassAttn`` with heads of any sizes."""

    layers = ("q", "k", "v")


class PrunedVoloClassAttention(_OfClassToken, volo.ClassAttention):
    """timm's ``ClassAttention`` of VOLO with heads of any sizes."""

    layers = ("q", "kv", "kv")


class PrunedCrossAttention(_OfClassToken, crossvit.CrossAttention):
    """timm's ``CrossAttention`` with heads of any sizes."""

    layers = ("wq", "wk", "wv")


class _Layers(NamedTuple):
    """Layers of queries, keys and values; one that is named twice writes the first part, then the second."""

    query: str
    key: str
    value: str


def _write(parts: Parts, layers: _Layers) -> None:
    heads, (qk, v) = parts.heads, parts.sizes.values()
    keys = heads * qk if layers.key == layers.query else 0
    parts.write("query", layers.query, unit_entries(qk, heads))
    parts.write("key", layers.key, unit_entries(qk, heads, start=keys))
    parts.write("value", layers.value, unit_entries(v, heads, start=heads * qk if layers.value == layers.key else 0))
    parts.read()


@register
class Reduced(Resized):
    """PVTv2 and Twins: keys and values of a map that was pooled or convolved before, which a cut leaves alone."""

    name = "reduced"
    modules = {pvt_v2.Attention: PrunedPvtAttention, twins.GlobalSubSampleAttn: PrunedGlobalSubSampleAttn}

    def head_dim(self, module: Any, heads: int) -> int:
        """Return the channels per head."""
        return rows_of(module, "q") // heads

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of two linear layers."""
        parts = self.new(module)
        _write(parts, _Layers("q", "kv", "kv"))
        return parts

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """The places of the smaller map."""
        return int(positions["kv"])

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        if hasattr(module, "head_dim"):
            module.head_dim = qk


@register
class ClassToken(Resized):
    """CaiT, VOLO, CrossViT: the class token alone asks all tokens."""

    name = "class token"
    modules = {
        cait.ClassAttn: PrunedClassAttn,
        volo.ClassAttention: PrunedVoloClassAttention,
        crossvit.CrossAttention: PrunedCrossAttention,
    }

    def head_dim(self, module: Any, heads: int) -> int:
        """Return the channels per head."""
        return rows_of(module, "wq" if hasattr(module, "wq") else "q") // heads

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of two or three linear layers."""
        parts = self.new(module)
        cut: Any = self.modules.get(type(module)) or type(module)
        _write(parts, _Layers(*cut.layers))
        return parts

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        if hasattr(module, "head_dim"):
            module.head_dim = qk


@register
class OwnValues(Resized):
    """TNT: queries and keys of their own width; timm's class holds any sizes."""

    name = "own values"
    modules = {tnt.Attention: None}

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return (heads, qk, v)."""
        heads = int(module.num_heads)
        return heads, rows_of(module, "qk") // (2 * heads), rows_of(module, "v") // heads

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of two linear layers."""
        parts = self.new(module)
        _write(parts, _Layers("qk", "qk", "v"))
        return parts

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes; the scale remains the dense model's."""
        module.head_dim, module.hidden_dim = qk, heads * qk
