"""Each attention class of the table, alone: a cut computes what the dense module does with the units masked out."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import outside
import pytest
import secateur as sc
import timm.layers
import torch
from attention_cases import (
    Case,
    Column,
    apart,
    by_head,
    fused,
    in_all_heads,
    randomise,
    rotary,
    rows_of_a_map,
    structured,
    together,
    with_biases,
)
from secateur.anatomy import Anatomy
from secateur.families.attentions import Call, attention_entry, attention_refused
from secateur.families.attentions.base import entries
from secateur.surgery.cut import cut
from timm.layers import LayerNorm, RelPosBias, RelPosBiasTf, RelPosMlp, RmsNorm
from timm.models import (
    beit,
    cait,
    crossvit,
    davit,
    edgenext,
    efficientformer,
    eva,
    fastvit,
    gcvit,
    hiera,
    hieradet_sam2,
    levit,
    maxxvit,
    metaformer,
    mvitv2,
    nest,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    tiny_vit,
    tnt,
    twins,
    visformer,
    vision_transformer_relpos,
    volo,
    xcit,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TOKENS = (2, 15, 18)
APART = {"query": "q_bias", "key": "k_bias", "value": "v_bias"}


def x(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(name, build, *inputs, where=None, **more):
    return Case(name, build, lambda: inputs or (x(*TOKENS),), where or fused(), **more)


OF_KV = apart(query="q", key="kv", value=("kv", 1))
POOLS = {"kernel_q": (3, 3), "kernel_kv": (3, 3)}
NORMED = {"norms": {"query": "q_norm", "key": "k_norm"}}
ATTENTION = partial(timm.layers.Attention, 18, 3)
CASES = [
    case("Attention", ATTENTION),
    case("Attention-bias-norms", partial(ATTENTION, qkv_bias=True, qk_norm=True, norm_layer=LayerNorm), **NORMED),
    case(
        "Attention-gate-rms",
        partial(
            ATTENTION, qkv_bias=True, proj_bias=False, gated=True, qk_norm=True, scale_norm=True, norm_layer=RmsNorm
        ),
        inner="norm",
        **NORMED,
    ),
    case("Attention-wide-heads", partial(ATTENTION, attn_head_dim=7, dim_out=11), sizes=(3, 7, 7)),
    case("MetaFormer", partial(metaformer.Attention, 18, 6, num_heads=3)),
    case("MetaFormer-bias", partial(metaformer.Attention, 18, 6, qkv_bias=True, proj_bias=True)),
    case("DaViT-window", partial(davit.WindowAttention, 18, (3, 5), 3), x(8, 15, 18)),
    case("NesT", partial(nest.Attention, 18, 3, qkv_bias=True), x(2, 4, 9, 18)),
    case("VOLO", partial(volo.Attention, 18, 3), x(2, 3, 5, 18)),
    case("VOLO-bias", partial(volo.Attention, 18, 3, qkv_bias=True), x(2, 3, 5, 18)),
    case("FastViT", partial(fastvit.Attention, 18, 6), x(2, 18, 3, 5)),
    case("FastViT-bias", partial(fastvit.Attention, 18, 6, qkv_bias=True), x(2, 18, 3, 5)),
    case("Visformer", partial(visformer.Attention, 18, 3), x(2, 18, 3, 5)),
    case("Visformer-narrow", partial(visformer.Attention, 18, 3, head_dim_ratio=0.5), x(2, 18, 3, 5), sizes=(3, 3, 3)),
    case("Twins-local", partial(twins.LocallyGroupedAttn, 18, 3, ws=3), x(2, 35, 18), (5, 7)),
    case("Swin", partial(swin_transformer.WindowAttention, 18, 3, window_size=(3, 5)), x(8, 15, 18)),
    case(
        "Swin-mask",
        partial(swin_transformer.WindowAttention, 18, 3, window_size=(3, 5), qkv_bias=False),
        x(8, 15, 18),
        x(4, 15, 15),
    ),
    case("Hiera-units", partial(hiera.MaskUnitAttention, 11, 18, 3, 4, 3, True), x(2, 48, 11)),
    case("Hiera-global", partial(hiera.MaskUnitAttention, 18, 18, 3, 1, 3, False), x(2, 15, 18)),
    case("Hiera-global-pool", partial(hiera.MaskUnitAttention, 18, 18, 3, 4, 3, False), x(2, 48, 18)),
    case("SAM2", partial(hieradet_sam2.MultiScaleAttention, 11, 18, 3), x(2, 4, 6, 11)),
    case("SAM2-pool", partial(hieradet_sam2.MultiScaleAttention, 11, 18, 3, q_pool=nn.MaxPool2d(2, 2)), x(2, 4, 6, 11)),
    case("GCViT", partial(gcvit.WindowAttentionGlobal, 18, 3, (3, 5), use_global=False), x(8, 15, 18)),
    case(
        "GCViT-global",
        partial(gcvit.WindowAttentionGlobal, 18, 3, (3, 5)),
        x(8, 15, 18),
        x(2, 3, 5, 18),
        where=lambda sizes, part, head, unit: [("qkv", 18 + head * 6 + unit, None)],
        kinds=("v",),
        refused=("qk", "heads"),
    ),
    case("RelPos", partial(vision_transformer_relpos.RelPosAttention, 18, 3)),
    *(
        case(
            f"RelPos-{cls.__name__}",
            partial(
                vision_transformer_relpos.RelPosAttention,
                18,
                3,
                qkv_bias=True,
                qk_norm=True,
                rel_pos_cls=partial(cls, window_size=(3, 5)),
            ),
            **NORMED,
        )
        for cls in (RelPosBias, RelPosBiasTf, RelPosMlp)
    ),
    case(
        "RelPos-shared",
        partial(vision_transformer_relpos.RelPosAttention, 18, 3),
        x(*TOKENS),
        x(1, 3, 15, 15),
        kinds=("qk", "v"),
        refused=("heads",),
    ),
    case("BEiT", partial(beit.Attention, 18, 3)),
    case(
        "BEiT-bias",
        partial(beit.Attention, 18, 3, qkv_bias=True, window_size=(2, 7)),
        where=fused(biases=APART),
    ),
    case(
        "BEiT-shared",
        partial(beit.Attention, 18, 3, qkv_bias=True, qkv_bias_separate=True, attn_head_dim=6),
        x(*TOKENS),
        x(1, 3, 15, 15),
        where=fused(biases=APART),
        kinds=("qk", "v"),
        refused=("heads",),
    ),
    case("PVTv2", partial(pvt_v2.Attention, 18, 3), x(2, 15, 18), (3, 5), where=OF_KV),
    case("PVTv2-reduced", partial(pvt_v2.Attention, 18, 3, sr_ratio=2), x(2, 35, 18), (5, 7), where=OF_KV),
    case("PVTv2-pooled", partial(pvt_v2.Attention, 18, 3, linear_attn=True), x(2, 99, 18), (9, 11), where=OF_KV),
    case("Twins-global", partial(twins.GlobalSubSampleAttn, 18, 3, sr_ratio=2), x(2, 35, 18), (5, 7), where=OF_KV),
    case("CaiT-class", partial(cait.ClassAttn, 18, 3, qkv_bias=True), where=apart(query="q", key="k", value="v")),
    case("VOLO-class", partial(volo.ClassAttention, 18, 3), where=OF_KV),
    case("VOLO-class-wide", partial(volo.ClassAttention, 18, 3, head_dim=7), where=OF_KV, sizes=(3, 7, 7)),
    case("CrossViT", partial(crossvit.CrossAttention, 18, 3), where=apart(query="wq", key="wk", value="wv")),
    case(
        "TNT",
        partial(tnt.Attention, 18, 12, 3, qkv_bias=True),
        where=apart(query="qk", key=("qk", 1), value="v"),
        sizes=(3, 4, 6),
    ),
    *(
        case(f"MaxxVit-{name}", partial(maxxvit.AttentionCl, 18, dim_head=6, **more), x(8, 3, 5, 18), where=where)
        for name, more, where in (
            ("last", {}, by_head()),
            ("fused", {"head_first": False, "bias": False}, fused()),
            ("swin", {"rel_pos_cls": partial(RelPosBias, window_size=(3, 5))}, by_head()),
            ("tf", {"rel_pos_cls": partial(RelPosBiasTf, window_size=(3, 5))}, by_head()),
        )
    ),
    case(
        "MaxxVit-wide",
        partial(maxxvit.AttentionCl, 12, 18, dim_head=6, rel_pos_cls=partial(RelPosMlp, window_size=(3, 5))),
        x(8, 3, 5, 12),
        where=by_head(),
    ),
    case("MaxxVit-first", partial(maxxvit.Attention2d, 18, dim_head=6), x(8, 18, 3, 5), where=by_head()),
    case(
        "MaxxVit-first-bias",
        partial(
            maxxvit.Attention2d,
            18,
            11,
            dim_head=6,
            head_first=False,
            expand_first=False,
            rel_pos_cls=partial(RelPosBias, window_size=(3, 5)),
        ),
        x(8, 18, 3, 5),
    ),
    case(
        "MaxxVit-shared",
        partial(maxxvit.Attention2d, 18, dim_head=6),
        x(2, 18, 3, 5),
        x(1, 3, 15, 15),
        where=by_head(),
        kinds=("qk", "v"),
        refused=("heads",),
    ),
    case(
        "EfficientFormer",
        partial(efficientformer.Attention, 18, 5, 3, 1.5, (3, 5)),
        where=by_head(),
        sizes=(3, 5, 7),
    ),
    case("TinyViT", partial(tiny_vit.Attention, 18, 6, 3, 1, (3, 5)), x(8, 15, 18), where=by_head()),
    case("LeViT", partial(levit.Attention, 18, 5, 3, 1.5, (3, 5)), where=by_head("qkv.linear"), sizes=(3, 5, 7)),
    case(
        "LeViT-conv",
        partial(levit.Attention, 18, 5, 3, 1.5, (3, 5), use_conv=True),
        x(2, 18, 3, 5),
        where=by_head("qkv.linear"),
        sizes=(3, 5, 7),
    ),
    case("SwinV2", partial(swin_transformer_v2.WindowAttention, 18, (3, 5), 3, qkv_bias=False), x(8, 15, 18)),
    case(
        "SwinV2-mask",
        partial(swin_transformer_v2.WindowAttention, 18, (3, 5), 3),
        x(8, 15, 18),
        x(4, 15, 15),
        where=fused(biases=APART),
    ),
    case(
        "CaiT-talking",
        partial(cait.TalkingHeadAttn, 18, 3, qkv_bias=True),
        kinds=("qk", "v"),
        refused=("heads",),
    ),
    *(
        case(name, build, where=rows_of_a_map, kinds=("v", "heads"), refused=("qk",), tapped=False)
        for name, build in (
            ("XCiT", partial(xcit.XCA, 18, 3)),
            ("XCiT-bias", partial(xcit.XCA, 18, 3, qkv_bias=True)),
            ("EdgeNeXt", partial(edgenext.CrossCovarianceAttn, 18, 3, qkv_bias=True)),
            ("DaViT-channels", partial(davit.ChannelAttention, 18, 3, qkv_bias=True)),
            ("DaViT-channels-2", partial(davit.ChannelAttentionV2, 18, 3)),
            ("DaViT-channels-2-fixed", partial(davit.ChannelAttentionV2, 18, 3, dynamic_scale=False)),
        )
    ),
    *(
        case(
            f"MobileNetV4{name}",
            partial(timm.layers.MultiQueryAttention2d, 18, 11, 3, 6, 7, **more),
            x(2, 18, 6, 10),
            where=in_all_heads,
            sizes=(3, 6, 7),
            kinds=("qk", "v"),
            refused=("heads",),
        )
        for name, more in (
            ("", {}),
            ("-bias", {"use_bias": True}),
            ("-strides", {"query_strides": 2, "kv_stride": 2}),
        )
    ),
    *(
        case(
            f"MViTv2-{name}",
            partial(mvitv2.MultiScaleAttention, 11, 18, (6, 6), 3, **more),
            x(2, 37 if more.get("has_cls_token", True) else 36, 11),
            (6, 6),
            where=together if more.get("residual_pooling", True) else fused(),
            kinds=("v", "heads") if more.get("residual_pooling", True) else ("qk", "v", "heads"),
            refused=("qk",) if more.get("residual_pooling", True) else (),
            joined=more.get("residual_pooling", True),
            norms={"query": "norm_q", "key": "norm_k", "value": "norm_v"} if "kernel_q" in more else {},
            tapped=False,
        )
        for name, more in (
            ("plain", {}),
            ("pooled", {**POOLS, "stride_q": (2, 2)}),
            ("no-class", {**POOLS, "has_cls_token": False, "stride_kv": (2, 2)}),
            ("not-residual", {**POOLS, "residual_pooling": False, "stride_kv": (3, 3)}),
            ("no-positions", {**POOLS, "rel_pos_type": "", "residual_pooling": False, "qkv_bias": False}),
        )
    ),
    *(
        case(
            f"{cls.__name__}-{name}",
            partial(cls, 24, 3, **more),
            x(2, 15, 24),
            x(*rope),
            where=rotary(
                {"query": ("qkv", 0), "key": ("qkv", 24), "value": ("qkv", 48)}
                if more.get("qkv_fused", True)
                else {"query": ("q_proj", 0), "key": ("k_proj", 0), "value": ("v_proj", 0)},
                half=more.get("rotate_half", False),
            ),
            sizes=(3, 4, 8),
            pairs="half" if more.get("rotate_half", False) else "next",
            kinds=("qk", "v", "heads") if len(rope) == 2 else ("qk", "v"),
            refused=() if len(rope) == 2 else ("heads",),
            inner="norm" if more.get("scale_norm") else None,
            norms={"query": "q_norm", "key": "k_norm"} if more.get("qk_norm") else {},
        )
        for cls in (eva.EvaAttention, timm.layers.AttentionRope)
        for name, more, rope in (
            ("plain", {"scale_norm": False, "qkv_bias": False}, (14, 16)),
            ("half", {"scale_norm": False, "rotate_half": True, "qkv_bias": False, "gated": True}, (14, 16)),
            ("mixed", {"scale_norm": False, "qkv_bias": False, "qkv_fused": False}, (3, 14, 16)),
            (
                "norms",
                {
                    "scale_norm": True,
                    "qk_norm": True,
                    "norm_layer": LayerNorm,
                    "qkv_fused": False,
                    "num_prefix_tokens": 1,
                },
                (14, 16),
            ),
            (
                "half-norms",
                {"scale_norm": True, "qk_norm": True, "norm_layer": RmsNorm, "rotate_half": True, "qkv_bias": False},
                (14, 16),
            ),
        )
    ),
    *(
        case(
            f"EvaAttention-biases-{separate}",
            partial(eva.EvaAttention, 24, 3, scale_norm=False, qkv_bias_separate=separate),
            x(2, 15, 24),
            x(14, 16),
            where=with_biases(
                rotary({"query": ("qkv", 0), "key": ("qkv", 24), "value": ("qkv", 48)}, half=False), APART
            ),
            sizes=(3, 4, 8),
            pairs="next",
        )
        for separate in (False, True)
    ),
    case("EvaAttention-without", partial(eva.EvaAttention, 18, 3, scale_norm=False, qkv_bias=False)),
    case(
        "AttentionRope-grouped",
        partial(
            timm.layers.AttentionRope,
            20,
            6,
            attn_head_dim=8,
            num_kv_heads=3,
            qkv_fused=False,
            qk_norm=True,
            scale_norm=True,
            norm_layer=LayerNorm,
            gated=True,
            rotate_half=True,
        ),
        x(2, 15, 20),
        x(14, 16),
        where=rotary({"query": ("q_proj", 0), "key": ("k_proj", 0), "value": ("v_proj", 0)}, half=True, shared=2),
        sizes=(3, 4, 8),
        pairs="half",
        shared=2,
        inner="norm",
        **NORMED,
    ),
]


class OverKept(nn.Module):
    """A norm over the entries of the last axis that stay, (heads, size) or (size,); all others are zero."""

    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x):
        kept = self.kept if self.kept.ndim == 1 else self.kept[:, None]
        count = kept.sum(-1, keepdim=True).clamp(min=1)
        mean = (x * kept).sum(-1, keepdim=True) / count if isinstance(self.norm, nn.LayerNorm) else 0.0
        centred = (x - mean) * kept
        y = centred / ((centred**2).sum(-1, keepdim=True) / count + self.norm.eps).sqrt()
        if self.norm.weight is not None:
            y = y * self.norm.weight
        if getattr(self.norm, "bias", None) is not None:
            y = y + self.norm.bias
        return y * kept


def zero(module, place):
    if isinstance(place, Column):
        module.get_submodule(place.layer).weight[:, place.index] = 0
        return
    linear, row, bias = place
    layer = module.get_submodule(linear)
    layer.weight[row] = 0
    if layer.bias is not None:
        layer.bias[row] = 0
    if bias is not None and getattr(module, bias[0]) is not None:
        getattr(module, bias[0])[bias[1]] = 0
    for tensor in ("weight", "bias"):
        norm = getattr(module.get_submodule(linear.rpartition(".")[0]), "bn", None) if "." in linear else None
        if norm is not None:
            getattr(norm, tensor)[row] = 0


@torch.no_grad()
def masked(module, case, keep):
    """The dense module, whose removed units are zero wherever they are made; norms do not count them."""
    module = copy.deepcopy(module)
    heads, qk, v = case.sizes
    here = set(keep["heads"][0].tolist()) if "heads" in keep else set(range(heads))
    units = {kind: keep.get(kind, np.tile(np.arange(size), (heads, 1))) for kind, size in (("qk", qk), ("v", v))}
    if len(units["qk"]) == 1:
        units["qk"] = np.tile(units["qk"], (heads, 1))
    if len(units["v"]) == 1:
        units["v"] = np.tile(units["v"], (heads, 1))
    for part in ("query", "key", "value"):
        kind, size = ("v", v) if part == "value" else ("qk", qk)
        for head in range(heads):
            for unit in range(size):
                gone = unit not in units[kind][head] or (kind == "v" and head not in here)
                if gone and (kind in keep or "heads" in keep):
                    for place in case.where(case.sizes, part, head, unit):
                        zero(module, place)
    for part, name in case.norms.items():
        kind = "v" if part == "value" or case.joined else "qk"
        channels = [case.channels(unit) if kind == "qk" else [unit] for unit in range(v if kind == "v" else qk)]
        kept = torch.zeros(heads, sum(map(len, channels)), dtype=torch.bool)
        for head in here:
            kept[head, [channel for unit in units[kind][head] for channel in channels[unit]]] = True
        kept = kept.repeat_interleave(case.shared if part == "query" else 1, dim=0)
        setattr(module, name, OverKept(getattr(module, name), kept))
    if case.inner:
        kept = torch.zeros(heads, v, dtype=torch.bool)
        for head in here:
            kept[head, units["v"][head]] = True
        kept = kept.repeat_interleave(case.shared, dim=0).flatten()
        setattr(module, case.inner, OverKept(getattr(module, case.inner), kept))
    return module


class Alone:
    """A family of one module, for the cut."""

    def __init__(self, entry, module):
        self.entry, self.module = entry, module

    def adapt(self, model, anatomy, sizes):
        kinds = {group.kind: sizes[group.name] for group in anatomy.groups}
        self.entry.fit(model.attn, kinds)


def anatomy_of(model, described):
    return Anatomy(
        family="alone",
        architecture="",
        arguments={},
        input_size=(3, 1, 1),
        groups=described.groups,
        layers={},
        norms=(),
        products=(*described.products,),
        shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        buffers=described.buffers,
    )


def described(case, module):
    entry = attention_entry(module)
    return entry, entry.describe(module, "attn", Call(case.inputs(), images=case.images))


def removed(case, found, seed=3):
    """Units to keep: other ones in each head, and other sizes for queries than for values."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in found.groups:
        if group.kind in case.kinds:
            count = {"qk": max(1, group.size - 2), "v": max(1, group.size - 3), "heads": group.size - 1}[group.kind]
            rows = [np.sort(rng.permutation(group.size)[:count]) for _ in range(group.heads)]
            keep[group.kind] = np.stack(rows)
    return keep


