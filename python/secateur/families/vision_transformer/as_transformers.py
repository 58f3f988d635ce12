"""A vision transformer as transformers describes it: the fields of ViTConfig, and the names of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm.layers
from timm.layers import Attention, LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...errors import Unsupported
from .alike import Sizes

__all__ = ["config_for_transformers", "refuse_for_transformers", "weights_for_transformers"]

_NORMS = (nn.LayerNorm, LayerNorm)
_ACTIVATIONS: Mapping[type[nn.Module], str] = {
    timm.layers.GELU: "gelu",
    timm.layers.GELUTanh: "gelu_pytorch_tanh",
    timm.layers.QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
_GELU = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
# Parameters of a block, by their names in both.
_OF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def refuse_for_transformers(plain: Any) -> None:
    """Refuse what the class lacks.

    Raises:
        Unsupported: there is some; the text names the first.
    """
    if type(plain) is not VisionTransformer:
        raise _unlike("model", "VisionTransformer", type(plain).__name__)
    for name, there in (("cls_token", True), ("pos_embed", True), ("reg_token", False), ("attn_pool", False)):
        if (getattr(plain, name, None) is not None) != there:
            raise _unlike(name, *(("one", "none") if there else ("none", "one")))
    if plain.no_embed_class:
        raise _unlike("pos_embed", "one that includes the class token", "one without")
    if plain.global_pool != "token":
        raise _unlike("global_pool", "'token'", repr(plain.global_pool))
    classes: dict[str, tuple[type[nn.Module], ...]] = {
        "patch_embed": (PatchEmbed,),
        "patch_embed.proj": (nn.Conv2d,),
        "patch_embed.norm": (nn.Identity,),
        "norm_pre": (nn.Identity,),
    }
    for index in range(len(plain.blocks)):
        name = f"blocks.{index}"
        classes |= {name: (Block,), f"{name}.attn": (Attention,), f"{name}.mlp": (Mlp,)}
        classes |= {f"{name}.{child}": _NORMS for child in ("norm1", "norm2")}
        without = ("ls1", "ls2", "attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm")
        classes |= {f"{name}.{child}": (nn.Identity,) for child in without}
    classes |= {"norm": _NORMS, "fc_norm": (nn.Identity,), "head": (nn.Linear,)}
    for name, allowed in classes.items():
        found = plain.get_submodule(name)
        if type(found) not in allowed:
            raise _unlike(name, allowed[0].__name__, type(found).__name__)
    first: Any = plain.blocks[0]
    module: Any
    for name, module in plain.named_modules():
        if name.endswith("attn") and module.gate is not None:
            raise _unlike(f"{name}.gate", "none", "one")
        if type(module) in _NORMS and module.weight is None:
            raise _unlike(name, "a norm with a scale and a shift", "one without")
        if type(module) in _NORMS and module.eps != first.norm1.eps:
            raise _unlike(f"{name}.eps", f"{first.norm1.eps:g}, as in blocks.0.norm1", f"{module.eps:g}")
        if name.endswith("mlp.act") and _activation(name, module) != _activation("", first.mlp.act):
            raise _unlike(name, "the activation of blocks.0", type(module).__name__)
        biased = first.attn.qkv.bias is not None if name.endswith("qkv") else True
        if hasattr(module, "bias") and (module.bias is not None) != biased:
            raise _unlike(f"{name}.bias", *(("one", "none") if biased else ("none", "one")))


def _unlike(name: str, expected: str, got: str) -> Unsupported:
    return Unsupported(f"{name}: expected {expected} for transformers' ViT, got {got}")


def _activation(name: str, module: Any) -> str:
    kind = _GELU.get(module.approximate) if type(module) is nn.GELU else _ACTIVATIONS.get(type(module))
    if kind is None:
        raise _unlike(name, "GELU, GELUTanh, QuickGELU, ReLU or SiLU", type(module).__name__)
    return kind


def config_for_transformers(plain: Any, sizes: Sizes) -> dict[str, Any]:
    """Return the fields of ViTConfig."""
    block, embed = plain.blocks[0], plain.patch_embed
    return {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        # No field of ViTConfig's; its attention reads it where it is there.
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.hidden,
        "hidden_act": _activation("blocks.0.mlp.act", block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
        "image_size": _one(embed.img_size),
        "patch_size": _one(embed.proj.kernel_size),
        "num_channels": embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "num_labels": plain.head.out_features,
    }


def _one(sides: Any) -> int | list[int]:
    height, width = map(int, sides)
    return height if height == width else [height, width]


def weights_for_transformers(plain: Any) -> dict[str, Tensor]:
    """Return the weights by their names in transformers."""
    state: dict[str, Tensor] = plain.state_dict()
    kinds = ("weight", "bias")
    found = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    pairs = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    for index in range(len(plain.blocks)):
        ours, theirs = f"blocks.{index}", f"vit.layers.{index}"
        pairs |= {f"{ours}.{mine}": f"{theirs}.{name}" for mine, name in _OF_BLOCK.items()}
        for kind in kinds:
            if (rows := state.get(f"{ours}.attn.qkv.{kind}")) is not None:
                for part, tensor in zip("qkv", rows.chunk(3), strict=True):
                    found[f"{theirs}.attention.{part}_proj.{kind}"] = tensor
    return found | {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in pairs.items() for kind in kinds}
