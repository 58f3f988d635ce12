"""One linear layer for queries, keys and values, each head by head, and nothing but a bias beside the scores."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import Any, Optional

import numpy as np
import timm.layers
import torch
from timm.models import (
    beit,
    davit,
    fastvit,
    gcvit,
    hiera,
    hieradet_sam2,
    metaformer,
    nest,
    swin_transformer,
    twins,
    vision_transformer_relpos,
    visformer,
    volo,
)
from torch import nn

from ...anatomy import Member, unit_entries
from ...errors import Unsupported
from ..swin import PrunedWindowAttention
from ..vision_transformer.modules import PrunedAttention
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts

__all__ = ["Beit", "Blocks", "Fused", "Global", "Plain", "RelPos", "SwinWindows", "WithQueryPool"]


class OverTokens(Sized):
    """Attention over (B, N, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over (B, N, C)."""
        return self.project(self.attend(*self.split(self.qkv(x))))


class PrunedMetaFormerAttention(OverTokens, metaformer.Attention):
    """timm's ``Attention`` of MetaFormer with heads of any sizes."""


class PrunedDaVitWindowAttention(OverTokens, davit.WindowAttention):
    """timm's ``WindowAttention`` of DaViT with heads of any sizes."""


class PrunedNestAttention(OverTokens, nest.Attention):
    """timm's ``Attention`` of NesT with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within blocks, (B, blocks, N, C)."""
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class PrunedVoloAttention(OverTokens, volo.Attention):
    """timm's ``Attention`` of VOLO with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over all places of (B, H, W, C)."""
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class PrunedFastVitAttention(OverTokens, fastvit.Attention):
    """timm's ``Attention`` of FastViT with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over all places of (B, C, H, W)."""
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class PrunedVisformerAttention(Sized, visformer.Attention):
    """timm's ``Attention`` of Visformer with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over all places of (B, C, H, W)."""
        y = self.attend(*self.split(self.qkv(x).flatten(2).transpose(1, 2)))
        return self.project(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class PrunedLocallyGroupedAttn(Sized, twins.LocallyGroupedAttn):
    """timm's ``LocallyGroupedAttn`` with heads of any sizes."""

    def forward(self, x: torch.Tensor, size: Any) -> torch.Tensor:
        """Attend within windows of (B, N, C), whose tokens are ``size`` (height, width); padded with zeros."""
        (B, N, C), (H, W), side = x.shape, size, self.ws  # noqa: N806
        x = nn.functional.pad(x.view(B, H, W, C), (0, 0, 0, -W % side, 0, -H % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(B, rows, side, columns, side, C).transpose(2, 3).reshape(-1, side * side, C)
        y = self.attend(*self.split(self.qkv(x)))
        y = y.reshape(B, rows, columns, side, side, -1).transpose(2, 3).reshape(B, rows * side, columns * side, -1)
        return self.project(y[:, :H, :W].reshape(B, N, -1))


class PrunedMaskUnitAttention(Sized, hiera.MaskUnitAttention):
    """timm's ``MaskUnitAttention`` with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over (B, N, C), within mask units if asked for; queries may be pooled."""
        B, N, _ = x.shape  # noqa: N806
        units = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        # Tokens are unrolled: those of a unit are ``units`` apart.
        x = x.reshape(B, -1, units, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        q, k, v = self.split(self.qkv(x))
        if self.q_stride > 1:
            q = q.unflatten(2, (self.q_stride, -1)).amax(dim=2)
        y = self.attend(q, k, v)
        y = y.unflatten(0, (B, units)).transpose(1, 2).flatten(1, 2)
        return self.project(y)


class PrunedSam2Attention(Sized, hieradet_sam2.MultiScaleAttention):
    """timm's ``MultiScaleAttention`` of SAM 2 with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over all places of (B, H, W, C); queries may be pooled."""
        B, H, W, _ = x.shape  # noqa: N806
        q, k, v = self.split(self.qkv(x).flatten(1, 2))
        if self.q_pool is not None:
            q = q.transpose(2, 3).reshape(B, -1, H, W)
            q = self.q_pool(q)
            H, W = q.shape[2:]  # noqa: N806
            q = q.reshape(B, self.num_heads, -1, H * W).transpose(2, 3)
        return self.project(self.attend(q, k, v).unflatten(1, (H, W)))


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
class Plain(Resized):
    """timm.layers.Attention: norms of queries and keys, a norm and a gate before the projection."""

    name = "plain"
    modules = {timm.layers.Attention: PrunedAttention}
    head_norms = ("q_norm", "k_norm")

    def parts(self, module: Any, call: Call) -> Parts:
        """As in the VisionTransformer family."""
        del call
        parts = self.new(module)
        parts.fused()
        parts.head_norm("query", "q_norm")
        parts.head_norm("key", "k_norm")
        parts.read()
        parts.inner_norm("norm")
        parts.gate("gate")
        return parts

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        module.head_dim, module.attn_dim = qk, heads * v


@register
class Fused(Resized):
    """Nothing between projection and product, no bias."""

    name = "fused"
    modules = {
        metaformer.Attention: PrunedMetaFormerAttention,
        davit.WindowAttention: PrunedDaVitWindowAttention,
        volo.Attention: PrunedVoloAttention,
        fastvit.Attention: PrunedFastVitAttention,
        visformer.Attention: PrunedVisformerAttention,
        twins.LocallyGroupedAttn: PrunedLocallyGroupedAttn,
    }

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer or convolution."""
        del call
        parts = self.new(module)
        parts.fused()
        parts.read()
        parts.scored = not isinstance(module, twins.LocallyGroupedAttn)  # windows within the module
        return parts

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """All tokens, or those of a window."""
        if isinstance(module, twins.LocallyGroupedAttn):
            return int(module.ws) ** 2
        if isinstance(module, volo.Attention):
            return call.shape[1] * call.shape[2]
        if isinstance(module, (fastvit.Attention, visformer.Attention)):
            return call.shape[2] * call.shape[3]
        return call.shape[-2]

    def queries(self, module: Any, call: Call, positions: Any, parts: Parts) -> int:
        """All tokens, with those that pad windows."""
        return int(positions["qkv" if isinstance(module, twins.LocallyGroupedAttn) else parts.writer])

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        for name, size in (("head_dim", qk), ("attention_dim", heads * v)):
            if hasattr(module, name):
                setattr(module, name, size)


@register
class Blocks(Resized):
    """NesT: blocks of an image, whose values lie channel by channel, with all heads of each, before the projection.

    A cut puts them head by head, since heads may then keep different channels.
    """

    name = "blocks"
    modules = {nest.Attention: PrunedNestAttention}

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer; the projection's columns in timm's order, or in that after a cut."""
        del call
        parts = self.new(module)
        parts.fused()
        heads, v = parts.heads, parts.sizes["v"]
        if type(module) is nest.Attention:
            units = unit_entries(v, heads)
            places = (units - v * np.arange(heads)[:, None, None]) * heads + np.arange(heads)[:, None, None]
            parts.read(entries=places)
            parts.members["v"].append(Member("columns", 0, places, "output", "elementwise"))
            parts.buffers["columns"] = (heads * v,)
        else:
            parts.read()
        parts.scored = False  # blocks within the module
        return parts

    def prepare(self, module: Any, call: Call) -> None:
        """Add the place of each column of the projection if they lay head by head."""
        if type(module) is nest.Attention and not hasattr(module, "columns"):
            order = torch.arange(module.proj.in_features, device=module.proj.weight.device)
            order = order.view(module.num_heads, -1).t().flatten()
            module.register_buffer("columns", order, persistent=False)

    @torch.no_grad()
    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Put the columns of the projection head by head, once."""
        if hasattr(module, "columns"):
            module.proj.weight.copy_(module.proj.weight[:, module.columns.argsort()])
            del module.columns


@register
class SwinWindows(Resized):
    """SwinTransformer: windows, a table of biases with a column for each head."""

    name = "swin windows"
    modules = {swin_transformer.WindowAttention: PrunedWindowAttention}

    def parts(self, module: Any, call: Call) -> Parts:
        """As in the Swin family."""
        del call
        parts = self.new(module)
        parts.fused()
        parts.read()
        parts.of_heads("relative_position_bias_table", 1)
        return parts


@register
class WithQueryPool(Resized):
    """Hiera and SAM 2: queries may be pooled by maxima, channel by channel."""

    name = "query pool"
    modules = {
        hiera.MaskUnitAttention: PrunedMaskUnitAttention,
        hieradet_sam2.MultiScaleAttention: PrunedSam2Attention,
    }

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return (heads, qk, v)."""
        module_heads = module.heads if isinstance(module, hiera.MaskUnitAttention) else module.num_heads
        if hasattr(module, "qk_dim"):
            return module_heads, module.qk_dim, module.v_dim
        dim = self.head_dim(module, module_heads)
        return module_heads, dim, dim

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer."""
        del call
        parts = self.new(module)
        parts.fused()
        parts.read()
        parts.scored = False  # pooled queries, and tokens of windows that are not neighbours, are seen nowhere
        return parts

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """All tokens before pooling, or those of a mask unit."""
        if isinstance(module, hieradet_sam2.MultiScaleAttention):
            return call.shape[1] * call.shape[2]
        return int(module.q_stride * module.window_size) if module.use_mask_unit_attn else call.shape[1]

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        if isinstance(module, hiera.MaskUnitAttention):
            module.heads, module.head_dim = heads, qk


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
