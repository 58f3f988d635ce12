"""timm's VisionTransformer (vit, deit, deit3, dinov2, clip and siglip towers, hybrids) with plain blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    DropPath,
    GluMlp,
    HybridEmbed,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    PatchEmbed,
    RmsNorm,
    RmsNormFp32,
    SwiGLU,
)
from timm.models import get_model_args
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...anatomy import costs as cost
from ...anatomy.anatomy import Anatomy
from ...anatomy.groups import Group, Member, Role, parameter_name
from ...anatomy.layers import AttentionSite, FfnSite, Layout, NormSite, Source, Stream
from ...errors import InvalidArgument, Unsupported
from .modules import HeadNorm, PrunedAttention, PrunedAttentionPoolLatent, PrunedBlock, PrunedResPostBlock

NAME = "vision_transformer"

_MODELS = (VisionTransformer, VisionTransformerDistilled)
# Centred (LayerNorm) or not (RMSNorm).
_NORMS: dict[type[nn.Module], bool] = {
    nn.LayerNorm: True,
    LayerNorm: True,
    LayerNormFp32: True,
    RmsNorm: False,
    RmsNormFp32: False,
}
# What timm.create_model takes besides: it would read files or return something else than the model.
_NOT_ARCHITECTURE = ("checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable", "device", "dtype")
_FP32_NORMS = (LayerNormFp32, RmsNormFp32)


def accepts(model: nn.Module) -> bool:
    """Is the model a VisionTransformer by exact class? A subclass may compute anything."""
    return type(model) in _MODELS


def build(architecture: str, arguments: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Build the dense model: a timm model name, or the name of one of the family's classes. Nothing is fetched.

    Raises:
        InvalidArgument: an argument that would make timm read or fetch weights.
        Unsupported: neither timm nor the family knows the architecture.
    """
    for name in arguments:
        if name in _NOT_ARCHITECTURE or name.startswith("pretrained"):
            raise InvalidArgument(f"arguments: expected those of the architecture, got {name!r}")
    for cls in _MODELS:
        if architecture == cls.__name__:
            return cls(**arguments, device=device)
    if not timm.is_model(architecture):
        names = " or ".join(cls.__name__ for cls in _MODELS)
        raise Unsupported(
            f"architecture: expected one that timm {timm.__version__} knows, {names}, got {architecture!r}"
        )
    model: nn.Module = timm.create_model(architecture, pretrained=False, **arguments, device=device)
    return model


def inspect(model: nn.Module) -> Anatomy:
    """Describe the model's groups, or raise Unsupported naming the module and the reason."""
    assert isinstance(model, VisionTransformer)
    return _Inspection(model).anatomy()


