"""Makes a VisionTransformer's modules fit parameters that were cut, in the exact and in the stock layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import Attention, AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from ...anatomy import Anatomy, LastBlock, Layer
from ...errors import Unsupported
from ..absent import Absent, is_absent
from ..base import NORMS, fit_modules, unsupported
from .counts import is_pooled, why_not_pooled
from .modules import HeadNorm, PrunedAttention, PrunedAttentionPoolLatent, PrunedBlock, PrunedResPostBlock
from .norms import FP32_NORMS, is_there
from .reduced import (
    MergingBlock,
    MergingResPostBlock,
    ReducedVisionTransformer,
    ReducedVisionTransformerDistilled,
    merges,
)

__all__ = ["adapt", "make_stock", "merges_at", "set_last_block", "stock_sizes"]


def adapt(model: VisionTransformer, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Make modules and attributes fit parameters that were just cut."""
    for group in anatomy.groups:
        if group.traits.whole and sizes[group.name] == 0:
            _drop_layer(model, group.name)
    for layer in anatomy.attention:
        if sizes[layer.name]:
            _fit_attention(model.get_submodule(layer.name), anatomy, layer, sizes)
    _fit_layers(model)
    if "width" in sizes and sizes["width"] != model.embed_dim:
        _fit_width(model, sizes["width"])
    _fit_classes(model, is_pooled(model), merges_at(anatomy, sizes))


