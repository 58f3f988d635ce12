"""Counts: rounding, ratios, published files, budgets."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from prepared import prepared
from secateur.budgets.allocate import allocate
from secateur.budgets.limits import kept_count
from secateur.budgets.ratios import counts_from_ratios
from secateur.budgets.snp_names import shipped_configurations
from secateur.surgery.structure import Structure
from small_vits import small_batches, small_vit
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

NONE = {"groups": None, "freeze": (), "min_keep": {}, "round_to": None}


def counts_from_target(*args, **kwargs):
    return allocate(*args, **kwargs).sizes


def anatomy_of(name="deit_small_patch16_224", **kwargs):
    return sc.inspect(timm.create_model(name, device="meta", **kwargs))


@pytest.mark.parametrize(
    ("size", "fraction", "multiple", "expected"),
    [
        (64, 0.390625, 1, 39),
        (64, 0.0, 8, 64),
        (5, 0.5, 1, 3),  # 2.5 removed: half to even is 2
        (7, 0.5, 1, 3),  # 3.5 removed: half to even is 4
        (64, 0.999, 1, 1),
        (64, 0.99, 8, 8),
        (64, 0.5625, 8, 32),  # 28 kept lies between 24 and 32: the larger
        (64, 0.6, 8, 24),  # 26 kept
        (50, 0.02, 8, 48),
        (50, 0.0, 8, 50),
        (55, 0.02, 8, 55),  # 54 kept: 56 is the nearest multiple, more than there are
        (6, 0.5, 8, 6),
    ],
)
def test_kept_count(size, fraction, multiple, expected):
    assert kept_count(size, fraction, multiple) == expected


@given(st.integers(1, 400), st.floats(0, 1, exclude_max=True), st.integers(1, 64))
def test_kept_count_is_a_multiple_or_everything(size, fraction, multiple):
    kept = kept_count(size, fraction, multiple)
    assert 1 <= kept <= size
    assert kept == size or kept % multiple == 0
    assert kept_count(size, min(fraction + 0.1, 0.999), multiple) <= kept


@pytest.mark.parametrize(
    ("config", "model", "width", "params", "gmacs"),
    [
        ("snp_deit_t", "deit_tiny_patch16_224", 153, 3.01e6, 0.638),
        ("snp_deit_s_1.3g", "deit_small_patch16_224", 345, 6.47e6, 1.265),
    ],
)
def test_published_configurations(config, model, width, params, gmacs):
    """Dims, parameters and MACs that the paper's tables give (Shim et al., ECCV 2024)."""
    assert config in shipped_configurations()
    anatomy = anatomy_of(model)
    kept = counts_from_ratios(anatomy, config, **NONE)
    assert kept["width"] == width
    assert anatomy.params_at(kept) == pytest.approx(params, rel=0.005)
    assert anatomy.macs_at(kept, "whole") / 1e9 == pytest.approx(gmacs, rel=0.005)


def flops(model, x):
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_tiny_r_s16_p8_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_giant_patch14_reg4_dinov2",
        "aimv2_large_patch14_224",
    ],
)
def test_macs_agree_with_torchs_counter_on_dense_models(name):
    model = timm.create_model(name, depth=2).to("meta")
    anatomy = sc.inspect(model)
    counted = flops(model, torch.empty(1, *anatomy.input_size, device="meta"))
    assert anatomy.macs == pytest.approx(counted, rel=0.005)


def pruned_on_meta(name, sizes, fused):
    model = timm.create_model(name, device="meta")
    Structure(sizes(sc.inspect(model))).apply(model)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


@pytest.mark.parametrize(
    ("config", "name"), [("snp_deit_t", "deit_tiny_patch16_224"), ("snp_deit_s_1.3g", "deit_small_patch16_224")]
)
def test_macs_agree_with_torchs_counter_on_published_dims(config, name):
    """By plain products: where qk_dim ≠ v_dim the fused path pads, and torch's counter counts the zeros too."""
    model = pruned_on_meta(name, lambda anatomy: counts_from_ratios(anatomy, config, **NONE), fused=False)
    assert sc.inspect(model).macs == pytest.approx(flops(model, torch.empty(1, 3, 224, 224, device="meta")), rel=0.005)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("groups", [None, ("qk", "v", "ffn", "width")])
def test_macs_agree_with_torchs_counter_on_targets(groups, fused):
    target, limits = sc.Target(macs=0.4), {**NONE, "groups": groups}
    model = pruned_on_meta("deit_small_patch16_224", lambda a: counts_from_target(a, target, **limits), fused)
    assert sc.inspect(model).macs == pytest.approx(flops(model, torch.empty(1, 3, 224, 224, device="meta")), rel=0.005)


