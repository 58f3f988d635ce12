"""Plans by measured losses: which sizes are chosen, what the whole plan loses, and what cuts cost together."""

from __future__ import annotations

import copy
import itertools

import pytest
import secateur as sc
import torch
from torch import nn

FREE = ("blocks.0.ffn", "blocks.1.ffn", "blocks.2.ffn")


@pytest.fixture(scope="module")
def calibrated(make_digits_model, digits_images):
    return sc.calibrate(
        make_digits_model(), [digits_images[:32], digits_images[32:]], sensitivity=True, methods=["project", "snp"]
    )


def divergence(dense: nn.Module, cut: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = dense(x).double().softmax(-1), cut(x).double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def test_the_sizes_of_least_measured_loss(digits_model, calibrated):
    """Where only measured sizes are allowed, and all choices can be tried."""
    anatomy = sc.inspect(digits_model)
    step = dict.fromkeys(FREE, 31)
    target = 0.8
    plan = sc.plan(digits_model, calibrated, method="snp", target=sc.Target(macs=target), groups=FREE, round_to=step)
    chosen = {name: plan.keep[name].shape[1] if name in plan.keep else 372 for name in FREE}

    def loss(kept):
        return sum(0.0 if size == 372 else calibrated.losses(name, "cut:snp")[size] for name, size in kept.items())

    measured = [dict(zip(FREE, each, strict=True)) for each in itertools.product([124, 217, 372], repeat=3)]
    fitting = [kept for kept in measured if anatomy.macs_at(kept) <= target * anatomy.macs]
    # More sizes are allowed than were measured, so the plan is at least as good as the best of these.
    assert plan.loss[0] <= min(map(loss, fitting)) + 1e-12
    assert anatomy.macs_at(chosen) <= target * anatomy.macs


def test_measured_is_the_default_where_losses_were_measured(digits_model, digits_images, calibrated):
    target = sc.Target(macs=0.6)
    by_default = sc.plan(digits_model, calibrated, target=target)
    named = sc.plan(digits_model, calibrated, target=target, allocation="measured")
    uniform = sc.plan(digits_model, calibrated, target=target, allocation="uniform")
    assert by_default.to_dict() == named.to_dict()
    assert by_default.keep.keys() != uniform.keep.keys() or any(
        by_default.keep[name].shape != uniform.keep[name].shape for name in uniform.keep
    )
    # Other options cut otherwise, so their losses are unknown.
    with pytest.raises(sc.InvalidArgument, match=r"stats: expected losses of 'blocks\.0\.qk'"):
        sc.plan(digits_model, calibrated, method="refit", target=target, allocation="measured")
    plain = sc.calibrate(digits_model, [digits_images[:8]])
    with pytest.raises(sc.InvalidArgument, match="stats: expected losses"):
        sc.plan(digits_model, plain, target=target, allocation="measured")


@pytest.mark.parametrize("method", ["project", "magnitude"])
def test_the_loss_of_the_whole_plan_is_measured(digits_model, digits_images, calibrated, method):
    images = [digits_images[:10], digits_images[10:40]]
    model = digits_model.double()
    stats = sc.calibrate(model, [each.double() for each in images])
    # What the statistics do not hold is measured on the loader's images.
    plan = sc.plan(model, stats, method=method, target=sc.Target(macs=0.5), loader=[each.double() for each in images])
    cut = copy.deepcopy(model)
    sc.prune(cut, plan)
    assert plan.measured == pytest.approx(divergence(model, cut, digits_images[:40].double()), rel=1e-6)
    assert plan.loss[0] > 0
    assert f"{plan.measured:.3g} measured" in str(plan)


@pytest.mark.parametrize("macs", [0.3, 0.5])
def test_choosing_again_never_makes_it_worse(digits_model, digits_images, calibrated, macs):
    alone = sc.plan(digits_model, calibrated, target=sc.Target(macs=macs))
    again = sc.plan(digits_model, calibrated, target=sc.Target(macs=macs), loader=[digits_images[:40]])
    cut = copy.deepcopy(digits_model)
    sc.prune(cut, alone)
    assert again.measured <= divergence(digits_model, cut, digits_images[:40]) * (1 + 1e-5) + 1e-9
    assert again.macs[1] <= macs * again.macs[0]


def test_ratios_are_kept_and_their_loss_is_measured(digits_model, digits_images, calibrated):
    plan = sc.plan(digits_model, calibrated, ratios={"ffn": 0.5, "layer": 0.2}, loader=[digits_images])
    assert plan.measured > 0
    assert plan.loss is None
    removed = [name for name, kept in plan.keep.items() if kept.shape[1] == 0]
    layers = [group.name for group in sc.inspect(digits_model).groups if group.kind == "layer"]
    # The layer whose removal was measured to cost least.
    assert removed == [min(layers, key=lambda name: calibrated.losses(name, "cut:project")[0])]


def test_the_measured_loss_is_in_the_file(tmp_path, digits_model, digits_images, calibrated):
    plan = sc.plan(digits_model, calibrated, target=sc.Target(macs=0.5), loader=[digits_images])
    plan.save(tmp_path / "p.json")
    assert sc.Plan.load(tmp_path / "p.json").measured == plan.measured
    assert "measured" not in sc.plan(digits_model, calibrated, target=sc.Target(macs=0.5)).to_dict()


def test_a_loader_without_images(digits_model, calibrated):
    with pytest.raises(sc.InvalidArgument, match="loader: expected at least one image, got none"):
        sc.plan(digits_model, calibrated, target=sc.Target(macs=0.5), loader=[])
