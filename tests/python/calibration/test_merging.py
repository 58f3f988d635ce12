"""What merging tokens costs, and plans that merge tokens and cut channels under one budget."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from secateur.budgets.allocate import allocate
from secateur.calibration.schedules import schedules, token_groups
from torch import nn


@pytest.fixture(scope="module")
def calibrated(make_digits_model, digits_images):
    return sc.calibrate(make_digits_model(), [digits_images[:32], digits_images[32:40]], sensitivity=True)


def divergence(dense: nn.Module, cut: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = dense(x).double().softmax(-1), cut(x).double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def merged(model: nn.Module, counts: tuple[int, ...]) -> nn.Module:
    groups = token_groups(sc.inspect(model))
    ratios = {group.name: count / group.size for group, count in zip(groups, counts, strict=True) if count}
    found = copy.deepcopy(model)
    sc.prune(found, sc.plan(model, method="magnitude", ratios=ratios))
    return found


def test_schedules(digits_model):
    """64 patches in 3 blocks: the same number or share in each block from some block on, but none in the last."""
    found = schedules(sc.inspect(digits_model))
    assert len(found) == len(set(found)) > 10
    assert (9, 9, 0) in found
    assert (9, 8, 0) in found
    assert (0, 6, 0) in found
    assert all(counts[-1] == 0 and max(counts) <= 32 for counts in found)


@pytest.mark.parametrize("kind", ["map_pool", "max_pool", "no_pool"])
def test_no_schedules_where_tokens_cannot_merge(kind):
    model = make(kind)
    assert schedules(sc.inspect(model)) == []
    stats = sc.calibrate(model, [images(model, 4)], sensitivity=True)
    assert stats.merged == []


def test_losses_are_those_of_models_that_merge(digits_model, digits_images, calibrated):
    assert {counts for counts, _ in calibrated.merged} == set(schedules(sc.inspect(digits_model)))
    for counts, loss in calibrated.merged[::7]:
        expected = divergence(digits_model, merged(digits_model, counts), digits_images[:40])
        assert loss == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("kind", ["fc_norm", "registers_layer_scale", "distilled", "qk_norm"])
def test_losses_of_other_models(kind):
    model = make(kind).double()
    x = images(model, 5).double()
    stats = sc.calibrate(model, [x], sensitivity=True)
    assert stats.merged
    for counts, loss in stats.merged[::5]:
        assert loss == pytest.approx(divergence(model, merged(model, counts), x), rel=1e-6, abs=1e-12)


def test_a_plan_merges_and_cuts_within_the_budget(digits_model, digits_images, calibrated):
    anatomy = sc.inspect(digits_model)
    tokens = {group.name for group in token_groups(anatomy)}
    for macs in (0.4, 0.3, 0.25):
        plan = sc.plan(digits_model, calibrated, target=sc.Target(macs=macs))
        assert tokens & plan.keep.keys()
        channels = sc.plan(digits_model, calibrated, target=sc.Target(macs=macs), freeze=["tokens"])
        assert not tokens & channels.keep.keys()
        assert plan.loss[0] <= channels.loss[0] * (1 + 1e-9)
        cut = copy.deepcopy(digits_model)
        report = sc.prune(cut, plan)
        assert report.macs[1] == plan.macs[1] <= macs * plan.macs[0]
        assert sc.inspect(cut).macs == plan.macs[1]
        assert divergence(digits_model, cut, digits_images) < 0.5


def test_the_choice_is_the_best_of_all(digits_model):
    """Of every schedule with every choice of hidden units, for losses that are given."""
    anatomy = sc.inspect(digits_model)
    names = [group.name for group in token_groups(anatomy)]
    free = ["blocks.0.ffn", "blocks.1.ffn", "blocks.2.ffn"]
    sizes = [93, 186, 279, 372]
    weights = dict(zip(free, (1.0, 2.5, 0.4), strict=True))
    merging = [
        (dict(zip(names, (32 - a, 32 - b, 32), strict=True)), loss)
        for (a, b), loss in {(4, 0): 0.05, (8, 8): 0.35, (12, 10): 0.9}.items()
    ]

    def losses(group):
        return weights.get(group.name, 0.0) * (1 - np.arange(group.size + 1) / group.size) ** 2

    for macs in (0.85, 0.7, 0.55):
        found = allocate(
            anatomy,
            sc.Target(macs=macs),
            groups=["tokens", *free],
            freeze=(),
            min_keep={},
            round_to=dict.fromkeys(free, 93),
            losses=losses,
            merging=merging,
        )
        best = min(
            (sum(losses(anatomy.group(name))[size] for name, size in zip(free, kept, strict=True)) + loss)
            for tokens, loss in [({}, 0.0), *merging]
            for kept in itertools.product(sizes, repeat=3)
            if anatomy.macs_at({**tokens, **dict(zip(free, kept, strict=True))}) <= macs * anatomy.macs
        )
        assert found.loss == pytest.approx(best)
        assert anatomy.macs_at(found.sizes) <= macs * anatomy.macs


def test_tokens_are_left_alone_where_they_save_nothing_or_are_wanted(digits_model, calibrated):
    names = {group.name for group in token_groups(sc.inspect(digits_model))}
    assert not names & sc.plan(digits_model, calibrated, target=sc.Target(params=0.5)).keep.keys()
    named = sc.plan(digits_model, calibrated, target=sc.Target(macs=0.6), groups=["qk", "v", "ffn"])
    assert not names & named.keep.keys()
    first = next(iter(sorted(names)))
    assert first not in sc.plan(digits_model, calibrated, target=sc.Target(macs=0.4), freeze=[first]).keep
    model = make("identity_head")
    stats = sc.calibrate(model, [images(model, 4)], sensitivity=True)
    plan = sc.plan(model, stats, target=sc.Target(macs=0.7), round_to=1)
    assert not any(name.endswith("tokens") for name in plan.keep)


def test_a_budget_beyond_the_schedules_is_refused(digits_model, calibrated):
    with pytest.raises(sc.InvalidArgument, match=r"target: expected macs >= 0\.\d+ \(the least these groups reach\)"):
        sc.plan(digits_model, calibrated, target=sc.Target(macs=0.2), groups=["tokens"])


def test_files_keep_the_losses(tmp_path, calibrated):
    calibrated.save(tmp_path / "s.safetensors")
    assert sc.Statistics.load(tmp_path / "s.safetensors").merged == calibrated.merged
    doubled = sc.Statistics.merge([calibrated, calibrated])
    assert doubled.merged == calibrated.merged
