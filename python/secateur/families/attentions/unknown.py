"""Attention classes of timm without an entry, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

import timm.layers
from timm.models import (
    coat,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    gemma4_vit,
    levit,
    mobilevit,
    mvitv2,
    nextvit,
    swiftformer,
    swin_transformer_v2_cr,
    vision_transformer_sam,
    volo,
)
from torch import nn

from .base import attention_entry

__all__ = ["attention_refused"]

_LINEAR = "its attention is linear, without scores of two tokens, which no entry describes yet"
_NOT_YET = "no entry of the attention table describes it yet"
_REASONS: Mapping[type[nn.Module], str] = {
    volo.OutlookAttention: "its weights come from one linear layer, without queries and keys",
    timm.layers.DiffAttention: "the difference of two softmaxes ties two heads of queries and keys to one of values",
    coat.FactorAttnConvRelPosEnc: "convolutions of values multiply queries, channel by channel",
    efficientvit_mit.LiteMLA: _LINEAR,
    mobilevit.LinearSelfAttention: _LINEAR,
    swiftformer.EfficientAdditiveAttention: _LINEAR,
    efficientvit_msra.CascadedGroupAttention: "each head reads what the head before it wrote",
    efficientformer_v2.Attention2d: "talking heads and a convolution of values, which no entry describes yet",
    efficientformer_v2.Attention2dDownsample: "a convolution of values, which no entry describes yet",
    gemma4_vit.Gemma4Attention: _NOT_YET,
    levit.AttentionDownsample: _NOT_YET,
    mvitv2.MultiScaleAttentionPoolFirst: _NOT_YET,
    nextvit.EfficientAttention: _NOT_YET,
    swin_transformer_v2_cr.WindowMultiHeadAttention: _NOT_YET,
    vision_transformer_sam.Attention: _NOT_YET,
}


def attention_refused(module: nn.Module) -> str | None:
    """Return why the heads of an attention module cannot be cut, in one sentence; None where an entry describes it.

    Raises:
        InvalidArgument: not an nn.Module.
    """
    if attention_entry(module) is not None:
        return None
    name = type(module).__name__
    return f"{name}: {_REASONS.get(type(module), 'expected a class of the attention table by exact class')}"