def smallest_step(anatomy, kept, count, multiples, kinds):
    """Cost of the cheapest single step up that is left, in the units of ``count``."""
    steps = []
    for group in anatomy.groups:
        if group.kind in kinds and kept[group.name] < group.size:
            wider = (kept[group.name] // multiples[group.kind] + 1) * multiples[group.kind]
            wider = group.size if wider > group.size // multiples[group.kind] * multiples[group.kind] else wider
            step = {group.name: wider}
            if group.kind in ("qk", "v"):  # of a layer, together
                step = {f"blocks.{group.block}.{kind}": wider for kind in ("qk", "v") if kind in kinds}
            steps.append(count({**kept, **step}) - count(kept))
    return min(steps)


@pytest.mark.parametrize("fraction", [0.95, 0.7, 0.5, 0.333, 0.28, 0.2])
@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("groups", [None, ("ffn",), ("qk", "v"), ("qk", "v", "ffn", "width")])
def test_a_target_is_met_and_missed_by_less_than_a_step(fraction, measure, groups):
    anatomy = anatomy_of()
    if groups in (("ffn",), ("qk", "v")):
        fraction = 0.7 + 0.3 * fraction  # alone they reach no less
    count = anatomy.macs_at if measure == "macs" else anatomy.params_at
    kept = counts_from_target(anatomy, sc.Target(**{measure: fraction}), **{**NONE, "groups": groups})
    multiples = {"qk": 8, "v": 8, "ffn": 32, "width": 32}
    budget = fraction * getattr(anatomy, measure)
    assert count(kept) <= budget
    # Where the last block alone saves enough, nothing is cut.
    if kept != anatomy.sizes:
        assert budget - count(kept) < smallest_step(anatomy, kept, count, multiples, groups or ("qk", "v", "ffn"))
    for group in anatomy.groups:
        assert kept[group.name] == group.size or kept[group.name] % multiples[group.kind] == 0
        if group.kind == "qk":
            assert kept[group.name] == kept[group.name.replace("qk", "v")]
        if group.kind == "width" and groups is None:
            assert kept[group.name] == group.size


def test_a_target_of_one_cuts_nothing():
    anatomy = anatomy_of()
    assert counts_from_target(anatomy, sc.Target(macs=1.0), **NONE) == anatomy.sizes


def test_both_budgets_hold_at_once():
    anatomy = anatomy_of()
    kept = counts_from_target(anatomy, sc.Target(macs=0.6, params=0.45), **NONE)
    assert anatomy.macs_at(kept) <= 0.6 * anatomy.macs
    assert 0.43 * anatomy.params < anatomy.params_at(kept) <= 0.45 * anatomy.params


def test_an_infeasible_target_says_what_can_be_reached():
    anatomy = anatomy_of()
    with pytest.raises(sc.InvalidArgument, match=r"target: expected macs >= (0\.\d+) .* got macs = 0.01") as error:
        counts_from_target(anatomy, sc.Target(macs=0.01), **NONE)
    reachable = float(str(error.value).split(">= ")[1].split()[0])
    counts_from_target(anatomy, sc.Target(macs=reachable), **NONE)


def test_freeze_min_keep_and_round_to():
    anatomy = anatomy_of()
    limits = {
        "groups": None,
        "freeze": ("blocks.0.*", "blocks.11.ffn"),
        "min_keep": {"qk": 33, "blocks.3.ffn": 1000},
        "round_to": {"qk": 5, "ffn": 7},
    }
    kept = counts_from_target(anatomy, sc.Target(macs=0.5), **limits)
    assert kept["blocks.0.qk"] == kept["blocks.0.v"] == 64
    assert kept["blocks.0.ffn"] == kept["blocks.11.ffn"] == 1536
    assert kept["blocks.3.ffn"] >= 1001
    assert kept["blocks.3.ffn"] % 7 == 0
    assert all(kept[f"blocks.{i}.qk"] >= 35 and kept[f"blocks.{i}.qk"] % 5 == 0 for i in range(1, 12))
    assert any(kept[f"blocks.{i}.v"] % 8 == 0 and kept[f"blocks.{i}.v"] < 64 for i in range(1, 12))
    assert anatomy.macs_at(kept) <= 0.5 * anatomy.macs


def test_ratios_by_kind_and_name():
    anatomy = anatomy_of()
    kept = counts_from_ratios(anatomy, {"qk": 0.5, "ffn": 0.25, "blocks.2.ffn": 0.75}, **NONE)
    assert kept["blocks.5.qk"] == 32
    assert kept["blocks.5.v"] == 64
    assert kept["blocks.5.ffn"] == 1152
    assert kept["blocks.2.ffn"] == 384
    assert kept["width"] == 384
    rounded = counts_from_ratios(anatomy, {"qk": 0.45}, **{**NONE, "round_to": 16})
    assert rounded["blocks.0.qk"] == 32


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ({"qk": 1.0}, r"ratios\['qk'\]: expected a fraction in \[0, 1\), got 1.0"),
        ({"qk": -0.1}, r"ratios\['qk'\]: expected a fraction in"),
        ({"qk": float("nan")}, r"ratios\['qk'\]: expected a fraction in"),
        ({"heads_": 0.1}, "ratios: expected qk, v, heads, layer, ffn, width, tokens or a group's name, got 'heads_'"),
        ("no_such_file", "ratios: expected a dict, one of snp_deit_s_1.3g, snp_deit_t, or a file, got 'no_such_file'"),
    ],
)
def test_wrong_ratios(ratios, text):
    with pytest.raises(sc.InvalidArgument, match=text):
        counts_from_ratios(anatomy_of(depth=2), ratios, **NONE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v: v.pop("matmul_3"), "expected the key 'matmul_3'"),
        (lambda v: v.update(matmul_99=0.5), "got the extra key 'matmul_99'"),
        (lambda v: v.update(blocks_1_mlp_fc1=1.5), r"ratios\['blocks_1_mlp_fc1'\]: expected a fraction in"),
        (lambda v: v.update(matmul="half"), r"ratios\['matmul'\]: expected a fraction in"),
    ],
)
def test_a_file_that_does_not_fit_says_which_key(tmp_path, change, text):
    values = {
        "matmul": 0.5,
        "matmul_1": 0.25,
        "blocks_0_mlp_fc1": 0.5,
        "matmul_2": 0.5,
        "matmul_3": 0.0,
        "blocks_1_mlp_fc1": 0.1,
        "add_4": 0.25,
    }
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps(values))
    kept = counts_from_ratios(anatomy_of(depth=2), path, **NONE)
    assert (kept["blocks.0.qk"], kept["blocks.0.v"], kept["blocks.1.ffn"], kept["width"]) == (32, 48, 1382, 288)
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(sc.InvalidArgument, match=text):
        counts_from_ratios(anatomy_of(depth=2), str(path), **NONE)


