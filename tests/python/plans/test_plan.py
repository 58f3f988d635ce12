"""Plans: which units stay, the same every time, only for the model they were made for."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import secateur as sc
import torch
from models import KINDS, images, make
from small_vits import small_batches, small_vit


@pytest.fixture
def stats(digits_model, digits_images):
    return sc.calibrate(digits_model, [digits_images])


def value_scores(rows):
    """Σ (1 − |cos|) to every other row, in float64; zero rows score zero."""
    rows = rows.double()
    norms = rows.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms, torch.zeros(()))
    cosines = (unit @ unit.T).abs()
    cosines.fill_diagonal_(1)
    return torch.where(norms[:, 0] > 0, (1 - cosines).sum(1), torch.zeros(()))


def lowest_removed(scores, kept):
    """The kept set holds the highest scores: nothing that left scores above what stayed, but for rounding."""
    scores = np.atleast_2d(scores)
    for row, keep in zip(scores, kept, strict=True):
        gone = np.setdiff1d(np.arange(len(row)), keep)
        assert row[gone].max() <= row[keep].min() + 1e-9 * abs(row).max()


def test_what_snp_keeps_in_a_trained_model(digits_model, stats):
    plan = sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.5, "v": 0.4, "ffn": 0.6, "width": 0.2})
    for index, block in enumerate(digits_model.blocks):
        lowest_removed(stats.importance(f"blocks.{index}.qk"), plan.keep[f"blocks.{index}.qk"])
        values = value_scores(block.attn.qkv.weight.detach()[186:]).reshape(3, 31)
        lowest_removed(values.numpy(), plan.keep[f"blocks.{index}.v"])
        lowest_removed(value_scores(block.mlp.fc1.weight.detach()).numpy(), plan.keep[f"blocks.{index}.ffn"])
        assert plan.keep[f"blocks.{index}.qk"].shape == (3, 31 - 16)
        assert plan.keep[f"blocks.{index}.v"].shape == (3, 31 - 12)
    writers = [digits_model.patch_embed.proj, *(b.attn.proj for b in digits_model.blocks)]
    writers += [b.mlp.fc2 for b in digits_model.blocks]
    scores = [value_scores(layer.weight.detach().flatten(1)) for layer in writers]
    lowest_removed(sum(s / s.sum() for s in scores).numpy(), plan.keep["width"])
    assert len({tuple(row) for row in plan.keep["blocks.0.qk"]}) == 3  # each head keeps its own


def test_similarity_of_activations(digits_model, stats):
    plan = sc.plan(digits_model, stats, method="snp", ratios={"v": 0.5, "ffn": 0.5}, similarity="activations")
    for group in ("blocks.1.v", "blocks.2.ffn"):
        second = stats.moments(group).second
        norms = np.sqrt(np.diag(second))
        assert (norms > 0).all()
        scores = (1 - np.abs(second / np.outer(norms, norms))).sum(1)
        lowest_removed(scores.reshape(plan.keep[group].shape[0], -1), plan.keep[group])
    weights = sc.plan(digits_model, stats, method="snp", ratios={"v": 0.5, "ffn": 0.5})
    assert not np.array_equal(weights.keep["blocks.1.v"], plan.keep["blocks.1.v"])


def test_gated_units_are_scored_by_both_branches():
    for kind, rows in (
        ("swiglu_packed", lambda mlp: mlp.fc1.weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(1)),
        ("swiglu_split", lambda mlp: torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight], dim=1)),
    ):
        model = make(kind)
        plan = sc.plan(model, sc.calibrate(model, [images(model)]), method="snp", ratios={"ffn": 0.5})
        lowest_removed(value_scores(rows(model.blocks[1].mlp).detach()).numpy(), plan.keep["blocks.1.ffn"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_the_whole_way(kind):
    """inspect, calibrate, plan to a target with width, prune, inspect again."""
    model = make(kind)
    x = images(model, 6)
    stats = sc.calibrate(model, [x])
    target = sc.Target(macs=0.95 if kind == "hybrid" else 0.6)
    groups = ("qk", "v", "ffn", "width")
    round_to = {"qk": 2, "v": 2, "ffn": 3, "width": 3}
    plan = sc.plan(model, stats, method="snp", target=target, groups=groups, round_to=round_to)
    report = sc.prune(model, plan)
    assert report.macs == plan.macs
    assert report.params == plan.params
    assert report.macs[1] <= target.macs * report.macs[0]
    assert {group.name: group.size for group in sc.inspect(model).groups} == {
        name: after for name, (_, after) in report.groups.items()
    }
    with torch.no_grad():
        assert bool(model(x).isfinite().all())


def test_the_same_plan_byte_for_byte(digits_model, digits_images, tmp_path):
    for name in ("a", "b"):
        stats = sc.calibrate(digits_model, digits_images.split(16))
        sc.plan(digits_model, stats, method="snp", target=sc.Target(macs=0.5)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_save_and_load(digits_model, stats, tmp_path):
    plan = sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.3, "width": 0.1})
    plan.save(tmp_path / "plan.json")
    loaded = sc.Plan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == plan.to_dict()
    assert "Plan(snp): " in str(loaded)
    first, second = copy.deepcopy(digits_model), copy.deepcopy(digits_model)
    sc.prune(first, plan)
    sc.prune(second, loaded)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.write_text("{"), r"expected a secateur plan, got text that is not JSON \(line 1, column 2\)"),
        (lambda p: p.write_text('{"a": 1}'), "expected a secateur plan, got another kind of file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), "expected a secateur plan, got"),
        (lambda p: p.write_text(p.read_text().replace('"gamma":8', '"gamma":9')), "does not match its checksum"),
        (
            lambda p: p.write_text(p.read_text().replace('"format":1', '"format":2')),
            "expected format 1 or older, got 2",
        ),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "expected a secateur plan, got a file that is not text"),
        (lambda p: p.unlink(), "which is not a file"),
    ],
)
def test_damaged_plans(digits_model, stats, tmp_path, change, text):
    path = tmp_path / "plan.json"
    sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.3}).save(path)
    change(path)
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.Plan.load(path)


def test_another_model_is_refused(digits_model, stats):
    other = copy.deepcopy(digits_model)
    with torch.no_grad():
        other.blocks[1].attn.qkv.bias[3] += 1e-3
    plan = sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.5})
    text = r"model: expected the same model, got other weights of blocks\.1\.attn\.qkv\.bias"
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.plan(other, stats, method="snp", ratios={"qk": 0.5})
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.prune(other, plan)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    sc.plan(other, stats, method="snp", ratios={"qk": 0.5}, strict=False)
    assert sc.prune(other, plan, strict=False).params == plan.params


def test_other_dimensions_are_refused_even_if_not_strict(digits_model, stats):
    plan = sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.5})
    sc.prune(digits_model, plan)
    text = r"size of group blocks\.0\.qk = 15 where it was 31"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.prune(digits_model, plan, strict=False)
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.5}, strict=False)
    with pytest.raises(sc.InvalidArgument, match="got architecture 'VisionTransformer'"):
        sc.prune(make("plain"), plan, strict=False)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "target, ratios: expected exactly one, got neither"),
        ({"ratios": {"qk": 0.1}, "target": sc.Target(macs=0.5)}, "expected exactly one, got both"),
        ({"target": 0.5}, r"target: expected a Target, such as Target\(macs=0.5\), got 0.5"),
        ({"ratios": 0.5}, "ratios: expected a dict, a name or a path, got 0.5"),
        (
            {"ratios": {"qk": 0.1}, "method": "magic"},
            "method: expected one of fisher, magnitude, michel, project, random, refit, snp, taylor, vbp, got 'magic'",
        ),
        (
            {"ratios": {"qk": 0.1}, "similarity": "looks"},
            "similarity: expected one of weights, activations, got 'looks'",
        ),
        ({"ratios": {"qk": 0.1}, "colour": "red"}, "options: expected similarity, head_score, got 'colour'"),
    ],
)
def test_wrong_arguments(digits_model, stats, arguments, text):
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.plan(digits_model, stats, **{"method": "snp", **arguments})
    with pytest.raises(sc.InvalidArgument, match="stats: expected Statistics from calibrate, got dict"):
        sc.plan(digits_model, {}, method="snp", ratios={"qk": 0.1})


def test_activations_need_moments(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images], collect="scores")
    assert sc.plan(digits_model, stats, method="snp", ratios={"v": 0.5}).keep
    with pytest.raises(sc.InvalidArgument, match="expected rows of 'blocks.0.v'"):
        sc.plan(digits_model, stats, method="snp", ratios={"v": 0.5}, similarity="activations")


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ([[0, 1], [0, 1]], r"expected \(3, 1…31\) indices, got shape \(2, 2\)"),
        ([[0, 1]] * 2 + [[1, 0]], "expected sorted, unique indices below 31"),
        ([[0, 1]] * 2 + [[1, 1]], "expected sorted, unique indices below 31"),
        ([[0, 1]] * 2 + [[1, 31]], "expected sorted, unique indices below 31"),
        ([[0, 1]] * 2 + [[-1, 1]], "expected sorted, unique indices below 31"),
        ([[], [], []], r"indices, got shape \(3, 0\)"),
        (np.zeros((3, 1)), "expected an int64 NumPy array, got float64 array"),
        (np.zeros((3, 1), np.uint64), "expected an int64 NumPy array, got uint64 array"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(digits_model, stats, keep, text):
    plan = sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.5})
    plan.keep["blocks.1.qk"] = keep if isinstance(keep, np.ndarray) else np.asarray(keep, np.int64)
    before = copy.deepcopy(digits_model.state_dict())
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.prune(digits_model, plan)
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())
    assert type(digits_model.blocks[0].attn).__name__ == "Attention"


def test_methods():
    assert sc.methods() == ["fisher", "magnitude", "michel", "project", "random", "refit", "snp", "taylor", "vbp"]


def test_the_plan_is_readable_json(digits_model, stats, tmp_path):
    sc.plan(digits_model, stats, method="snp", target=sc.Target(macs=0.5)).save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["method"] == "snp"
    assert plan["options"] == {
        "gamma": 8,
        "similarity": "weights",
        "head_score": "neurons",
        "target": {"macs": 0.5, "params": None, "latency": None},
        "round_to": None,
    }
    assert len(plan["keep"]["blocks.0.qk"]) == 3


@pytest.mark.parametrize("method", ["snp", "project"])
def test_names_may_come_from_an_iterator(method):
    model = small_vit()
    stats = sc.calibrate(model, small_batches(), sensitivity="noise")
    limits = {"groups": ("qk", "v", "ffn"), "freeze": ["blocks.0.*"]}
    once = {name: (each for each in names) for name, names in limits.items()}
    target = sc.Target(macs=0.7)
    wanted = sc.plan(model, stats, method=method, target=target, round_to=1, **limits)
    found = sc.plan(model, stats, method=method, target=target, round_to=1, **once)
    assert {name: kept.tolist() for name, kept in found.keep.items()} == {
        name: kept.tolist() for name, kept in wanted.keep.items()
    }
    twins = [copy.deepcopy(model) for _ in range(2)]
    reports = [
        sc.prune_sequential(
            twin, small_batches(), method, target, round_to=1, **{name: make(names) for name, names in limits.items()}
        )
        for twin, make in zip(twins, (list, iter), strict=True)
    ]
    assert reports[0].groups == reports[1].groups
    assert not any(name.startswith("blocks.0.") for name in found.keep)


def test_plans_compare_by_identity():
    model = small_vit()
    stats = sc.calibrate(model, small_batches())
    first, second = (sc.plan(model, stats, method="snp", ratios={"ffn": 0.3}) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2