def cut_alone(case, module, keep):
    """The module after a cut, with its anatomy and the sizes."""
    model = nn.ModuleDict({"attn": copy.deepcopy(module)})
    entry, found = described(case, model["attn"])
    anatomy = anatomy_of(model, found)
    names = {f"attn.{kind}": indices for kind, indices in keep.items()}
    model.attn = model["attn"]
    entry.prepare(model.attn, Call(case.inputs(), images=case.images))
    family = Alone(entry, model.attn)
    cut(model, family, anatomy, names, {})
    return model.attn, anatomy, {name: indices.shape[1] for name, indices in names.items()}


def output(module, case):
    with torch.no_grad():
        out = module(*case.inputs())
    return out[0] if isinstance(out, tuple) else out


def of_one_image(case):
    given = case.inputs()
    per_image = (len(given[0]), case.images)
    of_one = lambda x: x[: len(x) // case.images] if torch.is_tensor(x) and len(x) in per_image else x  # noqa: E731
    return tuple(map(of_one, given))


def subsets(case):
    """Each kind alone, and all together."""
    return [(kind,) for kind in case.kinds] + ([case.kinds] if len(case.kinds) > 1 else [])


@pytest.mark.parametrize("weights", [randomise, lambda m: structured(randomise(m))], ids=["random", "structured"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cut_computes_what_the_masked_module_does(case, weights):
    module = weights(case.build())
    _, found = described(case, module)
    assert {group.kind for group in found.groups} == set(case.kinds)
    assert set(found.refused) == set(case.refused)
    everything = removed(case, found)
    for kinds in subsets(case):
        keep = {kind: everything[kind] for kind in kinds}
        expected = output(masked(module, case, keep), case)
        assert not torch.allclose(expected, output(module, case), atol=1e-4)  # the units matter
        for is_fused in (True, False):
            if hasattr(module, "fused_attn"):
                module.fused_attn = is_fused
            after, _, _ = cut_alone(case, module, keep)
            torch.testing.assert_close(output(after, case), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cut_module_can_be_copied_pickled_trained_and_given_its_weights(case):
    module = randomise(case.build())
    _, found = described(case, module)
    keep = removed(case, found)
    after, _, _ = cut_alone(case, module, keep)
    other, _, _ = cut_alone(case, randomise(case.build(), seed=9), {kind: first(each) for kind, each in keep.items()})
    other.load_state_dict(after.state_dict())
    if getattr(after, "k_bias", None) is not None:
        other.k_bias.copy_(after.k_bias)  # always zero in timm, so no part of the state
    expected = output(after, case)
    for each in (copy.deepcopy(after), pickle.loads(pickle.dumps(after)), other):
        assert type(each) is type(after)
        torch.testing.assert_close(output(each, case), expected, rtol=0, atol=0)
    dense = masked(module, case, keep)
    for each in (dense, after):
        each.train()  # some of timm's return nothing
    torch.manual_seed(0)  # networks of position biases have dropout
    expected = output(dense, case)
    torch.manual_seed(0)
    torch.testing.assert_close(output(after, case), expected, rtol=1e-10, atol=1e-10)
    out = after(*case.inputs())
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    assert all(p.grad is not None for name, p in after.named_parameters())


def first(indices):
    """As many units, the first ones."""
    return np.tile(np.arange(indices.shape[1]), (len(indices), 1))


@pytest.mark.parametrize("case", [each for each in CASES if each.tapped], ids=str)
def test_taps_see_the_unit_that_is_zero(case):
    module = randomise(case.build())
    _, found = described(case, module)
    if found.layer is None:
        pytest.skip("neither scores nor values are observed")
    heads, qk, v = case.sizes
    for part in ("query", "key", "value"):
        size = v if part == "value" else qk
        for head in range(heads):
            for unit in (0, size - 1):
                bare = copy.deepcopy(module)
                with torch.no_grad():
                    for place in case.where(case.sizes, part, head, unit):
                        zero(bare, place)
                seen = observed(bare, found.layer, case)
                axes = tuple(range(seen[part].ndim - (1 if part == "value" else 2)))
                gone = (seen[part] == 0).all(dim=axes).flatten()
                assert gone.nonzero().flatten().tolist() == [head * size + unit]
                if part == "value" and not case.inner:
                    assert (seen["output"] == 0).all(dim=(0, 1)).nonzero().flatten().tolist() == [head * v + unit]


def observed(module, layer, case):
    """What each tap sees."""
    seen, hooks = {}, []
    for part, tap in layer.taps.items():
        at = module.get_submodule(tap.module.removeprefix("attn."))

        def hook(_, given, out, part=part, tap=tap):
            seen[part] = tap.read(given[0] if tap.at == "input" else out)

        hooks.append(at.register_forward_hook(hook))
    output(module, case)
    assert all(len(x) % case.images == 0 for x in seen.values())
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_and_macs_are_counted_before_and_after(case):
    module = randomise(case.build())
    _, found = described(case, module)
    keep = removed(case, found)
    if hasattr(module, "fused_attn"):
        module.fused_attn = False
    after, anatomy, sizes = cut_alone(case, module, keep)
    for each, at in ((module, {}), (after, sizes)):
        assert anatomy.params_at(at) == sum(p.numel() for p in each.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each(*of_one_image(case))
        assert anatomy.macs_at(at) == counter.get_total_flops() / 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_module_can_be_cut_again(case):
    module = randomise(case.build())
    _, found = described(case, module)
    keep = removed(case, found)
    once, _, _ = cut_alone(case, module, keep)
    entry, again = described(case, once)
    assert attention_entry(module) is entry
    assert {g.kind: g.size for g in again.groups} == {kind: indices.shape[1] for kind, indices in keep.items()}


def test_every_class_of_the_table_has_a_case():
    known = {cls for entry in entries if type(entry).__module__.startswith("secateur.") for cls in entry.modules}
    assert known == {type(case.build()) for case in CASES}


def test_a_class_is_accepted_by_exact_type():
    class Mine(timm.layers.Attention):
        pass

    assert attention_entry(Mine(18, 3)) is None
    assert attention_entry(nn.Linear(3, 3)) is None
    with pytest.raises(sc.InvalidArgument, match="module: expected nn.Module, got int"):
        attention_entry(3)


def test_a_class_without_an_entry_is_refused_by_name():
    assert attention_refused(volo.OutlookAttention(18, 3)).startswith("OutlookAttention: its weights come from one")
    assert attention_refused(nn.Linear(3, 3)) == "Linear: expected a class of the attention table by exact class"
    assert attention_refused(cait.ClassAttn(18, 3)) is None
    with pytest.raises(sc.InvalidArgument, match="module: expected nn.Module, got int"):
        attention_refused(3)


def test_a_module_of_an_unknown_class_within_is_named():
    attn = timm.layers.Attention(18, 3)
    attn.qkv = nn.Sequential(attn.qkv)
    with pytest.raises(sc.Unsupported, match=r"^blocks\.0\.attn\.qkv: expected nn\.Linear, got Sequential$"):
        attention_entry(attn).describe(attn, "blocks.0.attn", Call((x(*TOKENS).float(),), images=2))


def test_an_entry_of_another_package(tmp_path):
    """That of docs/extending, found by its entry point, in a process of its own."""
    page = (outside.DOCS / "attention.md").read_text()
    use = page.split("```python\n")[2].partition("```")[0]
    outside.run(outside.installed(tmp_path, *outside.documented("attention.md")), use)
