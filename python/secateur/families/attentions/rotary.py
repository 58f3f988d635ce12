"""Queries and keys that are rotated by their position: two channels that rotate together are one unit."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import timm.layers
import torch
from timm.layers import apply_rot_embed_cat
from timm.models import eva
from torch.nn import functional as F  # noqa: N812

from ...anatomy import Indices, Member, unit_entries
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts

__all__ = ["Rotary"]

_FUSED_BIASES = ("q_bias", "k_bias", "v_bias")


class _Rotating(Sized):
    """Attention over (B, N, C) after a rotation of queries and keys."""

    if TYPE_CHECKING:
        num_prefix_tokens: int
        q_norm: Any
        k_norm: Any
        norm: Any
        gate: Any
        rope_channels: Any
        q_proj: Any
        k_proj: Any
        v_proj: Any

    def forward(
        self,
        x: torch.Tensor,
        rope: Optional[torch.Tensor] = None,  # noqa: UP045
        attn_mask: Optional[torch.Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend over (B, N, C); arguments as in timm's class."""
        shared_by = self.num_heads // getattr(self, "num_kv_heads", self.num_heads)
        if self.qkv is not None:
            bias = getattr(self, "q_bias", None)
            if bias is not None:
                bias = torch.cat([getattr(self, name) for name in _FUSED_BIASES])
                q, k, v = self.split(F.linear(x, self.qkv.weight, bias))
            else:
                q, k, v = self.split(self.qkv(x))
        else:
            q = self.of_heads(self.q_proj(x), self.qk_dim)
            k, v = self.of_heads(self.k_proj(x), self.qk_dim), self.of_heads(self.v_proj(x), self.v_dim)
        if shared_by > 1:
            # The heads that share keys keep the same channels, so they share the norm's.
            q = self.q_norm(q.unflatten(1, (-1, shared_by)).flatten(2, 3)).view_as(q)
        else:
            q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            rope = self.of_channels(rope)
            k = self.rotated(k, rope).type_as(v)
            if shared_by > 1 and rope.ndim > 2 and rope.shape[-3] > 1:
                rope = rope.repeat_interleave(shared_by, dim=-3)
            q = self.rotated(q, rope).type_as(v)
        if shared_by > 1:
            k, v = k.repeat_interleave(shared_by, dim=1), v.repeat_interleave(shared_by, dim=1)
        y = self.norm(self.attend(q, k, v, attn_mask, is_causal))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.project(y)

    def rotated(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Rotate the channels of (B, heads, N, qk_dim), except those of prefix tokens."""
        prefix = self.num_prefix_tokens
        half = getattr(self, "rotate_half", False)
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)

    def of_channels(self, rope: torch.Tensor) -> torch.Tensor:
        """Return the sines and cosines of each head's own channels, (…, heads, N, 2 qk_dim)."""
        if rope.shape[-1] == 2 * self.qk_dim:
            return rope
        rope = rope if rope.ndim > 2 else rope[None]
        index = self.rope_channels.view([1] * (rope.ndim - 3) + [-1, 1, self.qk_dim])
        sines, cosines = rope.chunk(2, dim=-1)
        return torch.cat([torch.take_along_dim(each, index, dim=-1) for each in (sines, cosines)], dim=-1)


class PrunedEvaAttention(_Rotating, eva.EvaAttention):
    """timm's ``EvaAttention`` with heads of any sizes; ``rope_channels`` are those that each head has kept."""


class PrunedAttentionRope(_Rotating, timm.layers.AttentionRope):
    """timm's ``AttentionRope`` with heads of any sizes; ``rope_channels`` are those that each head has kept."""


@register
class Rotary(Resized):
    """EVA, DINOv3, PE: rotary embeddings, norms, a gate; heads may share their keys and values.

    Where the model gives a rotary embedding, a unit of kind "qk" is a pair of channels. Query heads that share keys and
    values are one unit of kind "heads".
    """

    name = "rotary"
    modules = {eva.EvaAttention: PrunedEvaAttention, timm.layers.AttentionRope: PrunedAttentionRope}
    head_norms = ("q_norm", "k_norm")

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return (heads with keys of their own, qk, v), in channels."""
        heads = int(getattr(module, "num_kv_heads", module.num_heads))
        if hasattr(module, "qk_dim"):
            return heads, module.qk_dim, module.v_dim
        return heads, module.head_dim, module.head_dim

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer or of three."""
        heads, qk, v = self.sizes(module)
        rope = call.given(1, "rope")
        channels = 1 if rope is None else 2
        parts = Parts(module, heads, qk // channels, v, scale=float(module.scale))
        parts.channels, parts.shared_by = channels, module.num_heads // heads
        pairs = _pairs(qk, heads, channels, half=getattr(module, "rotate_half", False))
        values, shared = unit_entries(v, heads), parts.shared_by
        queries, outputs = _repeated(pairs, qk, shared), _repeated(values, v, shared)
        if module.qkv is not None:
            biases = _FUSED_BIASES if getattr(module, "q_bias", None) is not None else (None, None, None)
            parts.write("query", "qkv", pairs, biases[0])
            parts.write("key", "qkv", pairs + heads * qk, biases[1])
            parts.write("value", "qkv", values + 2 * heads * qk, biases[2])
            parts.scored = biases[0] is None  # timm adds the biases where nothing is seen
        else:
            parts.write("query", "q_proj", queries)
            parts.write("key", "k_proj", pairs)
            parts.write("value", "v_proj", values)
        parts.head_norm("query", "q_norm", pairs)
        parts.head_norm("key", "k_norm", pairs)
        parts.read("proj", outputs)
        parts.inner_norm("norm", outputs)
        parts.gate("gate", outputs)
        if rope is not None:
            parts.members["qk"].append(Member("rope_channels", 0, pairs, "query", "elementwise"))
            parts.buffers["rope_channels"] = (heads * qk,)
            self.keep_heads(parts, module, [rope])
        # What meets is rotated, where nothing is seen; and a head of keys meets several of queries.
        parts.scored = parts.scored and rope is None and shared == 1
        return parts

    def prepare(self, module: Any, call: Call) -> None:
        """Add the numbers of the channels that each head has kept."""
        if call.given(1, "rope") is not None and not hasattr(module, "rope_channels"):
            heads, qk, _ = self.sizes(module)
            index = torch.arange(qk, device=module.proj.weight.device).repeat(heads)
            module.register_buffer("rope_channels", index, persistent=False)

    def fit(self, module: Any, sizes: Mapping[str, int]) -> None:
        """Set the sizes of the module and its class."""
        if "qk" in sizes and hasattr(module, "rope_channels"):
            sizes = {**sizes, "qk": 2 * sizes["qk"]}
        shared = module.num_heads // self.sizes(module)[0]
        heads = sizes.get("heads", module.num_heads // shared)
        super().fit(module, sizes)
        module.num_heads = heads * shared
        for name, value in (("num_kv_heads", heads), ("attn_dim", heads * shared * module.v_dim)):
            if hasattr(module, name):
                setattr(module, name, value)
        if hasattr(module, "kv_dim"):
            module.kv_dim = heads * module.v_dim
        if hasattr(module, "rope_channels"):  # now that they are not all, a file has to say which
            module.register_buffer("rope_channels", module.rope_channels)

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        module.head_dim = qk


def _pairs(size: int, heads: int, channels: int, *, half: bool) -> Indices:
    """Where the units of each head are among its channels, (heads, units, channels of a unit)."""
    if channels == 1:
        return unit_entries(size, heads)
    of_head = np.arange(size, dtype=np.int64).reshape((2, -1) if half else (-1, 2))
    return (of_head.T if half else of_head)[None] + size * np.arange(heads, dtype=np.int64)[:, None, None]


def _repeated(entries: Indices, size: int, times: int) -> Indices:
    """Where the units of heads are if ``times`` heads in a row have the same, (heads, units, times · channels)."""
    heads = len(entries)
    within = entries - size * np.arange(heads, dtype=np.int64)[:, None, None]
    starts = size * np.arange(heads * times, dtype=np.int64).reshape(heads, 1, times, 1)
    found: Indices = (starts + within[:, :, None, :]).reshape(heads, entries.shape[1], -1)
    return found