def adapt(model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Make modules and attributes fit parameters that were just cut."""
    assert isinstance(model, VisionTransformer)
    for group in anatomy.groups:
        if group.kind == "block" and sizes[group.name] == 0:
            _drop_layer(model, group.name)
    for site in anatomy.attention:
        if sizes[site.layer]:
            _fit_attention(model.get_submodule(site.name), site, sizes)
    _fit_layers(model)
    if "width" in sizes and sizes["width"] != model.embed_dim:
        _fit_width(model, sizes["width"])


def stock_sizes(model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes after a cut to ``sizes`` whose attention modules are timm's own: each layer has one size per head.

    Raises:
        Unsupported: padding a norm's channels would change what it computes, or timm's pool cannot hold the cut width.
    """
    assert isinstance(model, VisionTransformer)
    padded = dict(sizes)
    for site in anatomy.attention:
        if not sizes[site.layer]:
            continue
        qk, v = sizes[site.qk], sizes[site.v]
        size = padded[site.qk] = padded[site.v] = max(qk, v)
        attn: Any = model.get_submodule(site.name)
        for name in (site.q_norm, site.k_norm):
            if name is None:
                continue
            # The softmax scale would have to pass through the norm, cut channels have a scale for each head.
            if qk < size or size**-0.5 != site.softmax_scale or type(model.get_submodule(name)) is HeadNorm:
                raise Unsupported(
                    f"{name}: expected whole queries and keys for the stock layout, whose norm is one for all heads "
                    f"and counts zeros, got {qk} channels per head padded to {size}; use layout='exact'"
                )
        if _is_there(attn.norm) and v < size:
            raise Unsupported(
                f"{site.name}.norm: expected as many values as queries for the stock layout, whose norm would count "
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


def make_stock(model: nn.Module, head_dims: Mapping[str, int]) -> None:
    """Make the attention modules timm's own, the same objects: parameters already have the given size per head.

    Raises:
        Unsupported: query/key norms that timm's class does not have.
    """
    assert isinstance(model, VisionTransformer)
    for name in head_dims:
        for norm in ("q_norm", "k_norm"):
            found = model.get_submodule(f"{name}.{norm}")
            if type(found) is HeadNorm:
                raise _unsupported(f"{name}.{norm}", found, "a norm of timm's for the stock layout")
    for name, head_dim in head_dims.items():
        attn: Any = model.get_submodule(name)
        attn.__class__ = Attention
        for attribute in ("qk_dim", "v_dim"):
            vars(attn).pop(attribute, None)
        attn.head_dim, attn.attn_dim = head_dim, attn.num_heads * head_dim
        attn.scale = head_dim**-0.5
    _fit_layers(model)


def _fit_layers(model: VisionTransformer) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.out_features, module.in_features = module.weight.shape
    block: Any
    for block in model.blocks:
        if block.attn is not None:
            _fit_norm(block.attn.norm, block.attn.attn_dim)
        if block.mlp is not None:
            _fit_norm(block.mlp.norm, block.mlp.fc2.in_features)


def alone(model: nn.Module, block: int | None) -> nn.Module:
    """A copy of the model with that block alone, or without any."""
    assert isinstance(model, VisionTransformer)
    blocks = nn.Sequential(*(() if block is None else (copy.deepcopy(model.blocks[block]),)))
    # What the copy is to find already copied; the other blocks are never touched.
    return copy.deepcopy(model, {id(model.blocks): blocks})


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention and FFN layers by name, as timm's blocks run them, dropping no paths."""
    assert isinstance(model, VisionTransformer)
    found: dict[str, nn.Module] = {}
    block: Any
    for index, block in enumerate(model.blocks):
        post_norm = isinstance(block, ResPostBlock)
        if block.attn is not None:
            attention = (block.attn, block.norm1) if post_norm else (block.norm1, block.attn, block.ls1)
            found[f"blocks.{index}.attn"] = _Residual(*attention)
        if block.mlp is not None:
            ffn = (block.mlp, block.norm2) if post_norm else (block.norm2, block.mlp, block.ls2)
            found[f"blocks.{index}.mlp"] = _Residual(*ffn)
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, first to last."""
    assert isinstance(model, VisionTransformer)
    return list(model.blocks)


def from_block(model: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """The output of the model, given what enters a block: (B, N, width)."""
    assert isinstance(model, VisionTransformer)
    for block in model.blocks[index:]:
        x = block(x)
    output: torch.Tensor = model.forward_head(model.norm(x))
    return output


class _Residual(nn.Module):
    """Adds to its input what modules, one after the other, make of it."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) to the same."""
        out: torch.Tensor = x + self.branch(x)
        return out


def _fit_norm(norm: Any, size: int) -> None:
    if type(norm) in _NORMS:
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
        # The same module object, so that references and hooks stay; only the final reshape differs.
        pool.__class__ = PrunedAttentionPoolLatent


def _drop_layer(model: VisionTransformer, name: str) -> None:
    """Take the attention or the FFN out of its block, with the modules around it."""
    _, index, child = name.split(".")
    block: Any = model.blocks[int(index)]
    number = 1 if child == "attn" else 2
    setattr(block, child, None)
    for other in (f"norm{number}", f"ls{number}", f"drop_path{number}"):
        if hasattr(block, other):
            setattr(block, other, nn.Identity())
    block.__class__ = PrunedResPostBlock if isinstance(block, ResPostBlock) else PrunedBlock


def _fit_attention(attn: Any, site: AttentionSite, sizes: Mapping[str, int]) -> None:
    heads, qk_dim, v_dim = sizes[site.heads_group], sizes[site.qk], sizes[site.v]
    if qk_dim != site.qk_dim or v_dim != site.v_dim:
        _adopt_attention(attn, site, qk_dim, v_dim)
    if heads != site.heads:
        attn.num_heads, attn.attn_dim = heads, heads * v_dim
        for norm in (attn.q_norm, attn.k_norm):
            if isinstance(norm, HeadNorm):
                norm.heads = heads


def _adopt_attention(attn: Any, site: AttentionSite, qk_dim: int, v_dim: int) -> None:
    def head_norm(norm: Any) -> nn.Module:
        if qk_dim == site.qk_dim or isinstance(norm, nn.Identity):
            unchanged: nn.Module = norm
            return unchanged
        if isinstance(norm, HeadNorm):
            centred, upcast = norm.centred, norm.upcast
        else:
            centred, upcast = _NORMS[type(norm)], type(norm) in _FP32_NORMS
        bias = getattr(norm, "bias", None)
        return HeadNorm(site.heads, qk_dim, norm.eps, centred, upcast, norm.weight, bias).train(norm.training)

    PrunedAttention.adopt(attn, qk_dim, v_dim, head_norm(attn.q_norm), head_norm(attn.k_norm))


class _Inspection:
    """One walk over a model, collecting groups, sites and products."""

    def __init__(self, model: VisionTransformer) -> None:
        if model.patch_embed.img_size is None:
            raise Unsupported("patch_embed: expected a size of images, which MACs are counted for, got none (img_size)")
        self.model = model
        self.width = int(model.embed_dim)
        self.tokens = int(model.patch_embed.num_patches) + int(model.num_prefix_tokens)
        self.groups: list[Group] = []
        self.stream: list[Member] = []
        self.attention: list[AttentionSite] = []
        self.ffn: list[FfnSite] = []
        self.norms: list[NormSite] = []
        self.products: list[cost.Product] = []
        self.refused: dict[str, str] = {}
        self.absent: list[str] = []
        self.writers: dict[str, str | None] = {"patch_embed.proj": None}
        self.readers: dict[str, tuple[str, ...]] = {}

    def anatomy(self) -> Anatomy:
        model = self.model
        self.patch_embedding()
        for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            if _has(model, name):
                _refuse_computed("", model, name)
                self.stream.append(Member("", name, 2, "elementwise"))
        self.norm("norm_pre", self.stream, reads_stream=False)
        if type(model.blocks) is not nn.Sequential:
            raise _unsupported("blocks", model.blocks, "an nn.Sequential of blocks")
        for index, block in enumerate(model.blocks):
            self.block(index, block)
        self.norm("norm", self.stream)
        self.norm("fc_norm", self.stream, pooled=True)
        self.pool()
        self.classifier("head")
        if isinstance(model, VisionTransformerDistilled):
            if _is_there(model.fc_norm):
                raise _unsupported(
                    "fc_norm", model.fc_norm, "none in a VisionTransformerDistilled, which leaves it out"
                )
            self.classifier("head_dist")
        if "width" not in self.refused:
            self.groups.append(Group("width", "width", None, self.width, tuple(self.stream)))
        self.refuse_tied()
        architecture, arguments, handmade = _identity(model)
        height, width = map(int, model.patch_embed.img_size)
        return Anatomy(
            family=NAME,
            architecture=architecture,
            arguments=arguments,
            input_size=(int(model.in_chans), height, width),
            groups=tuple(self.groups),
            attention=tuple(self.attention),
            ffn=tuple(self.ffn),
            norms=tuple(self.norms),
            products=tuple(self.products),
            shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            refused=self.refused,
            handmade=handmade,
            stream=self.described_stream(),
            absent=tuple(self.absent),
            embedding=self.embedding(),
        )

    def embedding(self) -> Source | None:
        model: Any = self.model
        if any(_is_there(norm) for norm in (model.norm_pre, getattr(model.patch_embed, "norm", None))):
            return None
        if type(model.patch_embed.proj) is nn.Identity:
            return None
        tokens = tuple(name for name in ("cls_token", "reg_token", "dist_token") if _has(model, name))
        return Source({"patch_embed.proj": None}, tokens)

    def described_stream(self) -> Stream | str:
        """What a change of the stream's basis has to touch, or what forbids one."""
        model: Any = self.model
        if "width" in self.refused:
            return self.refused["width"]
        for name in ("norm_pre", "patch_embed.norm"):
            norm = model.get_submodule(name) if name != "patch_embed.norm" else getattr(model.patch_embed, "norm", None)
            if norm is not None and type(norm) is not nn.Identity:
                return f"{name}: {type(norm).__name__} writes to the residual stream, channel by channel"
        if model.attn_pool is not None:
            return f"attn_pool: {type(model.attn_pool).__name__} keeps a residual stream of its own"
        if model.global_pool not in ("", "token", "avg"):
            return f"global_pool: {model.global_pool!r} takes maxima channel by channel"
        last = [name for name in ("norm", "fc_norm") if type(model.get_submodule(name)) is not nn.Identity]
        if len(last) != 1:
            return f"{' and '.join(last) or 'final_norm=False'}: the classifier reads the residual stream as it is"
        heads = [name for name in ("head", "head_dist") if hasattr(model, name)]
        if any(type(model.get_submodule(name)) is nn.Identity for name in heads):
            return "head: Identity, so the channels of the residual stream are the features"
        kinds = {site.centred for site in self.norms}
        if len(kinds) != 1:
            return "norms: both LayerNorm and RMSNorm read the residual stream"
        self.readers[last[0]] = tuple(heads)
        tokens = [name for name in ("cls_token", "reg_token", "dist_token", "pos_embed") if _has(model, name)]
        return Stream(kinds.pop(), self.writers, tuple(tokens), self.readers)

    def patch_embedding(self) -> None:
        embed: Any = self.model.patch_embed
        if type(embed) is HybridEmbed:
            macs = _backbone_macs(embed.backbone, (int(self.model.in_chans), *embed.img_size))
            self.products.append(cost.FixedProduct("patch_embed.backbone", macs))
            if isinstance(embed.proj, nn.Identity):
                self.refused["width"] = "patch_embed.proj: Identity, so the backbone's features are the residual stream"
                return
        elif type(embed) is not PatchEmbed:
            raise _unsupported("patch_embed", embed, "PatchEmbed or HybridEmbed")
        self.rows("patch_embed.proj", self.stream, "writer")
        self.products.append(cost.WeightProduct("patch_embed.proj", int(embed.num_patches)))
        if type(embed) is PatchEmbed:
            self.norm("patch_embed.norm", self.stream, reads_stream=False)

    def block(self, index: int, block: nn.Module) -> None:
        name = f"blocks.{index}"
        pre_norm = type(block) in (Block, PrunedBlock)
        if type(block) in (ResPostBlock, PrunedResPostBlock):
            self.refused.setdefault("width", f"{name}: ResPostBlock normalises what it adds to the residual stream")
        elif not pre_norm:
            raise _unsupported(name, block, "timm's Block")
        for child in ("ls1", "ls2"):
            scale = getattr(block, child, None)
            if type(scale) is LayerScale:
                _refuse_computed(f"{name}.{child}", scale, "gamma")
                self.stream.append(Member(f"{name}.{child}", "gamma", 0, "elementwise"))
            elif scale is not None and type(scale) is not nn.Identity:
                raise _unsupported(f"{name}.{child}", scale, "LayerScale")
        for child in ("drop_path1", "drop_path2"):
            if type(getattr(block, child)) not in (DropPath, nn.Identity):
                raise _unsupported(f"{name}.{child}", getattr(block, child), "DropPath")
        for child, describe, number in (("attn", self.attention_layer, 1), ("mlp", self.mlp, 2)):
            layer = f"{name}.{child}"
            if getattr(block, child) is None:
                self.absent.append(layer)
                continue
            self.norm(f"{name}.norm{number}", self.stream, reads_stream=pre_norm)
            describe(index, layer)
            modules = (layer, f"{name}.norm{number}", f"{name}.ls{number}")
            self.groups.append(Group(layer, "block", index, 1, (), modules=modules))

    def attention_layer(self, index: int, name: str) -> None:
        attn: Any = self.model.get_submodule(name)
        if type(attn) is Attention:
            layout: Layout = "stock"
            qk_dim = v_dim = int(attn.head_dim)
        elif type(attn) is PrunedAttention:
            layout = "exact"
            qk_dim, v_dim = attn.qk_dim, attn.v_dim
        else:
            raise _unsupported(name, attn, "timm's Attention")
        heads = int(attn.num_heads)
        qk: list[Member] = []
        v: list[Member] = []
        for offset in (0, heads * qk_dim):
            self.rows(f"{name}.qkv", qk, "writer", offset)
        self.rows(f"{name}.qkv", v, "writer", 2 * heads * qk_dim)
        self.columns(f"{name}.qkv", self.stream)
        self.columns(f"{name}.proj", v)
        self.rows(f"{name}.proj", self.stream, "writer")
        q_norm = self.head_norm(f"{name}.q_norm", qk)
        k_norm = self.head_norm(f"{name}.k_norm", qk)
        self.norm(f"{name}.norm", v, reads_stream=False)
        if attn.gate is not None:
            self.rows(f"{name}.gate", v, "elementwise")
            self.columns(f"{name}.gate", self.stream)
            self.products.append(cost.WeightProduct(f"{name}.gate", self.tokens))
        block = f"blocks.{index}"
        between = next((f"{name}.{child}" for child in ("norm", "gate") if _is_there(getattr(attn, child))), None)
        scale = self.layer_scale(f"{block}.ls1")
        self.writers[f"{name}.proj"] = scale
        self.readers[f"{block}.norm1"] = (f"{name}.qkv", *((f"{name}.gate",) if attn.gate is not None else ()))
        self.groups += [
            Group(f"{block}.qk", "qk", index, qk_dim, tuple(qk), heads, per_head=True, heads_group=f"{block}.heads"),
            Group(f"{block}.v", "v", index, v_dim, tuple(v), heads, per_head=True, heads_group=f"{block}.heads"),
            Group(f"{block}.heads", "heads", index, heads, ()),
        ]
        self.attention.append(
            AttentionSite(
                name=name,
                qk=f"{block}.qk",
                v=f"{block}.v",
                heads_group=f"{block}.heads",
                layer=name,
                heads=heads,
                qk_dim=qk_dim,
                v_dim=v_dim,
                softmax_scale=float(attn.scale),
                layout=layout,
                qkv=f"{name}.qkv",
                q_norm=q_norm,
                k_norm=k_norm,
                proj=f"{name}.proj",
                branch=f"{block}.drop_path1",
                norm=next((site.name for site in self.norms if site.name == f"{block}.norm1"), None),
                qk_normed=_normed(attn.q_norm, attn.k_norm),
                scale=scale,
                between=between,
                inner=None if attn.gate is not None else self.inner(f"{name}.norm", heads * v_dim),
                post_norm=self.post_norm(index),
            )
        )
        self.products += [
            cost.WeightProduct(f"{name}.qkv", self.tokens),
            cost.AttentionProduct(
                name, self.tokens, self.tokens, f"{block}.heads", f"{block}.qk", f"{block}.v", layer=name
            ),
            cost.WeightProduct(f"{name}.proj", self.tokens),
        ]

    def mlp(self, index: int, name: str) -> None:
        mlp: Any = self.model.get_submodule(name)
        members: list[Member] = []
        size = int(mlp.fc2.in_features) if type(mlp) in (Mlp, GluMlp, SwiGLU) else 0
        if type(mlp) is Mlp:
            branches = [("fc1", 0)]
        elif type(mlp) is GluMlp:
            branches = [("fc1", 0), ("fc1", size)]
        elif type(mlp) is SwiGLU:
            branches = [("fc1_g", 0), ("fc1_x", 0)]
        else:
            raise _unsupported(name, mlp, "Mlp, GluMlp or SwiGLU")
        for branch, offset in branches:
            self.rows(f"{name}.{branch}", members, "writer", offset)
        for branch in dict.fromkeys(branch for branch, _ in branches):
            self.columns(f"{name}.{branch}", self.stream)
            self.products.append(cost.WeightProduct(f"{name}.{branch}", self.tokens))
        self.norm(f"{name}.norm", members, reads_stream=False)
        self.columns(f"{name}.fc2", members)
        self.rows(f"{name}.fc2", self.stream, "writer")
        self.products.append(cost.WeightProduct(f"{name}.fc2", self.tokens))
        block = f"blocks.{index}"
        scale = self.layer_scale(f"{block}.ls2")
        self.writers[f"{name}.fc2"] = scale
        self.readers[f"{block}.norm2"] = tuple(dict.fromkeys(f"{name}.{branch}" for branch, _ in branches))
        self.groups.append(Group(f"{block}.ffn", "ffn", index, size, tuple(members)))
        self.ffn.append(
            FfnSite(
                name,
                f"{block}.ffn",
                name,
                size,
                f"{name}.fc2",
                f"{block}.drop_path2",
                scale=scale,
                inner=self.inner(f"{name}.norm", size),
                post_norm=self.post_norm(index),
            )
        )

    def inner(self, name: str, size: int) -> NormSite | None:
        norm = self.model.get_submodule(name)
        return NormSite(name, size, _NORMS[type(norm)], pooled=False) if type(norm) in _NORMS else None

    def post_norm(self, index: int) -> bool:
        return isinstance(self.model.blocks[index], ResPostBlock)

    def layer_scale(self, name: str) -> str | None:
        block, _, child = name.rpartition(".")
        return name if type(getattr(self.model.get_submodule(block), child, None)) is LayerScale else None

    def pool(self) -> None:
        pool: Any = self.model.attn_pool
        if pool is None:
            return
        if type(pool) not in (AttentionPoolLatent, PrunedAttentionPoolLatent):
            self.refused["width"] = f"attn_pool: {type(pool).__name__} splits the residual stream itself into heads"
            return
        if pool.pos_embed is not None:
            self.stream.append(Member("attn_pool", "pos_embed", 1, "elementwise"))
        self.columns("attn_pool.kv", self.stream)
        keys = self.tokens - (0 if self.model.pool_include_prefix else int(self.model.num_prefix_tokens))
        queries, inner = int(pool.latent_len), int(pool.head_dim)
        if type(pool.q) is nn.Linear:
            self.products.append(cost.WeightProduct("attn_pool.q", queries))
        self.products += [
            cost.WeightProduct("attn_pool.kv", keys),
            cost.AttentionProduct("attn_pool", queries, keys, int(pool.num_heads), inner, inner),
        ]
        if pool.mlp is None:
            self.refused["width"] = "attn_pool: without an output projection its width is its heads'"
            return
        self.rows("attn_pool.proj", self.stream, "writer")
        self.norm("attn_pool.norm", self.stream, reads_stream=False)
        self.columns("attn_pool.mlp.fc1", self.stream)
        self.rows("attn_pool.mlp.fc2", self.stream, "writer")
        for child in ("proj", "mlp.fc1", "mlp.fc2"):
            self.products.append(cost.WeightProduct(f"attn_pool.{child}", queries))

    def classifier(self, name: str) -> None:
        head = self.model.get_submodule(name)
        if type(head) is nn.Identity:
            return
        self.columns(name, self.stream)
        pool: Any = self.model.attn_pool
        pooled = pool is not None or bool(self.model.global_pool)
        self.products.append(cost.WeightProduct(name, 1 if pooled else self.tokens))

    def rows(self, name: str, members: list[Member], role: Role, offset: int = 0) -> None:
        layer: Any = self.linear(name)
        members.append(Member(name, "weight", 0, role, offset))
        if layer.bias is not None:
            members.append(Member(name, "bias", 0, role, offset))

    def columns(self, name: str, members: list[Member]) -> None:
        self.linear(name)
        members.append(Member(name, "weight", 1, "reader"))

    def linear(self, name: str) -> Any:
        # By exact class: adapters, quantised and parametrised layers keep their weights elsewhere.
        layer: Any = self.model.get_submodule(name)
        expected = nn.Conv2d if name == "patch_embed.proj" else nn.Linear
        if type(layer) is not expected:
            raise _unsupported(name, layer, f"nn.{expected.__name__}")
        _refuse_computed(name, layer)
        return layer

    def norm(self, name: str, members: list[Member], *, reads_stream: bool = True, pooled: bool = False) -> None:
        norm = self.model.get_submodule(name)
        if type(norm) is nn.Identity:
            return
        if type(norm) not in _NORMS:
            raise _unsupported(name, norm, "LayerNorm or RmsNorm")
        self.norm_members(name, norm, members, shared=False)
        if reads_stream and members is self.stream:
            self.norms.append(NormSite(name, self.width, _NORMS[type(norm)], pooled))

    def head_norm(self, name: str, members: list[Member]) -> str | None:
        norm = self.model.get_submodule(name)
        if type(norm) is nn.Identity:
            return None
        if type(norm) is not HeadNorm and type(norm) not in _NORMS:
            raise _unsupported(name, norm, "LayerNorm or RmsNorm")
        self.norm_members(name, norm, members, shared=type(norm) is not HeadNorm)
        return name

    def norm_members(self, name: str, norm: nn.Module, members: list[Member], *, shared: bool) -> None:
        _refuse_computed(name, norm)
        for parameter in ("weight", "bias"):
            if getattr(norm, parameter, None) is not None:
                members.append(Member(name, parameter, 0, "norm", shared=shared))

    def refuse_tied(self) -> None:
        seen: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first = seen.setdefault(id(parameter), name)
            if first != name:
                raise Unsupported(f"{name}: expected a parameter of its own, got one tied to {first}")


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and type(module) is not nn.Identity


def _normed(*norms: Any) -> Literal["layer", "rms"] | None:
    """What query and key norms both are, with a scale."""
    kinds = set()
    for norm in norms:
        if type(norm) is nn.Identity or norm.weight is None:
            return None
        kinds.add(norm.centred if type(norm) is HeadNorm else _NORMS[type(norm)])
    if len(kinds) > 1:
        return None
    return "layer" if kinds.pop() else "rms"


def _has(model: nn.Module, name: str) -> bool:
    return getattr(model, name, None) is not None


def _unsupported(name: str, module: nn.Module, expected: str) -> Unsupported:
    return Unsupported(f"{name}: expected {expected}, got {type(module).__name__}")


def _refuse_computed(name: str, module: nn.Module, *parameters: str) -> None:
    """torch.nn.utils.prune, weight_norm and spectral_norm keep the class but compute the weight before each forward."""
    for parameter in parameters or ("weight", "bias"):
        if getattr(module, parameter, None) is not None and parameter not in module._parameters:
            raise Unsupported(
                f"{parameter_name(name, parameter)}: expected a parameter, got a tensor that a hook computes "
                "(torch.nn.utils.prune, weight_norm or spectral_norm; make it permanent first)"
            )


def _backbone_macs(backbone: nn.Module, input_size: tuple[int, ...]) -> int:
    """Count a convolutional stem's MACs by tracing shapes only; its weights are neither read nor copied."""
    state = {k: torch.empty_like(v, device="meta", dtype=torch.float32) for k, v in backbone.state_dict().items()}
    images = torch.empty(1, *input_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(backbone, state, (images,))
    return int(counter.get_total_flops()) // 2


def _identity(model: VisionTransformer) -> tuple[str, dict[str, Any], bool]:
    """What builds the model's dense form, as timm recorded it; the class alone for a model built by hand."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    recorded: dict[str, Any] | None = getattr(model, "_model_args", None)
    if not architecture or recorded is None:
        return type(model).__name__, {}, True
    # timm leaves the drop rates out of what it publishes; a model that is trained on needs them back.
    drop = {name: value for name, value in recorded.items() if "drop" in name}
    return architecture, get_model_args(model, drop), False