def test_a_file_by_group_names(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"blocks.0.qk": 0.5, "blocks.0.v": 0.5, "blocks.0.ffn": 0.0}))
    kept = counts_from_ratios(anatomy_of(depth=1), path, **NONE)
    layers = {"blocks.0.heads": 6, "blocks.0.attn": 1, "blocks.0.mlp": 1}
    layers |= {"width": 384, "blocks.0.tokens": 98}
    assert kept == {"blocks.0.qk": 32, "blocks.0.v": 32, "blocks.0.ffn": 1536, **layers}
    path.write_text("{broken")
    with pytest.raises(sc.InvalidArgument, match="ratios: expected JSON in"):
        counts_from_ratios(anatomy_of(depth=1), path, **NONE)
    path.write_text("[1, 2]")
    with pytest.raises(sc.InvalidArgument, match="ratios: expected a JSON object"):
        counts_from_ratios(anatomy_of(depth=1), path, **NONE)


def test_a_refused_kind_is_unsupported(tmp_path):
    anatomy = anatomy_of("vit_base_patch16_rpn_224", depth=2)
    for attempt in (
        lambda: counts_from_ratios(anatomy, {"width": 0.1}, **NONE),
        lambda: counts_from_target(anatomy, sc.Target(macs=0.5), **{**NONE, "groups": ("ffn", "width")}),
    ):
        with pytest.raises(sc.Unsupported, match="ResPostBlock"):
            attempt()


