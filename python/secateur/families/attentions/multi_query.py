"""One head of keys and values for all heads of queries."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from timm.layers import MultiQueryAttention2d

from ...anatomy import Indices
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts

__all__ = ["MultiQuery"]


class PrunedMultiQueryAttention2d(Sized, MultiQueryAttention2d):
    """timm's ``MultiQueryAttention2d`` with heads of any sizes: its fused kernel has a scale of its own."""

    if TYPE_CHECKING:
        query: Any
        key: Any
        value: Any
        output: Any
        query_strides: tuple[int, int]

    def forward(self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        """Attend over all places of (B, C, H, W); ``attn_mask`` is added to the scores."""
        q = self.of_heads(self.query(x).flatten(2).transpose(1, 2), self.qk_dim)
        k, v = (layer(x).flatten(2).transpose(1, 2)[:, None] for layer in (self.key, self.value))
        k, v = k.expand(-1, self.num_heads, -1, -1), v.expand(-1, self.num_heads, -1, -1)
        size = [side // stride for side, stride in zip(x.shape[2:], self.query_strides, strict=True)]
        out: torch.Tensor = self.output(self.attend(q, k, v, attn_mask).transpose(1, 2).unflatten(2, size))
        return out


@register
class MultiQuery(Resized):
    """MobileNetV4: all heads keep the same channels, those of the keys and values that they share."""

    name = "multi query"
    modules = {MultiQueryAttention2d: PrunedMultiQueryAttention2d}

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return (heads of queries, qk, v)."""
        return int(module.num_heads), int(module.key_dim), int(module.value_dim)

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one convolution for all heads, of one for keys and of one for values."""
        parts = self.new(module)
        heads, (qk, v) = parts.heads, parts.sizes.values()
        parts.write("query", "query.proj", _in_all_heads(qk, heads))
        parts.write("key", "key.proj", _in_all_heads(qk, 1))
        parts.write("value", "value.proj", _in_all_heads(v, 1))
        parts.read("output.proj", _in_all_heads(v, heads))
        parts.tied, parts.scored = {"qk", "v"}, False  # a head of keys meets several of queries
        parts.refused["heads"] = "all heads read the same keys and values, channel by channel"
        return parts

    def queries(self, module: Any, call: Call, positions: Any, parts: Parts) -> int:
        """The places of the pooled map, before it is made larger again."""
        return int(positions["query.proj"])

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """The places of the smaller map."""
        return int(positions["key.proj"])

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        module.key_dim, module.value_dim = qk, v


def _in_all_heads(size: int, heads: int) -> Indices:
    """Where each unit is in all heads, (1, size, heads)."""
    return (np.arange(size)[:, None] + size * np.arange(heads)).astype(np.int64)[None]
