"""Small, odd-sized models of every kind that the ViT family supports."""

from __future__ import annotations

from functools import partial

import timm
import torch
from reference import randomise
from timm.layers import Attention, GluMlp, LayerNorm, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

BASE = {
    "img_size": (12, 15),
    "patch_size": 3,
    "embed_dim": 39,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 1.7,
    "num_classes": 7,
}

KINDS = {
    "plain": {},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "fc_norm": {"global_pool": "avg", "fc_norm": True},
    "max_pool": {"global_pool": "max"},
    "no_pool": {"global_pool": ""},
    "registers_layer_scale": {"reg_tokens": 3, "init_values": 0.1, "no_embed_class": True},
    "rms_norm": {"norm_layer": RmsNorm},
    "norm_pre": {"pre_norm": True},
    "inner_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "inner_rms_norms": {"scale_attn_norm": True, "scale_mlp_norm": True, "norm_layer": RmsNorm},
    "no_qkv_bias": {"qkv_bias": False},
    "no_proj_bias": {"proj_bias": False},
    "patch_norm": {"embed_norm_layer": LayerNorm},
    "identity_head": {"num_classes": 0},
    "no_final_norm": {"final_norm": False, "num_classes": 0},
    "no_final_norm_with_head": {"final_norm": False},
    "qk_norm": {"qk_norm": True},
    "qk_rms_norm": {"qk_norm": True, "norm_layer": RmsNorm},
    "qk_norm_without_scale": {"qk_norm": True, "norm_layer": partial(nn.LayerNorm, elementwise_affine=False)},
    "swiglu_packed": {"mlp_layer": partial(GluMlp, act_layer=nn.SiLU, gate_last=False), "mlp_ratio": 2.0},
    "glu_gate_last": {"mlp_layer": partial(GluMlp, act_layer=nn.Sigmoid), "mlp_ratio": 2.0},
    "swiglu_packed_norm": {
        "mlp_layer": partial(GluMlp, act_layer=nn.SiLU, gate_last=False),
        "mlp_ratio": 2.0,
        "scale_mlp_norm": True,
    },
    "swiglu_split": {"mlp_layer": SwiGLU},
    "activation_not_zero_at_zero": {"act_layer": nn.Sigmoid},
    "map_pool": {"global_pool": "map", "class_token": False},
    "map_pool_prefix": {"global_pool": "map"},
    "no_pos_embed": {"pos_embed": "none"},
    "dynamic_size": {"dynamic_img_size": True},
    "gate": {"gated": True},
    "distilled": {"distilled": True},
    "hybrid": {"hybrid": True},
}
# Not in KINDS: its width cannot be cut.
POST_NORM = {"block_fn": ResPostBlock}


def make(kind, seed=0, **more):
    """A model of this kind with weights that leave no term at zero, in evaluation mode."""
    kwargs = {**BASE, **(POST_NORM if kind == "post_norm" else KINDS[kind]), **more}
    gated, distilled = kwargs.pop("gated", False), kwargs.pop("distilled", False)
    if kwargs.pop("hybrid", False):
        model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=39, num_heads=3, depth=2)
    else:
        model = (VisionTransformerDistilled if distilled else VisionTransformer)(**kwargs)
    if gated:
        for block in model.blocks:
            block.attn = Attention(39, 3, qkv_bias=True, gated=True)
    return randomise(model, seed).eval()


def images(model, batch=2, seed=0):
    """Images in [-1, 1], what timm's inception normalisation gives."""
    generator = torch.Generator().manual_seed(seed)
    height, width = model.patch_embed.img_size
    return torch.rand(batch, model.in_chans, height, width, generator=generator) * 2 - 1
