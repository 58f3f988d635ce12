"""One layer that writes queries, keys and values head by head: each head with all three."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import TYPE_CHECKING, Any, Optional

import torch
from timm.models import efficientformer, levit, maxxvit, tiny_vit

from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts

__all__ = ["MaxxVit", "OfPlaces"]


class _WithRelPos(Sized):
    """What the two classes of MaxxVit share."""

    if TYPE_CHECKING:
        head_first: bool
        rel_pos: Any

    def attended(self, qkv: torch.Tensor, shared: Optional[torch.Tensor]) -> torch.Tensor:  # noqa: UP045
        """Attend over (B, N, heads · (2 qk_dim + v_dim)), with a bias of its own or else the shared one."""
        q, k, v = self.split_by_head(qkv) if self.head_first else self.split(qkv)
        return self.attend(q, k, v, shared if self.rel_pos is None else self.rel_pos.get_bias())


class PrunedAttentionCl(_WithRelPos, maxxvit.AttentionCl):
    """timm's ``AttentionCl`` with heads of any sizes."""

    def forward(self, x: torch.Tensor, shared_rel_pos: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        """Attend over all places of (B, …, C)."""
        y = self.attended(self.qkv(x).flatten(1, -2), shared_rel_pos)
        return self.project(y.reshape(x.shape[:-1] + y.shape[-1:]))


class PrunedAttention2d(_WithRelPos, maxxvit.Attention2d):
    """timm's ``Attention2d`` of MaxxVit with heads of any sizes."""

    def forward(self, x: torch.Tensor, shared_rel_pos: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        """Attend over all places of (B, C, H, W)."""
        y = self.attended(self.qkv(x).flatten(2).transpose(1, 2), shared_rel_pos)
        return self.project(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class PrunedTinyVitAttention(Sized, tiny_vit.Attention):
    """timm's ``Attention`` of TinyViT with heads of any sizes: its fused kernel has a scale of its own."""

    if TYPE_CHECKING:
        norm: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over (B, N, C)."""
        bias = self.get_attention_biases(x.device)
        return self.project(self.attend(*self.split_by_head(self.qkv(self.norm(x))), bias))


@register
class MaxxVit(Resized):
    """MaxViT and CoAtNet: windows, grids or whole maps, with relative positions."""

    name = "maxxvit"
    modules = {maxxvit.AttentionCl: PrunedAttentionCl, maxxvit.Attention2d: PrunedAttention2d}
    biases = ("rel_pos",)
    once = ("rel_pos.",)

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one layer, and what the relative positions have per head."""
        parts = self.new(module)
        if module.head_first:
            parts.by_head("qkv")
        else:
            parts.fused()
        parts.read()
        if module.rel_pos is not None:
            parts.bias_module("rel_pos")
        else:
            self.keep_heads(parts, module, [call.given(1, "shared_rel_pos")])
        return parts

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """All places of a window or a map."""
        return int(positions["qkv"]) * call.images // call.shape[0]

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        module.dim_head = qk


@register
class OfPlaces(Resized):
    """EfficientFormer, TinyViT, LeViT: each head has a bias for each distance; values may be wider than queries."""

    name = "of places"
    modules = {
        efficientformer.Attention: None,
        levit.Attention: None,
        tiny_vit.Attention: PrunedTinyVitAttention,
    }

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return (heads, qk, v)."""
        return int(module.num_heads), int(module.key_dim), int(module.val_dim)

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one layer, with a batch norm in LeViT, and a row of biases for each head."""
        parts = self.new(module)
        if isinstance(module, levit.Attention):
            parts.by_head("qkv.linear")
            parts.by_head_norm("qkv.bn")
            parts.read("proj.ln.linear")
            parts.fixed["value"] = parts.fixed["output"] = "proj.act: an activation is before the projection"
            parts.scored = False  # what meets is behind a batch norm
        else:
            parts.by_head("qkv")
            parts.read()
        parts.of_heads("attention_biases", 0)
        return parts

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """All places."""
        return int(module.attention_bias_idxs.shape[-1])

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes; the scale remains the dense model's."""
        module.key_dim, module.val_dim, module.key_attn_dim, module.val_attn_dim = qk, v, heads * qk, heads * v
        if hasattr(module, "out_dim"):
            module.out_dim = heads * v
        module.attention_bias_cache = {}