@pytest.mark.parametrize("value", [0, -1, 1.5, "half", True, float("nan")])
def test_wrong_targets(value):
    with pytest.raises(sc.InvalidArgument, match=r"target.macs: expected a fraction in \(0, 1\], got"):
        sc.Target(macs=value)
    with pytest.raises(sc.InvalidArgument, match="expected macs=, params= or latency=, got none"):
        sc.Target()


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            {"groups": ("head",)},
            "groups: expected qk, v, heads, layer, ffn, width, tokens or a group's name, got 'head'",
        ),
        ({"groups": "qk"}, "groups: expected a sequence of names, got 'qk'"),
        ({"groups": 5}, "groups: expected a sequence of names, got 5"),
        ({"groups": ()}, "groups: expected at least one kind or group, got none"),
        ({"freeze": None}, "freeze: expected a sequence of names, got None"),
        ({"min_keep": 5}, "min_keep: expected a dict by kind or group, got 5"),
        ({"freeze": ("blocks.77.*",)}, "freeze: expected a kind, group name or pattern of this model, got 'blocks.77"),
        ({"freeze": "qk"}, "freeze: expected a sequence"),
        ({"min_keep": {"qk": 0}}, r"min_keep\['qk'\]: expected an integer of at least 1, got 0"),
        ({"round_to": 0}, "round_to: expected an integer of at least 1, got 0"),
        ({"round_to": {"qk": 1.5}}, r"round_to\['qk'\]: expected an integer of at least 1, got 1.5"),
    ],
)
def test_wrong_limits(limits, text):
    with pytest.raises(sc.InvalidArgument, match=text):
        counts_from_target(anatomy_of(depth=2), sc.Target(macs=0.5), **{**NONE, **limits})


def flat_sizes(anatomy, heads, absent):
    sizes = {f"blocks.{i}.heads": kept for i, kept in enumerate(heads)}
    return {**sizes, **dict.fromkeys(absent, 0), "blocks.0.qk": 40, "blocks.0.v": 40, "blocks.1.ffn": 100, "width": 150}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_macs_and_params_without_heads_and_layers(name, fused):
    """Different heads in every layer, and layers that are not there: torch counts the same."""
    most = sc.inspect(timm.create_model(name, device="meta")).sizes["blocks.0.heads"]
    heads = [1 + i % most for i in range(12)]
    absent = ("blocks.2.attn", "blocks.3.mlp", "blocks.4.attn", "blocks.4.mlp")
    model = pruned_on_meta(name, lambda anatomy: flat_sizes(anatomy, heads, absent), fused)
    anatomy = sc.inspect(model)
    dense = anatomy_of(name)
    sizes = flat_sizes(dense, heads, absent)
    assert dense.params_at(sizes) == anatomy.params == sum(p.numel() for p in model.parameters())
    assert dense.macs_at(sizes, "whole") == anatomy.macs
    size = anatomy.input_size[1]
    assert anatomy.macs == pytest.approx(flops(model, torch.empty(1, 3, size, size, device="meta")), rel=0.005)


def test_costs_of_many_sizes_at_once_are_those_one_by_one():
    """Query/key norms are shared until they are cut: then every head that stays has its own."""
    model = VisionTransformer(
        img_size=12, patch_size=3, embed_dim=39, num_heads=3, depth=2, num_classes=7, qk_norm=True, device="meta"
    )
    anatomy = sc.inspect(model)
    sizes = {"blocks.0.qk": [13, 13, 5, 7], "blocks.0.heads": [3, 2, 3, 1], "blocks.0.attn": [1, 1, 1, 0]}
    base = {"width": 30, "blocks.0.v": 4}
    for count in (anatomy.macs_at, anatomy.params_at):
        found = count({**base, **{name: np.array(each) for name, each in sizes.items()}})
        one_by_one = [count({**base, **{name: each[i] for name, each in sizes.items()}}) for i in range(4)]
        np.testing.assert_array_equal(found, one_by_one)


def every_choice(anatomy, options):
    """All sizes that differ in cost: what is within an absent layer does not matter."""
    seen = set()
    for values in itertools.product(*options.values()):
        sizes = dict(zip(options, values, strict=True))
        for layer, parts in {"attn": ("qk", "v", "heads"), "mlp": ("ffn",)}.items():
            for block in range(2):
                if sizes.get(f"blocks.{block}.{layer}", 1) == 0:
                    sizes |= {f"blocks.{block}.{part}": anatomy.sizes[f"blocks.{block}.{part}"] for part in parts}
        key = tuple(sizes.items())
        if key not in seen and all(sizes[f"blocks.{i}.qk"] == sizes[f"blocks.{i}.v"] for i in range(2)):
            seen.add(key)
            yield sizes


def loss_of(anatomy, losses, sizes):
    total = 0.0
    for name, size in sizes.items():
        layer = anatomy.layer_of.get(name)
        total += 0.0 if sizes.get(layer, 1) == 0 else losses[name][size]
    return total