def merges_at(anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[int, int]:
    """Return how many tokens each block merges when its group of tokens has a size; other blocks as now."""
    merged = {}
    for name, tokens in anatomy.tokens.items():
        block = anatomy.group(name).block
        assert block is not None
        merged[block] = tokens.merges[-1].units - sizes.get(name, anatomy.sizes[name])
    return merged


def set_last_block(model: VisionTransformer, last_block: LastBlock, strict: bool) -> None:
    """Make the last block compute prefix tokens only, or all.

    Raises:
        Unsupported: the output depends on all tokens; or, if not strict, the model has no blocks.
    """
    reason = why_not_pooled(model) if strict or len(model.blocks) == 0 else None
    if last_block == "pooled" and reason is not None:
        raise Unsupported(f"last_block: expected 'whole' for this model ({reason}), got 'pooled'")
    _fit_classes(model, last_block == "pooled", dict(enumerate(merges(model))))


def _fit_classes(model: Any, pooled: bool, merged: Mapping[int, int]) -> None:
    """Give the model and its blocks the classes that run its tokens, as the same objects."""
    merging = False
    block: Any
    for index, block in enumerate(model.blocks):
        post_norm = isinstance(block, ResPostBlock)
        vars(block).pop("pooled", None)
        vars(block).pop("merge", None)
        merge = 0 if is_absent(block.attn) else merged.get(index, 0)
        merging = merging or merge > 0
        if pooled and index == len(model.blocks) - 1:
            block.pooled = True
        if merging:
            block.__class__ = MergingResPostBlock if post_norm else MergingBlock
            block.merge = merge
        elif hasattr(block, "pooled") or is_absent(block.attn) or is_absent(block.mlp):
            block.__class__ = PrunedResPostBlock if post_norm else PrunedBlock
        else:
            block.__class__ = ResPostBlock if post_norm else Block
    distilled = isinstance(model, VisionTransformerDistilled)
    vars(model).pop("merging", None)
    if merging or pooled:
        model.__class__ = ReducedVisionTransformerDistilled if distilled else ReducedVisionTransformer
        model.merging = merging
    else:
        model.__class__ = VisionTransformerDistilled if distilled else VisionTransformer


def stock_sizes(model: VisionTransformer, anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes after a cut to ``sizes`` with timm's own attention modules: one size per head in a layer.

    Raises:
        Unsupported: padding would change what a norm computes, or timm's pool cannot hold the cut width.
    """
    padded = dict(sizes)
    for layer in anatomy.attention:
        if not sizes[layer.name]:
            continue
        qk, v = sizes[layer.groups["qk"]], sizes[layer.groups["v"]]
        size = padded[layer.groups["qk"]] = padded[layer.groups["v"]] = max(qk, v)
        attn: Any = model.get_submodule(layer.name)
        for name in layer.norms.values():
            # The norm would undo a change of the softmax scale, and cut channels have a scale of their own per head.
            if qk < size or size**-0.5 != layer.softmax_scale or type(model.get_submodule(name)) is HeadNorm:
                raise Unsupported(
                    f"{name}: expected whole queries and keys for the stock layout, whose norm is one for all heads "
                    f"and counts zeros, got {qk} channels per head padded to {size}; use layout='exact'"
                )
        if is_there(attn.norm) and v < size:
            raise Unsupported(
                f"{layer.name}.norm: expected as many values as queries for the stock layout, whose norm would count "
                f"zeros, got {v} values per head padded to {size}; use layout='exact'"
            )
    pool: Any = model.attn_pool
    width = sizes.get("width", model.embed_dim)
    if pool is not None and width != pool.num_heads * pool.head_dim:
        raise Unsupported(
            f"attn_pool: expected a width of {pool.num_heads * pool.head_dim} for the stock layout, because timm's "
            f"{AttentionPoolLatent.__name__} takes it for that of its heads, got {width}; use layout='exact'"
        )
    return padded


def make_stock(model: VisionTransformer, head_dims: Mapping[str, int]) -> None:
    """Make the attention modules timm's own, as the same objects; parameters already have the given size per head.

    Raises:
        Unsupported: query/key norms that timm's class does not have.
    """
    for name in head_dims:
        for norm in ("q_norm", "k_norm"):
            found = model.get_submodule(f"{name}.{norm}")
            if type(found) is HeadNorm:
                raise unsupported(f"{name}.{norm}", found, "a norm of timm's for the stock layout")
    for name, head_dim in head_dims.items():
        attn: Any = model.get_submodule(name)
        attn.__class__ = Attention
        for attribute in ("qk_dim", "v_dim"):
            vars(attn).pop(attribute, None)
        attn.head_dim, attn.attn_dim = head_dim, attn.num_heads * head_dim
        attn.scale = head_dim**-0.5
    _fit_layers(model)


def _fit_layers(model: VisionTransformer) -> None:
    fit_modules(model)
    block: Any
    for block in model.blocks:
        if not is_absent(block.attn):
            _fit_norm(block.attn.norm, block.attn.attn_dim)
        if not is_absent(block.mlp):
            _fit_norm(block.mlp.norm, block.mlp.fc2.in_features)


def _fit_norm(norm: Any, size: int) -> None:
    if type(norm) in NORMS:
        norm.normalized_shape = (size,)


def _fit_width(model: VisionTransformer, width: int) -> None:
    model.embed_dim = model.num_features = model.head_hidden_size = width
    for info in model.feature_info:
        info["num_chs"] = width
    model.patch_embed.proj.out_channels = width
    block: Any
    for block in model.blocks:
        _fit_norm(block.norm1, width)
        _fit_norm(block.norm2, width)
    for norm in (model.norm_pre, model.norm, model.fc_norm, getattr(model.patch_embed, "norm", None)):
        if norm is not None:
            _fit_norm(norm, width)
    pool: Any = model.attn_pool
    if pool is not None:
        pool.out_features = width
        _fit_norm(pool.norm, width)
        # Keep the module object, so that references and hooks stay valid; only the final reshape differs.
        pool.__class__ = PrunedAttentionPoolLatent


def _drop_layer(model: VisionTransformer, name: str) -> None:
    """Remove the attention or the FFN from its block, with the modules around it."""
    _, index, child = name.split(".")
    block: Any = model.blocks[int(index)]
    number = 1 if child == "attn" else 2
    setattr(block, child, Absent().train(block.training))
    for other in (f"norm{number}", f"ls{number}", f"drop_path{number}"):
        if hasattr(block, other):
            setattr(block, other, nn.Identity().train(block.training))


def _fit_attention(attn: Any, anatomy: Anatomy, layer: Layer, sizes: Mapping[str, int]) -> None:
    heads, qk_dim, v_dim = (sizes[layer.groups[kind]] for kind in ("heads", "qk", "v"))
    before = {kind: anatomy.sizes[layer.groups[kind]] for kind in ("heads", "qk", "v")}
    if qk_dim != before["qk"] or v_dim != before["v"]:
        _adopt_attention(attn, before["heads"], before["qk"], qk_dim, v_dim)
    if heads != before["heads"]:
        attn.num_heads, attn.attn_dim = heads, heads * v_dim
        for norm in (attn.q_norm, attn.k_norm):
            if isinstance(norm, HeadNorm):
                norm.heads = heads


def _adopt_attention(attn: Any, heads: int, before: int, qk_dim: int, v_dim: int) -> None:
    def head_norm(norm: Any) -> nn.Module:
        if qk_dim == before or isinstance(norm, nn.Identity):
            unchanged: nn.Module = norm
            return unchanged
        if isinstance(norm, HeadNorm):
            centred, upcast = norm.centred, norm.upcast
        else:
            centred, upcast = NORMS[type(norm)], type(norm) in FP32_NORMS
        bias = getattr(norm, "bias", None)
        return HeadNorm(heads, qk_dim, norm.eps, centred, upcast, norm.weight, bias).train(norm.training)

    PrunedAttention.adopt(attn, qk_dim, v_dim, head_norm(attn.q_norm), head_norm(attn.k_norm))
