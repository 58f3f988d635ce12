"""Queries and keys that meet with length one, and heads that are mixed: by themselves no plain products."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

import math
from typing import TYPE_CHECKING, Any, Optional

import torch
from timm.models import cait, swin_transformer_v2
from torch.nn import functional as F  # noqa: N812

from ...anatomy import unit_entries
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts

__all__ = ["Cosine", "Talking"]


class PrunedWindowAttentionV2(Sized, swin_transformer_v2.WindowAttention):
    """timm's ``WindowAttention`` of Swin V2 with heads of any sizes."""

    if TYPE_CHECKING:
        cpb_mlp: Any
        relative_position_index: Any

    def forward(self, x: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:  # noqa: UP045
        """Attend within windows, (B · windows, N, C); ``mask`` (windows, N, N) as in timm's ``WindowAttention``."""
        tokens = x.shape[1]
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        q, k, v = self.split(F.linear(x, self.qkv.weight, bias))
        scale = torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        table = table[self.relative_position_index.view(-1)].view(tokens, tokens, self.num_heads).permute(2, 0, 1)
        scores = 16 * torch.sigmoid(table)[None]
        if mask is not None:
            scores = scores.expand(len(mask), -1, -1, -1) + mask[:, None]
            scores = scores.repeat(len(x) // len(mask), 1, 1, 1)
        return self.project(self.attend(F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v, scores, scale=1.0))


class PrunedTalkingHeadAttn(Sized, cait.TalkingHeadAttn):
    """timm's ``TalkingHeadAttn`` with qk_dim query/key and v_dim value channels per head."""

    if TYPE_CHECKING:
        proj_l: Any
        proj_w: Any
        attn_drop: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over (B, N, C)."""
        q, k, v = self.split(self.qkv(x))
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        attn = self.attn_drop(self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.project((attn @ v).transpose(1, 2).flatten(2))


@register
class Cosine(Resized):
    """Swin V2: directions of queries and keys, a temperature for each head, biases from a small network.

    Directions are taken over the channels that are there.
    """

    name = "cosine windows"
    modules = {swin_transformer_v2.WindowAttention: PrunedWindowAttentionV2}
    once = ("cpb_mlp.",)

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer, its three biases, and a temperature and a row of the network for each head."""
        parts = self.new(module)
        parts.fused(biases=("q_bias", "k_bias", "v_bias"))
        parts.read()
        parts.of_heads("logit_scale", 0)
        parts.rows("cpb_mlp.2", parts.members["heads"], "elementwise", "bias_table", unit_entries(parts.heads))
        parts.normalised("query")
        parts.normalised("key")
        parts.scored = module.q_bias is None  # timm adds the biases where nothing is seen
        return parts


@register
class Talking(Resized):
    """CaiT: linear layers mix the scores of all heads, before and after the softmax."""

    name = "talking heads"
    modules = {cait.TalkingHeadAttn: PrunedTalkingHeadAttn}

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer."""
        parts = self.new(module)
        parts.fused()
        parts.read()
        parts.refused["heads"] = "proj_l and proj_w mix the scores of all heads"
        parts.fixed["value"] = "proj_w: the weights of a query do not sum to one, so that no bias can replace a value"
        return parts
