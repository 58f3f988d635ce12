"""What pruning costs: DeiT-Base, the plan given.

make bench, or pytest --benchmark-enable benchmarks/python/bench_prune.py
"""

from __future__ import annotations

import copy

import pytest
import secateur as sc
import timm
import torch


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("deit_base_patch16_224").eval()


@pytest.fixture(scope="module")
def plan(model):
    stats = sc.calibrate(model, [torch.rand(4, 3, 224, 224) * 2 - 1], collect="scores")
    return sc.plan(model, stats, target=sc.Target(macs=0.5))


def test_prune(model, plan, paired):
    cut = copy.deepcopy(model)
    report = sc.prune(cut, plan)
    assert report.macs[1] <= 0.5 * report.macs[0]
    with torch.inference_mode():
        assert bool(cut(torch.zeros(1, 3, 224, 224)).isfinite().all())
    twins = iter([copy.deepcopy(model) for _ in range(17)])
    weights = [parameter.detach() for parameter in model.parameters()]
    paired(
        "prune(DeiT-Base) ÷ one copy of its weights",
        lambda: sc.prune(next(twins), plan),
        lambda: [weight.clone() for weight in weights],
    )