@pytest.mark.parametrize(
    "groups", [("qk", "v", "ffn"), ("qk", "v", "ffn", "heads", "layer"), ("heads", "ffn", "width")]
)
@pytest.mark.parametrize("target", [{"macs": 0.75}, {"macs": 0.45}, {"params": 0.5}, {"macs": 0.6, "params": 0.55}])
def test_no_choice_is_below_the_bound_and_few_are_below_what_is_found(groups, target):
    """Against all choices there are, for losses that are neither convex nor alike."""
    anatomy = sc.inspect(
        VisionTransformer(
            img_size=12, patch_size=4, embed_dim=22, num_heads=2, depth=2, mlp_ratio=3, num_classes=5, device="meta"
        )
    )
    limits = {**NONE, "groups": groups, "round_to": {"qk": 3, "v": 3, "ffn": 22, "width": 6}}
    free = [g for g in anatomy.groups if g.kind in groups]
    steps = {"qk": [3, 6, 9, 11], "v": [3, 6, 9, 11], "ffn": [22, 44, 66], "heads": [1, 2], "layer": [0, 1]}
    steps["width"] = [6, 12, 18, 22]
    options = {group.name: steps[group.kind] for group in free}
    options = {**{name: [size] for name, size in anatomy.sizes.items()}, **options}
    budget = sc.Target(**target)
    choices = [
        sizes
        for sizes in every_choice(anatomy, options)
        if anatomy.macs_at(sizes) <= (budget.macs or 1) * anatomy.macs
        and anatomy.params_at(sizes) <= (budget.params or 1) * anatomy.params
    ]
    gaps = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        losses = {g.name: np.append(np.sort(rng.random(g.size) ** 3)[::-1] * rng.random(), 0.0) for g in anatomy.groups}
        for group in anatomy.groups:
            if group.kind == "layer":
                losses[group.name] = np.array([rng.random(), 0.0])
        held = [
            max((f"blocks.{i}.{layer}" for i in range(2)), key=lambda name: losses[name][0])
            for layer in ("attn", "mlp")
        ]
        feasible = [loss_of(anatomy, losses, sizes) for sizes in choices if all(sizes[name] for name in held)]
        found = allocate(anatomy, budget, **limits, losses=lambda group: losses[group.name])  # noqa: B023
        best = min(feasible)
        assert anatomy.macs_at(found.sizes) <= (budget.macs or 1) * anatomy.macs
        assert anatomy.params_at(found.sizes) <= (budget.params or 1) * anatomy.params
        assert found.loss == pytest.approx(loss_of(anatomy, losses, found.sizes))
        assert found.bound <= best + 1e-9
        assert best <= found.loss + 1e-9
        gaps.append((found.loss - best, np.mean(feasible) - best))
    above, spread = np.mean(gaps, axis=0)
    # Few and coarse choices, the worst case for Lagrange: still most of the way from an arbitrary choice to the best.
    assert above < 0.25 * spread


def test_with_fine_steps_the_gap_closes():
    anatomy = anatomy_of()
    rng = np.random.default_rng(0)
    scale = {group.name: rng.random() for group in anatomy.groups}
    losses = lambda group: scale[group.name] * (1 - np.arange(group.size + 1) / group.size) ** 2  # noqa: E731
    for groups in (None, ("qk", "v", "ffn", "heads", "layer", "width")):
        limits = {**NONE, "groups": groups, "round_to": {"qk": 1, "v": 1, "ffn": 4}}
        found = allocate(anatomy, sc.Target(macs=0.5), **limits, losses=losses)
        assert 0.999 < anatomy.macs_at(found.sizes) / (0.5 * anatomy.macs) <= 1
        assert found.bound <= found.loss <= 1.01 * found.bound


def test_heads_leave_where_they_matter_least():
    anatomy = anatomy_of("deit_small_patch16_224", depth=4)
    weight = {"blocks.0.heads": 1e-6, "blocks.1.heads": 1.0, "blocks.2.heads": 1e-3, "blocks.3.heads": 1e-9}
    limits = {**NONE, "groups": ("heads",)}
    kept = allocate(
        anatomy,
        sc.Target(macs=0.72),  # of which the last block for its class token alone saves 0.2
        **limits,
        losses=lambda g: weight[g.name] * np.linspace(1, 0, g.size + 1) ** 2,
    ).sizes
    heads = [kept[f"blocks.{i}.heads"] for i in range(4)]
    assert heads[3] == 1
    assert heads[3] <= heads[0] <= heads[2] <= heads[1] == 6
    limits |= {"min_keep": {"heads": 3}, "freeze": ("blocks.0.*",)}
    held = allocate(
        anatomy, sc.Target(macs=0.75), **limits, losses=lambda g: weight[g.name] * np.linspace(1, 0, g.size + 1)
    ).sizes
    assert held["blocks.0.heads"] == 6
    assert min(held[f"blocks.{i}.heads"] for i in range(4)) == 3


