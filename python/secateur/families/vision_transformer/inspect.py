"""Inspects timm's VisionTransformer: builds its anatomy."""

from __future__ import annotations

from typing import Any

from timm.layers import (
    Attention,
    AttentionPoolLatent,
    DropPath,
    GluMlp,
    HybridEmbed,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLU,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from ...anatomy import (
    Anatomy,
    Group,
    Layer,
    Layout,
    Member,
    NormSite,
    Part,
    Source,
    Tap,
    shared_entries,
    unit_entries,
)
from ...anatomy import costs as cost
from ...errors import Unsupported
from ..absent import is_absent
from ..base import NORMS, refuse_tied, unsupported
from ..walk import Walk, has, identity, macs_of
from .counts import Merging, channels_of_images, classifies, is_pooled, pooled_products, why_not_pooled
from .modules import HeadNorm, PrunedAttention, PrunedAttentionPoolLatent, PrunedBlock, PrunedResPostBlock
from .norms import head_tap, is_there, score_norm
from .reduced import MergingBlock, MergingResPostBlock
from .stream import described_stream, refused_head

__all__ = ["Inspection"]

_HEAD_NORMS: tuple[tuple[Part, str], ...] = (("query", "q_norm"), ("key", "k_norm"))


class Inspection(Walk):
    """One walk over a model, collecting groups, layers and products."""

    def __init__(self, model: VisionTransformer) -> None:
        if model.patch_embed.img_size is None:
            raise Unsupported("patch_embed: expected a size of images, which MACs are counted for, got none (img_size)")
        super().__init__(model)
        self.vit = model
        self.width = int(model.embed_dim)
        self.channels = unit_entries(self.width)
        self.tokens = Merging(model)
        self.groups: list[Group] = []
        self.stream: list[Member] = []
        self.layers: dict[str, Layer] = {}
        self.norms: list[NormSite] = []
        self.products: list[cost.Product] = []
        self.refused = refused_head(model)
        self.absent: list[str] = []
        self.writers: dict[str, str | None] = {"patch_embed.proj": None}
        self.readers: dict[str, tuple[str, ...]] = {}

    def anatomy(self, family: str) -> Anatomy:
        """Describe the model, or raise Unsupported naming the module and the reason."""
        model = self.vit
        self.patch_embedding()
        for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            if has(model, name):
                self.parameter("", name, 2, self.stream, self.width)
        self.norm("norm_pre", self.stream, "stream", self.channels)
        if type(model.blocks) is not nn.Sequential:
            raise unsupported("blocks", model.blocks, "an nn.Sequential of blocks")
        for index, block in enumerate(model.blocks):
            self.block(index, block)
        self.stream_norm("norm")
        self.stream_norm("fc_norm", pooled=True)
        self.pool()
        self.classifier("head")
        if isinstance(model, VisionTransformerDistilled):
            if is_there(model.fc_norm):
                raise unsupported("fc_norm", model.fc_norm, "none in a VisionTransformerDistilled, which leaves it out")
            self.classifier("head_dist")
        if "width" not in self.refused:
            self.groups.append(Group("width", "width", None, self.width, tuple(self.stream)))
        self.groups += self.tokens.groups
        self.refused |= {} if self.tokens.refused is None else {"tokens": self.tokens.refused}
        refuse_tied(model)
        architecture, arguments, handmade = identity(model)
        height, width = map(int, model.patch_embed.img_size)
        return Anatomy(
            family=family,
            architecture=architecture,
            arguments=arguments,
            input_size=(channels_of_images(model), height, width),
            groups=tuple(self.groups),
            layers=self.layers,
            norms=tuple(self.norms),
            products=tuple(self.products),
            shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            refused=self.refused,
            handmade=handmade,
            streams={"width": described_stream(model, self.refused, self.norms, self.writers, self.readers)},
            absent=tuple(self.absent),
            embedding=self.embedding(),
            last_block="pooled" if is_pooled(model) else "whole",
            default_last_block="pooled" if is_pooled(model) or classifies(model) else "whole",
            pooled_products=self.pooled(),
            tokens=self.tokens.after,
        )

    def pooled(self) -> tuple[cost.Product, ...] | None:
        """Return the products when the last block computes prefix tokens only; None if all are used."""
        if why_not_pooled(self.vit) is not None:
            return None
        layer = f"blocks.{len(self.vit.blocks) - 1}.attn"
        groups = dict(self.layers[layer].groups) if layer in self.layers else {}
        width = self.width if "width" in self.refused else "width"
        return pooled_products(self.products, self.vit, f"{layer}.qkv", groups, width)

    def embedding(self) -> Source | None:
        """Return the source of the first block's input, if something can be added there."""
        model: Any = self.vit
        if any(is_there(norm) for norm in (model.norm_pre, getattr(model.patch_embed, "norm", None))):
            return None
        if type(model.patch_embed.proj) is nn.Identity:
            return None
        tokens = tuple(name for name in ("cls_token", "reg_token", "dist_token") if has(model, name))
        return Source({"patch_embed.proj": None}, tokens)

    def patch_embedding(self) -> None:
        """Add the convolution that embeds patches, or a hybrid's backbone."""
        embed: Any = self.vit.patch_embed
        if type(embed) is HybridEmbed:
            macs = macs_of(embed.backbone, (int(self.vit.in_chans), *embed.img_size))
            self.products.append(cost.FixedProduct("patch_embed.backbone", macs))
            if isinstance(embed.proj, nn.Identity):
                self.refused["width"] = "patch_embed.proj: Identity, so the backbone's features are the residual stream"
                return
        elif type(embed) is not PatchEmbed:
            raise unsupported("patch_embed", embed, "PatchEmbed or HybridEmbed")
        if type(embed.proj) is not nn.Conv2d:
            raise unsupported("patch_embed.proj", embed.proj, "nn.Conv2d")
        self.rows("patch_embed.proj", self.stream, "writer", "stream", self.channels)
        self.products.append(cost.WeightProduct("patch_embed.proj", int(embed.num_patches)))
        if type(embed) is PatchEmbed:
            self.norm("patch_embed.norm", self.stream, "stream", self.channels)

    def block(self, index: int, block: nn.Module) -> None:
        """Add one block: its LayerScales, norms, attention and FFN."""
        name = f"blocks.{index}"
        pre_norm = type(block) in (Block, PrunedBlock, MergingBlock)
        if type(block) in (ResPostBlock, PrunedResPostBlock, MergingResPostBlock):
            self.refused.setdefault("width", f"{name}: ResPostBlock normalises what it adds to the residual stream")
        elif not pre_norm:
            raise unsupported(name, block, "timm's Block")
        for child in ("ls1", "ls2"):
            scale = getattr(block, child, None)
            if type(scale) is LayerScale:
                self.parameter(f"{name}.{child}", "gamma", 0, self.stream, self.width)
            elif scale is not None and type(scale) is not nn.Identity:
                raise unsupported(f"{name}.{child}", scale, "LayerScale")
        for child in ("drop_path1", "drop_path2"):
            if type(getattr(block, child)) not in (DropPath, nn.Identity):
                raise unsupported(f"{name}.{child}", getattr(block, child), "DropPath")
        for child, describe, number in (("attn", self.attention_layer, 1), ("mlp", self.mlp, 2)):
            layer = f"{name}.{child}"
            if is_absent(getattr(block, child)):
                self.absent.append(layer)
                continue
            if pre_norm:
                self.stream_norm(f"{name}.norm{number}")
            else:
                self.norm(f"{name}.norm{number}", self.stream, "stream", self.channels)
            describe(index, layer)
            modules = (layer, f"{name}.norm{number}", f"{name}.ls{number}")
            self.groups.append(Group(layer, "layer", index, 1, (), modules=modules))

    def attention_layer(self, index: int, name: str) -> None:
        """Add one attention layer with its groups."""
        attn: Any = self.model.get_submodule(name)
        if type(attn) is Attention:
            layout: Layout = "stock"
            qk_dim = v_dim = int(attn.head_dim)
        elif type(attn) is PrunedAttention:
            layout = "exact"
            qk_dim, v_dim = attn.qk_dim, attn.v_dim
        else:
            raise unsupported(name, attn, "timm's Attention")
        heads = int(attn.num_heads)
        block, qkv, proj = f"blocks.{index}", f"{name}.qkv", f"{name}.proj"
        qk: list[Member] = []
        v: list[Member] = []
        span = heads * qk_dim
        values, projected = unit_entries(v_dim, heads, start=2 * span), unit_entries(v_dim, heads)
        self.rows(qkv, qk, "writer", "query", unit_entries(qk_dim, heads))
        self.rows(qkv, qk, "writer", "key", unit_entries(qk_dim, heads, start=span))
        self.rows(qkv, v, "writer", "value", values)
        self.columns(qkv, self.stream, "stream", self.channels)
        self.columns(proj, v, "output", projected)
        self.rows(proj, self.stream, "writer", "stream", self.channels)
        norms = {part: found for part, child in _HEAD_NORMS if (found := self.head_norm(f"{name}.{child}", part, qk))}
        self.norm(f"{name}.norm", v, "output", projected)
        if attn.gate is not None:
            self.rows(f"{name}.gate", v, "elementwise", "gate", projected)
            self.columns(f"{name}.gate", self.stream, "stream", self.channels)
            self.products.append(cost.WeightProduct(f"{name}.gate", self.tokens.here))
        between = next((child for child in ("norm", "gate") if is_there(getattr(attn, child))), None)
        scale = self.layer_scale(f"{block}.ls1")
        self.writers[proj] = scale
        readers = (qkv, *((f"{name}.gate",) if attn.gate is not None else ()))
        self.readers[f"{block}.norm1"] = readers
        groups = {"qk": f"{block}.qk", "v": f"{block}.v", "heads": f"{block}.heads"}
        self.groups += [
            Group(groups["qk"], "qk", index, qk_dim, tuple(qk), heads, within=groups["heads"]),
            Group(groups["v"], "v", index, v_dim, tuple(v), heads, within=groups["heads"]),
            Group(groups["heads"], "heads", index, heads, ()),
        ]
        self.layers[name] = Layer(
            name=name,
            kind="attention",
            groups=groups,
            taps={
                "query": head_tap(groups["qk"], name, qkv, norms.get("query"), slice(0, span), heads),
                "key": head_tap(groups["qk"], name, qkv, norms.get("key"), slice(span, 2 * span), heads),
                "value": Tap(groups["v"], f"{name} v", qkv, "output", heads * v_dim, slice(2 * span, None)),
                "output": Tap(proj, proj, proj, "input", heads * v_dim),
            },
            writer=proj,
            branch=f"{block}.drop_path1",
            scale=scale,
            input_norm=self.input_norm(f"{block}.norm1"),
            readers=readers,
            norms=norms,
            score_norm=score_norm(attn.q_norm, attn.k_norm),
            inner=None if attn.gate is not None else self.inner(f"{name}.norm", heads * v_dim),
            fixed={} if between is None else {"value": f"{name}.{between} is between values and projection"},
            post_norm=self.post_norm(index),
            softmax_scale=float(attn.scale),
            layout=layout,
        )
        tokens = self.tokens.here
        self.products += [
            cost.WeightProduct(qkv, tokens),
            cost.AttentionProduct(name, tokens, tokens, groups["heads"], groups["qk"], groups["v"], layer=name),
            cost.WeightProduct(proj, tokens),
            *self.tokens.attention(index, name, self.width if "width" in self.refused else "width"),
        ]

    def mlp(self, index: int, name: str) -> None:
        """Add one FFN with its group."""
        mlp: Any = self.model.get_submodule(name)
        members: list[Member] = []
        size = int(mlp.fc2.in_features) if type(mlp) in (Mlp, GluMlp, SwiGLU) else 0
        units = unit_entries(size)
        if type(mlp) is Mlp:
            branches = {"fc1": units}
        elif type(mlp) is GluMlp:
            branches = {"fc1": unit_entries(size, copies=2, stride=size)}
        elif type(mlp) is SwiGLU:
            branches = {"fc1_g": units, "fc1_x": units}
        else:
            raise unsupported(name, mlp, "Mlp, GluMlp or SwiGLU")
        for branch, rows in branches.items():
            self.rows(f"{name}.{branch}", members, "writer", "hidden", rows)
            self.columns(f"{name}.{branch}", self.stream, "stream", self.channels)
            self.products.append(cost.WeightProduct(f"{name}.{branch}", self.tokens.here))
        self.norm(f"{name}.norm", members, "output", units)
        fc2 = f"{name}.fc2"
        self.columns(fc2, members, "output", units)
        self.rows(fc2, self.stream, "writer", "stream", self.channels)
        self.products.append(cost.WeightProduct(fc2, self.tokens.here))
        block = f"blocks.{index}"
        scale = self.layer_scale(f"{block}.ls2")
        self.writers[fc2] = scale
        self.readers[f"{block}.norm2"] = tuple(f"{name}.{branch}" for branch in branches)
        group = f"{block}.ffn"
        self.groups.append(Group(group, "ffn", index, size, tuple(members)))
        self.layers[name] = Layer(
            name=name,
            kind="ffn",
            groups={"ffn": group},
            taps={"hidden": Tap(group, fc2, fc2, "input", size)},
            writer=fc2,
            branch=f"{block}.drop_path2",
            scale=scale,
            input_norm=self.input_norm(f"{block}.norm2"),
            readers=self.readers[f"{block}.norm2"],
            inner=self.inner(f"{name}.norm", size),
            post_norm=self.post_norm(index),
        )

    def input_norm(self, name: str) -> str | None:
        """Return the norm before a layer, or None where it comes after or there is none."""
        return next((norm.name for norm in self.norms if norm.name == name), None)

    def post_norm(self, index: int) -> bool:
        """Return whether the block normalises what it adds."""
        return isinstance(self.vit.blocks[index], ResPostBlock)

    def layer_scale(self, name: str) -> str | None:
        """Return the name of a LayerScale, or None if there is none."""
        block, _, child = name.rpartition(".")
        return name if type(getattr(self.model.get_submodule(block), child, None)) is LayerScale else None

    def pool(self) -> None:
        """Add the attention pool, if there is one."""
        pool: Any = self.vit.attn_pool
        if pool is None:
            return
        if type(pool) not in (AttentionPoolLatent, PrunedAttentionPoolLatent):
            self.refused["width"] = f"attn_pool: {type(pool).__name__} splits the residual stream itself into heads"
            return
        if pool.pos_embed is not None:
            self.stream.append(Member("attn_pool.pos_embed", 1, self.channels, "stream", "elementwise"))
        self.columns("attn_pool.kv", self.stream, "stream", self.channels)
        keys = self.tokens.all - (0 if self.vit.pool_include_prefix else int(self.vit.num_prefix_tokens))
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
        self.rows("attn_pool.proj", self.stream, "writer", "stream", self.channels)
        self.norm("attn_pool.norm", self.stream, "stream", self.channels)
        self.columns("attn_pool.mlp.fc1", self.stream, "stream", self.channels)
        self.rows("attn_pool.mlp.fc2", self.stream, "writer", "stream", self.channels)
        for child in ("proj", "mlp.fc1", "mlp.fc2"):
            self.products.append(cost.WeightProduct(f"attn_pool.{child}", queries))

    def classifier(self, name: str) -> None:
        """Add a classifier's inputs."""
        head = self.model.get_submodule(name)
        if type(head) is nn.Identity:
            return
        pool: Any = self.vit.attn_pool
        pooled = pool is not None or bool(self.vit.global_pool)
        if type(head) is not nn.Linear:
            shape = (self.width,) if pooled else (self.tokens.all, self.width)
            self.products.append(cost.FixedProduct(name, macs_of(head, shape)))
            return
        self.columns(name, self.stream, "stream", self.channels)
        self.products.append(cost.WeightProduct(name, 1 if pooled else self.tokens.here))

    def stream_norm(self, name: str, *, pooled: bool = False) -> None:
        """Add a norm whose input is the residual stream."""
        centred = self.norm(name, self.stream, "stream", self.channels)
        if centred is not None:
            self.norms.append(NormSite(name, self.width, centred, pooled))

    def head_norm(self, name: str, part: Part, members: list[Member]) -> str | None:
        """Add a norm of queries or keys, which has one scale for all heads or, if it is secateur's, one for each."""
        norm = self.model.get_submodule(name)
        if type(norm) is nn.Identity:
            return None
        if type(norm) is not HeadNorm and type(norm) not in NORMS:
            raise unsupported(name, norm, "LayerNorm or RmsNorm")
        heads, size, _ = members[0].entries.shape
        entries = unit_entries(size, heads) if type(norm) is HeadNorm else shared_entries(size, heads)
        self.norm_members(name, norm, members, part, entries)
        return name
