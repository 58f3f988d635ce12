"""One linear layer for queries, keys and values, each head by head, and nothing but a bias beside the scores."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import Any

import numpy as np
import timm.layers
import torch
from timm.models import (
    davit,
    fastvit,
    hiera,
    hieradet_sam2,
    metaformer,
    nest,
    twins,
    visformer,
    volo,
)
from torch import nn

from ...anatomy import Member, unit_entries
from ..vision_transformer.modules import PrunedAttention
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts

__all__ = ["Blocks", "Fused", "Plain", "WithQueryPool"]


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
        y: torch.Tensor = super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y


class PrunedVoloAttention(OverTokens, volo.Attention):
    """timm's ``Attention`` of VOLO with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over all places of (B, H, W, C)."""
        y: torch.Tensor = super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return y


class PrunedFastVitAttention(OverTokens, fastvit.Attention):
    """timm's ``Attention`` of FastViT with heads of any sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over all places of (B, C, H, W)."""
        y: torch.Tensor = super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return y


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


@register
class Plain(Resized):
    """timm.layers.Attention: norms of queries and keys, a norm and a gate before the projection."""

    name = "plain"
    modules = {timm.layers.Attention: PrunedAttention}
    head_norms = ("q_norm", "k_norm")

    def parts(self, module: Any, call: Call) -> Parts:
        """As in the VisionTransformer family."""
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
