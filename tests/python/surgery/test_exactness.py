"""A pruned model computes what the dense one does with the same units switched off: every kind, random plans."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import secateur as sc
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KINDS, images, make
from pruning import check, plan_of, random_keep
from secateur.anatomy import entries
from secateur.families.absent import is_absent
from secateur.families.vision_transformer.modules import HeadNorm, PrunedAttention, PrunedBlock
from secateur.surgery import cut as surgery  # the module
from torch import nn

CUTS = ("qk", "v", "ffn", "width", "heads")


# All cuts of every kind at once, and two of them alone, in turn; other sets of cuts are `test_random_plans`.
@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for n, kind in enumerate(KINDS) for cut in ("all", CUTS[n % 5], CUTS[(n + 2) % 5])],
)
def test_every_kind_and_cut(kind, cut):
    dense = make(kind)
    kinds = CUTS if cut == "all" else (cut,)
    pruned = check(dense, random_keep(dense, 3, kinds, fraction=0.6), images(dense))
    assert sum(p.numel() for p in pruned.parameters()) == sc.inspect(pruned).params < sc.inspect(dense).params


# A whole block of every kind, and one layer of the other or the same block in turn.
@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        (kind, gone)
        for n, kind in enumerate([*KINDS, "post_norm"])
        for gone in [("blocks.1.attn", "blocks.1.mlp"), (("blocks.0.attn", "blocks.1.mlp")[n % 2],)]
    ],
)
def test_every_kind_without_a_layer(kind, gone):
    """Alone, and with all else cut as well; a block that has nothing left passes its input on."""
    dense = make(kind)
    absent = dict.fromkeys(gone, np.empty((1, 0), np.int64))
    check(dense, absent, images(dense))
    parts = {part for name in gone for part in {"attn": ("qk", "v", "heads"), "mlp": ("ffn",)}[name.split(".")[2]]}
    others = random_keep(dense, 4, ("qk", "v", "ffn", "heads", "width"), fraction=0.6)
    inside = {f"blocks.{name.split('.')[1]}.{part}" for name in gone for part in parts}
    keep = absent | {name: kept for name, kept in others.items() if name not in inside}
    pruned = check(dense, keep, images(dense))
    anatomy = sc.inspect(pruned)
    assert anatomy.absent == tuple(sorted(gone))
    assert sum(p.numel() for p in pruned.parameters()) == anatomy.params
    assert len(pruned.blocks) == len(dense.blocks)
    assert all(is_absent(pruned.get_submodule(name)) for name in gone)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**31 - 1),
    cut=st.sets(st.sampled_from(["qk", "v", "ffn", "width", "heads"]), min_size=1),
)
def test_random_plans(kind, seed, cut):
    dense = make(kind, seed)
    check(dense, random_keep(dense, seed, cut), images(dense, seed=seed))


@pytest.mark.parametrize("seed", range(4))
def test_trained_model(digits_model, digits_images, seed):
    check(digits_model, random_keep(digits_model, seed), digits_images[:8])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_cut_changes_no_bit(kind):
    model = make(kind)
    with torch.no_grad():
        before = model(images(model))
        for keep in ({}, random_keep(model, 0, fraction=1.0)):
            sc.prune(model, plan_of(model, keep), last_block="whole")
            assert torch.equal(model(images(model)), before)


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "inner_norms", "swiglu_packed", "map_pool", "gate", "distilled"])
def test_pruning_twice_is_pruning_once(kind):
    """The second round's indices are into the first's survivors; the dense softmax scale survives both."""
    dense = make(kind).double()
    once, twice = copy.deepcopy(dense), copy.deepcopy(dense)
    first = random_keep(dense, 1, fraction=0.8)
    sc.prune(twice, plan_of(twice, first))
    second = random_keep(twice, 2, fraction=0.6)
    sc.prune(twice, plan_of(twice, second))
    joined = {}
    for name, kept in first.items():
        # The second round's heads are the first's survivors; of the others any channels will do.
        staying = first[name.rpartition(".")[0] + ".heads"][0] if name.endswith((".qk", ".v")) else slice(None)
        joined[name] = kept[:, : second[name].shape[1]].copy()
        joined[name][staying] = np.take_along_axis(kept[staying], second[name], axis=1)
    sc.prune(once, plan_of(once, joined))
    x = images(dense).double()
    with torch.no_grad():
        assert torch.equal(once(x), twice(x))
        masked = reference.masked(dense, joined)
        expected = reference.outputs_to_compare(masked(x), masked, joined)
        assert float((twice(x) - expected).abs().max()) <= 1e-10
    assert twice.blocks[0].attn.scale == 13**-0.5


def _wrong_scale(monkeypatch):
    adopt = PrunedAttention.adopt

    def rescaled(attn, qk_dim, *rest):
        adopt(attn, qk_dim, *rest)
        attn.scale = qk_dim**-0.5

    monkeypatch.setattr(PrunedAttention, "adopt", rescaled)


def _wrong_eps(monkeypatch):
    adopt = HeadNorm.__init__
    monkeypatch.setattr(HeadNorm, "__init__", lambda self, h, s, eps, *rest: adopt(self, h, s, eps * 3, *rest))


def _wrong_index(monkeypatch):
    kept = surgery.kept_along_axes

    def shifted(anatomy, name, keep):
        axes = kept(anatomy, name, keep)
        return {dim: index.roll(1) if index[0] else index for dim, index in axes.items()}

    monkeypatch.setattr(surgery, "kept_along_axes", shifted)


def _shifted_bias(monkeypatch):
    cut = surgery.compact_parameter

    def compact(parameter, axes):
        cut(parameter, axes)
        if parameter.ndim == 1:
            parameter.data = parameter.data.roll(1)

    monkeypatch.setattr(surgery, "compact_parameter", compact)


def _off_by_one_unit(monkeypatch):
    kept = entries.kept_units

    def shifted(group, keep):
        heads, units = kept(group, keep)
        return heads, (units + 1) % group.size

    monkeypatch.setattr(entries, "kept_units", shifted)


def _other_heads(monkeypatch):
    kept = entries.kept_units

    def others(group, keep):
        heads, units = kept(group, keep)
        return (heads + (group.kind == "qk")) % group.heads, units

    monkeypatch.setattr(entries, "kept_units", others)


def _branch_left(monkeypatch):
    monkeypatch.setattr(PrunedBlock, "forward", lambda self, x, *rest: x + self.ls2(self.mlp(self.norm2(x))) / 2)


@pytest.mark.parametrize(
    "sabotage",
    [_wrong_scale, _wrong_eps, _wrong_index, _shifted_bias, _off_by_one_unit, _other_heads, _branch_left],
)
def test_a_broken_build_is_caught(sabotage, monkeypatch):
    dense = make("qk_norm")
    keep = {**random_keep(dense, 5, fraction=0.5), "blocks.1.attn": np.empty((1, 0), np.int64)}
    check(dense, keep, images(dense))
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, sc.Error)):
        check(dense, keep, images(dense))


def test_the_softmax_temperature_matters():
    """1/√d_kept instead of the dense scale is another model, far outside the bars."""
    dense = make("plain").double()
    keep = random_keep(dense, 5, ("qk",), fraction=0.5)
    x = images(dense).double()
    right, wrong = copy.deepcopy(dense), copy.deepcopy(dense)
    sc.prune(right, plan_of(right, keep))
    sc.prune(wrong, plan_of(wrong, keep))
    for block in wrong.blocks:
        block.attn.scale = block.attn.qk_dim**-0.5
    with torch.no_grad():
        assert float((right(x) - wrong(x)).abs().max()) > 1e-3


def test_no_module_of_timm_is_left_with_a_wrong_size(digits_model):
    pruned = copy.deepcopy(digits_model)
    sc.prune(pruned, plan_of(pruned, random_keep(pruned, 0, fraction=0.5)))
    for module in pruned.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        if isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == tuple(module.weight.shape)
