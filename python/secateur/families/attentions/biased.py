"""One linear layer for queries, keys and values, and a bias of positions that each head has for its scores."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import TYPE_CHECKING, Any, Optional

import torch
from timm.models import beit, gcvit, swin_transformer, vision_transformer_relpos

from ...anatomy import unit_entries
from ...errors import Unsupported
from ..swin import PrunedWindowAttention
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts

__all__ = ["Beit", "Global", "RelPos", "SwinWindows"]


class PrunedWindowAttentionGlobal(Sized, gcvit.WindowAttentionGlobal):
    """timm's ``WindowAttentionGlobal`` with heads of any sizes; queries from outside keep theirs."""

    def forward(self, x: torch.Tensor, q_global: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        """Attend within windows, (B · windows, N, C)."""
        if self.use_global and q_global is not None:
            qk = self.num_heads * self.qk_dim
            k, v = self.qkv(x).split([qk, self.num_heads * self.v_dim], dim=-1)
            q = self.of_heads(q_global.repeat_interleave(len(x) // len(q_global), dim=0).flatten(1, -2), self.qk_dim)
            k, v = self.of_heads(k, self.qk_dim), self.of_heads(v, self.v_dim)
        else:
            q, k, v = self.split(self.qkv(x))
        return self.project(self.attend(q, k, v, self.rel_pos.get_bias()))


class PrunedRelPosAttention(Sized, vision_transformer_relpos.RelPosAttention):
    """timm's ``RelPosAttention`` with heads of any sizes."""

    if TYPE_CHECKING:
        rel_pos: Any

    def forward(self, x: torch.Tensor, shared_rel_pos: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        """Attend over (B, N, C) with a bias of its own, or else the shared one."""
        q, k, v = self.split(self.qkv(x))
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self.project(self.attend(self.q_norm(q), self.k_norm(k), v, bias))


class PrunedBeitAttention(Sized, beit.Attention):
    """timm's ``Attention`` of BEiT with heads of any sizes."""

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        """Attend over (B, N, C)."""
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.project(self.attend(*self.split(qkv), bias))


@register
class SwinWindows(Resized):
    """SwinTransformer: windows, a table of biases with a column for each head."""

    name = "swin windows"
    modules = {swin_transformer.WindowAttention: PrunedWindowAttention}

    def parts(self, module: Any, call: Call) -> Parts:
        """As in the Swin family."""
        parts = self.new(module)
        parts.fused()
        parts.read()
        parts.of_heads("relative_position_bias_table", 1)
        return parts


@register
class Global(Resized):
    """GCViT: windows whose queries may come from the whole image."""

    name = "global query"
    modules = {gcvit.WindowAttentionGlobal: PrunedWindowAttentionGlobal}
    once = ("rel_pos.",)
    biases = ("rel_pos",)

    def head_dim(self, module: Any, heads: int) -> int:
        """Return the channels per head."""
        return int(module.head_dim)

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of queries are missing where they come from outside."""
        parts = self.new(module)
        heads, (qk, v) = parts.heads, parts.sizes.values()
        if module.use_global and call.given(1, "q_global") is not None:
            parts.refused["qk"] = parts.refused["heads"] = "queries come from another module, for many layers"
            parts.write("value", "qkv", unit_entries(v, heads, start=heads * qk))
            parts.scored = False
        elif module.use_global:
            raise Unsupported("q_global: expected queries of the whole image (use_global), got none")
        else:
            parts.fused()
            parts.bias_module("rel_pos")
        parts.read()
        return parts

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        module.head_dim = qk


@register
class RelPos(Resized):
    """VisionTransformerRelPos: norms of queries and keys, a bias of its own or one shared by layers."""

    name = "relative positions"
    once = ("rel_pos.",)
    modules = {vision_transformer_relpos.RelPosAttention: PrunedRelPosAttention}
    head_norms = ("q_norm", "k_norm")
    biases = ("rel_pos",)

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer, and a column for each head of the bias."""
        parts = self.new(module)
        parts.fused()
        parts.head_norm("query", "q_norm")
        parts.head_norm("key", "k_norm")
        parts.read()
        if module.rel_pos is not None:
            parts.bias_module("rel_pos")
        else:
            self.keep_heads(parts, module, [call.given(1, "shared_rel_pos")])
        return parts

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        module.head_dim = qk


@register
class Beit(Resized):
    """BEiT: biases of queries and values apart from the linear layer, a table of position biases."""

    name = "beit"
    modules = {beit.Attention: PrunedBeitAttention}

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer, its three biases, and a column of the table for each head."""
        parts = self.new(module)
        parts.fused(biases=("q_bias", "k_bias", "v_bias"))
        parts.read()
        if module.relative_position_bias_table is not None:
            parts.of_heads("relative_position_bias_table", 1)
        self.keep_heads(parts, module, [call.given(1, "shared_rel_pos_bias")])
        parts.scored = module.q_bias is None  # timm adds the biases where nothing is seen
        return parts
