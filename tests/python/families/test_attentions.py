"""Each attention class of the table, alone: a cut computes what the dense module does with the units masked out."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import secateur as sc
import torch
import timm.layers
from attention_cases import Case, apart, by_head, fused, randomise, structured
from secateur.anatomy import Anatomy
from secateur.families.attentions import Call, attention_entry
from secateur.surgery.cut import cut
from timm.layers import LayerNorm, RelPosBias, RelPosBiasTf, RelPosMlp, RmsNorm
from timm.models import (
    beit,
    davit,
    fastvit,
    gcvit,
    hiera,
    hieradet_sam2,
    metaformer,
    nest,
    swin_transformer,
    twins,
    vision_transformer_relpos,
    visformer,
    volo,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TOKENS = (2, 15, 18)
APART = {"query": "q_bias", "key": "k_bias", "value": "v_bias"}


def x(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(name, build, *inputs, where=None, **more):
    return Case(name, build, lambda: inputs or (x(*TOKENS),), where or fused(), **more)


NORMED = {"norms": {"query": "q_norm", "key": "k_norm"}}
ATTENTION = partial(timm.layers.Attention, 18, 3)
CASES = [
    case("Attention", ATTENTION),
    case("Attention-bias-norms", partial(ATTENTION, qkv_bias=True, qk_norm=True, norm_layer=LayerNorm), **NORMED),
    case(
        "Attention-gate-rms",
        partial(ATTENTION, qkv_bias=True, proj_bias=False, gated=True, qk_norm=True, scale_norm=True, norm_layer=RmsNorm),
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
    case(
        "SAM2-pool", partial(hieradet_sam2.MultiScaleAttention, 11, 18, 3, q_pool=nn.MaxPool2d(2, 2)), x(2, 4, 6, 11)
    ),
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
]


class OverKept(nn.Module):
    """A norm over the entries of the last axis that stay, (heads, size) or (size,); all others are zero."""

    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x):
        kept = self.kept if self.kept.ndim == 1 else self.kept[:, None]
        count = kept.sum(-1, keepdim=True)
        mean = (x * kept).sum(-1, keepdim=True) / count if isinstance(self.norm, nn.LayerNorm) else 0.0
        centred = (x - mean) * kept
        y = centred / ((centred**2).sum(-1, keepdim=True) / count + self.norm.eps).sqrt()
        if self.norm.weight is not None:
            y = y * self.norm.weight
        if getattr(self.norm, "bias", None) is not None:
            y = y + self.norm.bias
        return y * kept


def zero(module, place):
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
    kept = torch.zeros(heads, qk, dtype=torch.bool)
    for head in range(heads):
        kept[head, units["qk"][head]] = True
    for name in case.norms.values():
        setattr(module, name, OverKept(getattr(module, name), kept))
    if case.inner:
        kept = torch.zeros(heads, v, dtype=torch.bool)
        for head in here:
            kept[head, units["v"][head]] = True
        setattr(module, case.inner, OverKept(getattr(module, case.inner), kept.flatten()))
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
        products=(*described.products, ),
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


def test_a_class_is_accepted_by_exact_type():
    class Mine(timm.layers.Attention):
        pass

    assert attention_entry(Mine(18, 3)) is None
    assert attention_entry(nn.Linear(3, 3)) is None
    with pytest.raises(sc.InvalidArgument, match="module: expected nn.Module, got int"):
        attention_entry(3)