def test_round_to_a_number_is_about_channels():
    anatomy = anatomy_of("deit_small_patch16_224", depth=2)
    limits = {**NONE, "round_to": 16, "groups": ("qk", "v", "ffn", "heads", "layer")}
    kept = allocate(
        anatomy, sc.Target(macs=0.5), **limits, losses=lambda g: (1 - np.arange(g.size + 1) / g.size) ** 2
    ).sizes
    assert all(kept[g.name] % 16 == 0 for g in anatomy.groups if g.kind in ("qk", "v", "ffn"))
    assert any(kept[f"blocks.{i}.heads"] % 16 for i in range(2))


@pytest.mark.parametrize("method", ["refit", "project"])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_biases_that_a_method_adds_are_within_the_budget(method, share):
    model = small_vit(qkv_bias=False, proj_bias=False)
    stats = sc.calibrate(model, small_batches())
    plan = sc.plan(model, stats, method=method, target=sc.Target(params=share), round_to=1)
    assert any(name not in dict(model.named_parameters()) for name in plan.weights)
    sc.prune(model, plan)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == plan.params[1] <= share * plan.params[0]
    assert count > share * plan.params[0] - 200  # a step of every kind is less


def test_a_budget_that_is_a_count_of_parameters_ends():
    """Shares such as 14085 / 46965 times their divisor are an ulp below a whole number, or above it."""
    model = small_vit(embed_dim=40, num_heads=2, depth=2, qkv_bias=False, proj_bias=False)
    stats = sc.calibrate(model, small_batches())
    dense = sum(parameter.numel() for parameter in model.parameters())
    for wanted in range(dense * 3 // 5, dense * 3 // 5 + 40):
        plan = sc.plan(model, stats, method="refit", target=sc.Target(params=wanted / dense), round_to=1)
        assert plan.params[1] <= wanted
    # The least that the groups reach has no room for the biases.
    with pytest.raises(sc.InvalidArgument, match="the least these groups reach") as refused:
        sc.plan(model, stats, method="refit", target=sc.Target(params=1e-3))
    least = float(re.search(r"params >= (\S+) ", str(refused.value))[1])
    with pytest.raises(sc.InvalidArgument, match=rf"target: expected room for \d+ biases .* got params = {least:g}$"):
        sc.plan(model, stats, method="refit", target=sc.Target(params=least))


def test_the_width_alone_may_be_cut_by_its_loss():
    model = small_vit()
    stats = sc.calibrate(model, small_batches(), sensitivity="noise")
    for more in ({"groups": ("width",)}, {"groups": ("width", "qk"), "freeze": ("qk",)}):
        plan = sc.plan(model, stats, method="project", target=sc.Target(macs=0.6), round_to=1, **more)
        assert set(plan.keep) == {"width"}
        assert plan.macs[1] <= 0.6 * plan.macs[0]
    whole = sc.plan(model, stats, method="project", target=sc.Target(macs=1.0), freeze=("*",))
    assert not whole.keep


def test_what_is_left_after_exchanges_is_spent():
    """No step of any group that lowers the loss fits any more."""
    model = small_vit()
    stats = sc.calibrate(model, small_batches(), sensitivity="noise")
    anatomy = sc.inspect(model)
    method = prepared(model, stats, "snp")
    losses = {g.name: stats.sensitivity(g.name) * method.errors(g) for g in anatomy.groups if g.kind == "ffn"}
    for share in np.linspace(0.6, 0.95, 29):
        plan = sc.plan(model, stats, method="snp", target=sc.Target(macs=float(share)), groups=("ffn",), round_to=1)
        sizes = {**anatomy.sizes, **{name: kept.shape[1] for name, kept in plan.keep.items()}}
        for name, loss in losses.items():
            for wider in range(sizes[name] + 1, len(loss)):
                if loss[wider] < loss[sizes[name]]:
                    assert anatomy.macs_at({**sizes, name: wider}) > share * anatomy.macs, (share, name)
                    break
