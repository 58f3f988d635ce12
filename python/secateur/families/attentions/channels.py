"""Attention between channels: the map is (channels, channels), and the softmax is over channels, not tokens.

A row of the map makes one output channel. So a unit of kind "v" is a row: the layer's rows that make it, and the
projection's column that reads it. A column of the map is one term of a softmax: without it all weights change, and no
masked module computes the same. So columns stay.
"""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from timm.models import davit, edgenext, xcit
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ...anatomy import Part, unit_entries
from .base import Call, register
from .forward import Resized
from .parts import Parts, UnitKind

__all__ = ["Channels"]

_PARTS: tuple[Part, ...] = ("query", "key", "value")
_COLUMNS = "keys and values are terms of a softmax over channels: without one, all weights change"


class _OfChannels(nn.Module):
    """``num_heads`` maps of v_dim rows and qk_dim columns; ``qkv`` writes three parts, the one of the rows shorter."""

    qk_dim: int
    v_dim: int

    if TYPE_CHECKING:
        num_heads: int
        qkv: Any
        proj: Any

    def maps(self, x: torch.Tensor, rows: int) -> list[torch.Tensor]:
        """Return the three parts of ``qkv``, (B, heads, channels, N) each; ``rows`` says which is shorter."""
        sizes = [self.num_heads * (self.v_dim if part == rows else self.qk_dim) for part in range(3)]
        parts = self.qkv(x).transpose(1, 2).split(sizes, dim=1)
        return [part.unflatten(1, (self.num_heads, -1)) for part in parts]

    def projected(self, y: torch.Tensor) -> torch.Tensor:
        """Project (B, heads, v_dim, N)."""
        out: torch.Tensor = self.proj(y.flatten(1, 2).transpose(1, 2))
        return out


class _CrossCovariance(_OfChannels):
    if TYPE_CHECKING:
        temperature: Any
        attn_drop: Any
        proj_drop: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over the channels of (B, N, C)."""
        q, k, v = self.maps(x, rows=0)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        attn = attn.softmax(dim=-1)
        if not getattr(self, "fused_attn", False):  # timm's fused kernel drops no weights here
            attn = self.attn_drop(attn)
        out: torch.Tensor = self.proj_drop(self.projected(attn @ v))
        return out


class PrunedXCA(_CrossCovariance, xcit.XCA):
    """timm's ``XCA`` with maps of any number of rows."""


class PrunedCrossCovarianceAttn(_CrossCovariance, edgenext.CrossCovarianceAttn):
    """timm's ``CrossCovarianceAttn`` with maps of any number of rows."""


class PrunedChannelAttention(_OfChannels, davit.ChannelAttention):
    """timm's ``ChannelAttention`` with maps of any number of rows, which are its keys."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over the channels of (B, N, C)."""
        q, k, v = self.maps(x, rows=1)
        attn = (k * self.scale) @ v.transpose(-2, -1)
        return self.projected(attn.softmax(dim=-1) @ q)


class PrunedChannelAttentionV2(_OfChannels, davit.ChannelAttentionV2):
    """timm's ``ChannelAttentionV2`` with maps of any number of rows; its scale is the dense model's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over the channels of (B, N, C)."""
        q, k, v = self.maps(x, rows=0)
        # The columns are those of the dense model.
        scale = (x.shape[1] if self.dynamic_scale else self.qk_dim) ** -0.5
        return self.projected(((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v)


@register
class Channels(Resized):
    """XCiT, EdgeNeXt, DaViT: cross-covariance and channel attention, whose maps lose rows."""

    name = "channels"
    modules = {
        xcit.XCA: PrunedXCA,
        edgenext.CrossCovarianceAttn: PrunedCrossCovarianceAttn,
        davit.ChannelAttention: PrunedChannelAttention,
        davit.ChannelAttentionV2: PrunedChannelAttentionV2,
    }

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return (heads, columns, rows)."""
        heads = int(module.groups if isinstance(module, davit.ChannelAttentionV2) else module.num_heads)
        if hasattr(module, "qk_dim"):
            return heads, module.qk_dim, module.v_dim
        return heads, self.head_dim(module, heads), self.head_dim(module, heads)

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of the part that makes the rows of the map, and the projection's columns."""
        parts = self.new(module)
        heads, columns, rows = self.sizes(module)
        makes: Part = "key" if isinstance(module, davit.ChannelAttention) else "query"
        parts.refused["qk"] = _COLUMNS
        start = 0
        for part in _PARTS:
            kind: UnitKind = "v" if part == makes else "qk"
            units = unit_entries(rows if kind == "v" else columns, heads, start=start)
            parts.rows("qkv", parts.members[kind], "writer", part, units)
            start += units.size
        parts.read()
        if hasattr(module, "temperature"):
            parts.of_heads("temperature", 0)
        parts.in_place_of["qk"], parts.scored = "v", False
        return parts

    def fit(self, module: Any, sizes: Mapping[str, int]) -> None:
        """Set the sizes of the module and its class."""
        columns = (len(module.qkv.weight) // sizes["heads"] - sizes["v"]) // 2
        super().fit(module, {**sizes, "qk": columns})

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """The columns of the map, which every place of the input contributes to."""
        return self.sizes(module)[1]

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        if isinstance(module, davit.ChannelAttentionV2):
            module.groups = heads
