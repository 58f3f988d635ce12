"""timm's SwinTransformer (Liu et al., ICCV 2021, arXiv:2103.14030): shifted windows, stages of their own width.

Each head owns a column of its layer's table of relative position biases. These are added to the scores, so that
queries, keys and values can be rotated as in a plain ViT. A channel of a stage has four entries in the patch merging
after it. Windows that do not fit the feature map are padded with zeros after the norm, and tokens attend to these too.
"""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from collections.abc import Mapping
from functools import partial
from math import ceil
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import ClassifierHead, DropPath, Mlp, PatchEmbed
from timm.models import swin_transformer as timms
from torch import nn

from ..anatomy import Anatomy, Group, Layer, Member, NormSite, Stream, Tap, unit_entries
from ..anatomy.costs import AttentionProduct, FixedProduct, Product, WeightProduct
from ..errors import Unsupported
from .absent import Absent, go_past, is_absent
from .attention import attend_padded
from .base import NORMS, Family, fit_modules, refuse_computed, refuse_tied, unsupported
from .registry import register
from .walk import Walk, identity, macs_of, unread

__all__ = ["PrunedSwinTransformerBlock", "PrunedWindowAttention", "Swin"]


class PrunedWindowAttention(timms.WindowAttention):
    """timm's ``WindowAttention`` with qk_dim query/key and v_dim value channels per head.

    ``scale`` stays the dense model's 1/√head_dim. ``qkv`` writes queries, keys and values, each head by head.
    """

    qk_dim: int
    v_dim: int

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within windows, (B · windows, N, C); ``mask`` (windows, N, N) as in timm's ``WindowAttention``."""
        B, N, _ = x.shape  # noqa: N806
        qk_all, v_all = self.num_heads * self.qk_dim, self.num_heads * self.v_dim
        q, k, v = self.qkv(x).split([qk_all, qk_all, v_all], dim=-1)
        q = q.reshape(B, N, self.num_heads, self.qk_dim).transpose(1, 2)
        k = k.reshape(B, N, self.num_heads, self.qk_dim).transpose(1, 2)
        v = v.reshape(B, N, self.num_heads, self.v_dim).transpose(1, 2)
        bias = self._get_rel_pos_bias()
        if mask is not None:
            windows = mask.shape[0]
            mask = mask.view(1, windows, 1, N, N).expand(B // windows, -1, self.num_heads, -1, -1)
            bias = bias + mask.reshape(-1, self.num_heads, N, N)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            y = attend_padded(q, k, v, self.qk_dim, self.v_dim, bias, dropout, False, self.scale)
        else:
            attn = self.softmax((q * self.scale) @ k.transpose(-2, -1) + bias)
            y = (self.attn_drop(attn) @ v).transpose(1, 2)
        out: torch.Tensor = self.proj_drop(self.proj(y.reshape(B, N, v_all)))
        return out


class PrunedSwinTransformerBlock(timms.SwinTransformerBlock):
    """timm's ``SwinTransformerBlock`` without its attention, its FFN, or both, which are ``Absent``."""

    if TYPE_CHECKING:  # torch.jit.script would read these as attributes' types
        attn: Any
        mlp: Any
        _attn: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add to (B, H, W, C) what is there."""
        if not hasattr(self.attn, "absent"):
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        elif not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = go_past(self, x, "attn")
        B, H, W, C = x.shape  # noqa: N806
        x = x.reshape(B, -1, C)
        if not hasattr(self.mlp, "absent"):
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        elif not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = go_past(self, x, "mlp")
        return x.reshape(B, H, W, C)

    def set_input_size(self, feat_size: Any, window_size: Any, always_partition: bool | None = None) -> None:
        """As in timm's ``SwinTransformerBlock``."""
        if not is_absent(self.attn):
            super().set_input_size(feat_size, window_size, always_partition)
            return
        self.input_resolution = feat_size
        if always_partition is not None:
            self.always_partition = always_partition
        self.window_size, self.shift_size = self._calc_window_shift(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]

    def _init_buffers(self) -> None:
        if not is_absent(self.attn):
            super()._init_buffers()


@register
class Swin(Family):
    """SwinTransformer; not V2, whose attention compares directions."""

    name = "swin"
    models = (timms.SwinTransformer,)

    def inspect(self, model: nn.Module) -> Anatomy:
        """Describe the model, or raise Unsupported naming the module and the reason."""
        return _Inspection(model).anatomy(self.name)

    def adapt(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
        """Make modules and attributes fit parameters that were just cut."""
        for group in anatomy.groups:
            if group.traits.whole and sizes[group.name] == 0:
                _drop_layer(model, group.name)
        for layer in anatomy.attention:
            if sizes[layer.name]:
                _fit_attention(model.get_submodule(layer.name), anatomy, layer, sizes)
        fit_modules(model)
        _fit_widths(model, sizes)

    def stock_sizes(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes after a cut to ``sizes`` whose attention modules are timm's own: one size per head in a layer."""
        del model
        pairs = [(layer.groups["qk"], layer.groups["v"]) for layer in anatomy.attention if sizes[layer.name]]
        return {**sizes, **{name: max(sizes[each] for each in pair) for pair in pairs for name in pair}}

    def make_stock(self, model: nn.Module, head_dims: Mapping[str, int]) -> None:
        """Make the attention modules timm's own, the same objects."""
        for name, head_dim in head_dims.items():
            attn: Any = model.get_submodule(name)
            attn.__class__, attn.scale = timms.WindowAttention, head_dim**-0.5
            for attribute in ("qk_dim", "v_dim"):
                vars(attn).pop(attribute, None)
        fit_modules(model)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of all stages, first to last."""
        stages: Any = model.layers
        return [block for stage in stages for block in stage.blocks]

    def from_block(self, model: nn.Module, index: int, x: torch.Tensor, sizes: Any = None) -> torch.Tensor:  # noqa: ARG002
        """The output of the model, given what enters a block: (B, H, W, width)."""
        swin: Any = model
        for stage in swin.layers:
            x = stage.downsample(x) if index < 0 else x
            for block in stage.blocks[max(0, index) :]:
                x = block(x)
            index -= len(stage.blocks)
        output: torch.Tensor = swin.forward_head(swin.norm(x))
        return output


def _drop_layer(model: nn.Module, name: str) -> None:
    """Take the attention or the FFN out of its block, with the modules around it."""
    parent, _, child = name.rpartition(".")
    block: Any = model.get_submodule(parent)
    number = 1 if child == "attn" else 2
    for place, module in ((child, Absent()), (f"norm{number}", nn.Identity()), (f"drop_path{number}", nn.Identity())):
        setattr(block, place, module.train(block.training))
    block.attn_mask = None if child == "attn" else block.attn_mask
    block.__class__ = PrunedSwinTransformerBlock


def _fit_attention(attn: Any, anatomy: Anatomy, layer: Layer, sizes: Mapping[str, int]) -> None:
    attn.num_heads = sizes[layer.groups["heads"]]
    qk, v = layer.groups["qk"], layer.groups["v"]
    if sizes[qk] != anatomy.sizes[qk] or sizes[v] != anatomy.sizes[v]:
        # The same object: its hooks and modes stay.
        attn.__class__ = PrunedWindowAttention
        attn.qk_dim, attn.v_dim = sizes[qk], sizes[v]


def _fit_widths(model: Any, sizes: Mapping[str, int]) -> None:
    # The last stage has no such group where its classifier cannot be cut.
    widths = [sizes.get(f"layers.{stage}.width", model.num_features) for stage in range(len(model.layers))]
    before = widths[0]
    for stage, width, info in zip(model.layers, widths, model.feature_info, strict=False):
        stage.dim, info["num_chs"] = before, width
        if type(stage.downsample) is timms.PatchMerging:
            stage.downsample.dim, stage.downsample.out_dim = before, width
        for block in stage.blocks:
            block.dim = width
            if not is_absent(block.attn):
                block.attn.dim = width
        before = width
    pooled = before * model.head.global_pool.feat_mult()
    model.embed_dim, model.num_features, model.head_hidden_size = widths[0], before, pooled
    model.head.in_features, model.head.num_features = before, pooled


def _require(name: str, module: nn.Module, *classes: type[nn.Module]) -> None:
    if type(module) not in classes:
        raise unsupported(name, module, f"{classes[0].__name__} by exact class")


class _Windows:
    """How a feature map (height, width) is split into windows (height, width), the last of a row or column padded."""

    def __init__(self, feature_map: tuple[int, int], size: tuple[int, int]) -> None:
        self.map, self.size = feature_map, size
        self.rows, self.columns = (ceil(side / step) for side, step in zip(feature_map, size, strict=True))
        self.number, self.tokens = self.rows * self.columns, size[0] * size[1]
        self.padded = self.number * self.tokens != feature_map[0] * feature_map[1]

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """(B · windows, N, C) to all tokens of an image, (B, windows · N, C)."""
        return x.reshape(-1, self.number * self.tokens, x.shape[-1])

    def cropped(self, x: torch.Tensor) -> torch.Tensor:
        """The same without the tokens that pad, which is a copy where there are any."""
        if not self.padded:
            return self.joined(x)
        x = x.reshape(-1, self.rows, self.columns, *self.size, x.shape[-1]).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, : self.map[0], : self.map[1]].flatten(1, 2)


class _Inspection(Walk):
    """One walk over a model, collecting groups, layers and products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.swin: Any = model
        embed: Any = model.patch_embed
        _require("patch_embed", embed, PatchEmbed)
        if embed.img_size is None:
            raise Unsupported("patch_embed: expected a size of images, which MACs are counted for, got none (img_size)")
        self.groups, self.blocks, self.norms, self.products = list[Group](), 0, list[NormSite](), list[Product]()
        self.layers, self.streams, self.absent = dict[str, Layer](), dict[str, Stream | str](), list[str]()
        # Of the walk's stage: map (height, width), residual stream, its writers and readers, why its basis must stay.
        self.map: tuple[int, int] = (int(embed.grid_size[0]), int(embed.grid_size[1]))
        self.stream, self.fixed, self.channels, self.members = "", "", unit_entries(0), list[Member]()
        self.writers, self.readers = dict[str, str | None](), dict[str, tuple[str, ...]]()
        self.refused = {"tokens": "SwinTransformer attends within windows, whose tokens have places"}

    def anatomy(self, family: str) -> Anatomy:
        """Describe the model, or raise Unsupported naming the module and the reason."""
        for name, norm in self.model.named_modules():
            if type(norm) in NORMS and norm.weight is None:
                raise Unsupported(f"{name}: expected a norm with a scale, got one without")
        _require("layers", self.swin.layers, nn.Sequential)
        for index, stage in enumerate(self.swin.layers):
            self.stage(f"layers.{index}", stage, first=index == 0)
        self.head()
        refuse_tied(self.model)
        architecture, arguments, handmade = identity(self.model)
        height, width = self.swin.patch_embed.img_size
        return Anatomy(
            family=family,
            architecture=architecture,
            arguments=arguments,
            input_size=(int(self.swin.patch_embed.proj.in_channels), int(height), int(width)),
            groups=tuple(self.groups),
            layers=self.layers,
            norms=tuple(self.norms),
            products=tuple(self.products),
            shapes={name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()},
            refused=self.refused,
            handmade=handmade,
            streams=self.streams,
            absent=tuple(self.absent),
        )

    def stage(self, name: str, stage: Any, *, first: bool) -> None:
        merging = f"{name}.downsample"
        _require(name, stage, timms.SwinTransformerStage)
        _require(merging, stage.downsample, nn.Identity if first else timms.PatchMerging)
        _require(f"{name}.blocks", stage.blocks, nn.Sequential)
        if first:
            self.open(name, "patch_embed.proj")
            if self.norm("patch_embed.norm", self.members, "stream", self.channels) is not None:
                self.fixed = "patch_embed.norm: it writes to the residual stream, channel by channel"
        else:
            width = self.channels.shape[1]
            neighbours = unit_entries(width, copies=4, stride=width)
            self.norm(f"{merging}.norm", self.members, "stream", neighbours)
            self.columns(f"{merging}.reduction", self.members, "stream", neighbours)
            self.close(f"{merging}.norm: it takes the mean and the variance of four tokens together")
            self.map = ceil(self.map[0] / 2), ceil(self.map[1] / 2)
            self.open(name, f"{merging}.reduction")
        for number, block in enumerate(stage.blocks):
            self.block(f"{name}.blocks.{number}", block)

    def open(self, stage: str, writer: str) -> None:
        """Begin a residual stream with the first layer that writes to it."""
        self.stream, self.channels = f"{stage}.width", unit_entries(len(self.linear(writer).weight))
        self.members, self.writers, self.readers, self.fixed = [], {writer: None}, {}, ""
        self.rows(writer, self.members, "writer", "stream", self.channels)
        self.products.append(WeightProduct(writer, self.map[0] * self.map[1]))

    def close(self, stream: Stream | str) -> None:
        """End it: all that it consists of has been seen."""
        self.streams[self.stream] = self.refused.get(self.stream, stream)
        if self.stream not in self.refused:
            self.groups.append(Group(self.stream, "width", None, self.channels.shape[1], tuple(self.members)))

    def head(self) -> None:
        """The final norm and the classifier, which read the last stage's stream."""
        head, width = self.swin.head, self.channels.shape[1]
        _require("head", head, ClassifierHead)
        pool = head.global_pool
        if type(head.fc) is nn.Identity:
            self.fixed = self.fixed or "head.fc: Identity, so the channels of the residual stream are the features"
        elif type(head.fc) is not nn.Linear:
            self.products.append(FixedProduct("head.fc", macs_of(head.fc, (width * pool.feat_mult(),))))
            self.refused[self.stream] = unread("head.fc", head.fc)
        else:
            entries = unit_entries(width, copies=pool.feat_mult(), stride=width)
            self.columns("head.fc", self.members, "stream", entries)
            self.products.append(WeightProduct("head.fc", 1 if pool.pool_type else self.map[0] * self.map[1]))
        self.stream_norm("norm", "head.fc")
        if "max" in pool.pool_type:
            self.fixed = self.fixed or f"head.global_pool: {pool.pool_type!r} takes maxima channel by channel"
        if self.swin.dynamic_img_size:
            self.fixed = self.fixed or "dynamic_img_size: some sizes have windows padded with zeros after the norm"
        kinds = {site.centred for site in self.norms if site.stream == self.stream}
        if len(kinds) > 1:
            self.fixed = self.fixed or "norms: both LayerNorm and RMSNorm read the residual stream"
        self.close(self.fixed or Stream(kinds.pop(), self.writers, (), self.readers))

    def block(self, name: str, block: Any) -> None:
        _require(name, block, timms.SwinTransformerBlock, PrunedSwinTransformerBlock)
        for child in ("drop_path1", "drop_path2"):
            _require(f"{name}.{child}", getattr(block, child), DropPath, nn.Identity)
        for child, describe in (("attn", self.attention), ("mlp", self.ffn)):
            if is_absent(getattr(block, child)):
                self.absent.append(f"{name}.{child}")
            else:
                describe(f"{name}.{child}", block)
        self.blocks += 1

    def stream_norm(self, name: str, reader: str) -> None:
        """A norm of the residual stream, and the linear layer after it."""
        centred = self.norm(name, self.members, "stream", self.channels)
        if centred is None:
            raise unsupported(name, self.model.get_submodule(name), "LayerNorm or RmsNorm")
        self.norms.append(NormSite(name, self.channels.shape[1], centred, pooled=False, stream=self.stream))
        self.readers[name] = (reader,)

    def layer(self, number: int, name: str, reader: str, writer: str, positions: int, **more: Any) -> None:
        """A layer's side of the residual stream: the norm, the linear layer that reads it and the one that writes."""
        block = name.rpartition(".")[0]
        norm = f"{block}.norm{number}"
        self.stream_norm(norm, reader)
        self.columns(reader, self.members, "stream", self.channels)
        self.rows(writer, self.members, "writer", "stream", self.channels)
        self.writers[writer] = None
        self.products += [WeightProduct(reader, positions), WeightProduct(writer, positions)]
        self.groups.append(Group(name, "layer", self.blocks, 1, (), modules=(name, norm)))
        more |= {"writer": writer, "branch": f"{block}.drop_path{number}", "stream": self.stream, "input_norm": norm}
        self.layers[name] = Layer(name=name, **more)

    def attention(self, name: str, module: Any) -> None:
        attn, windows = module.attn, _Windows(self.map, module.window_size)
        block, qkv, proj = name.rpartition(".")[0], f"{name}.qkv", f"{name}.proj"
        _require(name, attn, timms.WindowAttention, PrunedWindowAttention)
        refuse_computed(name, attn, "relative_position_bias_table")
        self.fixed = self.fixed or (f"{block}: windows are padded with zeros after the norm" if windows.padded else "")
        exact, heads = type(attn) is PrunedWindowAttention, int(attn.num_heads)
        qk_dim, v_dim = (attn.qk_dim, attn.v_dim) if exact else [self.linear(qkv).out_features // heads // 3] * 2
        span, values, positions = heads * qk_dim, heads * v_dim, windows.number * windows.tokens
        qk, v = list[Member](), list[Member]()
        self.rows(qkv, qk, "writer", "query", unit_entries(qk_dim, heads))
        self.rows(qkv, qk, "writer", "key", unit_entries(qk_dim, heads, start=span))
        self.rows(qkv, v, "writer", "value", unit_entries(v_dim, heads, start=2 * span))
        self.columns(proj, v, "output", unit_entries(v_dim, heads))
        table = Member(f"{name}.relative_position_bias_table", 1, unit_entries(heads), "bias_table", "elementwise")
        groups = {kind: f"{block}.{kind}" for kind in ("qk", "v", "heads")}
        self.groups += [
            Group(groups["qk"], "qk", self.blocks, qk_dim, tuple(qk), heads, within=groups["heads"]),
            Group(groups["v"], "v", self.blocks, v_dim, tuple(v), heads, within=groups["heads"]),
            Group(groups["heads"], "heads", self.blocks, heads, (table,)),
        ]
        # Each window has scores of its own; moments are over all tokens of an image.
        by_head = methodcaller("unflatten", -1, (heads, -1))
        scores = partial(Tap, groups["qk"], name, qkv, "output", span, view=by_head, maps_per_image=windows.number)
        taps = {
            "query": scores(channels=slice(0, span)),
            "key": scores(channels=slice(span, 2 * span)),
            "value": Tap(groups["v"], f"{name} v", qkv, "output", values, slice(2 * span, None), windows.joined),
            "output": Tap(proj, proj, proj, "input", values, view=windows.cropped),
        }
        settings = {"softmax_scale": float(attn.scale), "layout": "exact" if exact else "stock"}
        self.layer(1, name, qkv, proj, positions, kind="attention", groups=groups, taps=taps, **settings)
        sizes = groups["heads"], groups["qk"], groups["v"]
        self.products.append(AttentionProduct(name, positions, windows.tokens, *sizes, layer=name))

    def ffn(self, name: str, module: Any) -> None:
        mlp, group, fc1, fc2 = module.mlp, f"{name.rpartition('.')[0]}.ffn", f"{name}.fc1", f"{name}.fc2"
        _require(name, mlp, Mlp)
        _require(f"{name}.norm", mlp.norm, nn.Identity)
        members, size = list[Member](), int(mlp.fc2.in_features)
        self.rows(fc1, members, "writer", "hidden", unit_entries(size))
        self.columns(fc2, members, "output", unit_entries(size))
        self.groups.append(Group(group, "ffn", self.blocks, size, tuple(members)))
        taps = {"hidden": Tap(group, fc2, fc2, "input", size)}
        self.layer(2, name, fc1, fc2, self.map[0] * self.map[1], kind="ffn", groups={"ffn": group}, taps=taps)
