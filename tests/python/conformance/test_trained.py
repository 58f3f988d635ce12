"""What every registered trained method must do, found by name: one that registers itself is tested here."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import torch
from finetuning import Breaking, Killed, batches, same, tiny, weights
from secateur.errors import InvalidArgument
from secateur.trained.base import TrainedMethod
from secateur.trained.registry import registry
from torch import nn

METHODS = sc.trained_methods()
TARGET = sc.Target(macs=0.7)


def method_for(name: str, **more: object) -> TrainedMethod:
    wanted = {"target": TARGET, "groups": list(registry.named(name).kinds), "round_to": 1}
    return sc.trained_method(name, **{**wanted, **more})


def what_it_is(model: nn.Module) -> list[object]:
    """All of a model except the values: classes, names, module hooks, modes and what requires a gradient."""
    modules = [
        (name, type(module), module.training, *map(len, (module._forward_hooks, module._forward_pre_hooks)))
        for name, module in model.named_modules()
    ]
    tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()]
    return [modules, tensors, [p.requires_grad for p in model.parameters()], [*model._backward_hooks]]


def same_plans(first: sc.Plan, second: sc.Plan) -> bool:
    return (
        first.to_dict() == second.to_dict()
        and first.weights.keys() == second.weights.keys()
        and all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    )


@pytest.mark.parametrize("name", METHODS)
def test_it_says_what_it_is(name: str) -> None:
    method = registry.named(name)
    assert method.name == name
    assert type(method).__doc__
    assert method.paper
    assert method.kinds
    assert dataclasses.is_dataclass(method.Options)
    assert method.Options.__dataclass_params__.frozen
    for field in dataclasses.fields(method.Options):
        assert field.metadata["help"]
    made = method_for(name)
    assert json.loads(json.dumps(made.settings())) == json.loads(json.dumps(method_for(name).settings()))
    assert made is not method_for(name)


@pytest.mark.parametrize("norms", [{}, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}])
@pytest.mark.parametrize("name", METHODS)
def test_it_ends_in_a_plan_that_meets_its_target(name: str, norms: dict[str, bool], tmp_path: Path) -> None:
    model = tiny(embed_dim=39, num_heads=3, mlp_ratio=1.7, **norms)
    before, was = what_it_is(model), weights(model)
    method = method_for(name)
    sc.finetune(model, batches(), teacher=copy.deepcopy(model), lr=1e-2, hooks=[method])
    assert what_it_is(model) == before
    assert not same(weights(model), was)
    plan = method.plan()
    assert plan.method == name
    assert 0.6 * plan.macs[0] < plan.macs[1] <= 0.7 * plan.macs[0]
    plan.save(tmp_path / "plan.json")
    assert same_plans(sc.Plan.load(tmp_path / "plan.json"), plan)
    report = sc.prune(model, plan)
    assert report.params == plan.params
    assert report.macs == plan.macs
    images = batches()[0][0]
    with torch.no_grad():
        output = model.eval()(images)
    assert output.isfinite().all()
    sc.save(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(sc.load(tmp_path / "model")(images), output)
    # Pruned models are trained on, and pruned again.
    again = method_for(name, target=sc.Target(macs=0.9))
    sc.finetune(model, batches(2), hooks=[again])
    sc.prune(model, again.plan())


@pytest.mark.parametrize("after", [4, 7])
@pytest.mark.parametrize("name", METHODS)
def test_interrupted_and_resumed_equals_uninterrupted(name: str, after: int, tmp_path: Path) -> None:
    options = {"epochs": 2, "lr": 1e-2, "ema": 0.6, "mixup": 0.3}
    whole, expected = method_for(name), tiny()
    uninterrupted = sc.finetune(expected, batches(), hooks=[whole], **options)
    options |= {"resume": tmp_path / "run", "checkpoint_every": 3}
    with pytest.raises(Killed):
        sc.finetune(tiny(), Breaking(batches(), after), hooks=[method_for(name)], **options)
    method, model = method_for(name), tiny()
    found = sc.finetune(model, batches(), hooks=[method], **options)
    assert (found.resumed, found.history) == (after // 3 * 3, uninterrupted.history)
    assert same(weights(model), weights(expected))
    assert same_plans(method.plan(), whole.plan())
    # A process that comes when all is done has the plan without a step.
    late, model = method_for(name), tiny()
    sc.finetune(model, Breaking(batches(), 0), hooks=[late], **options)
    assert same_plans(late.plan(), whole.plan())


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_as_it_was_after_an_error(name: str) -> None:
    model = tiny()
    before = what_it_is(model)
    method = method_for(name)
    with pytest.raises(Killed):
        sc.finetune(model, Breaking(batches(), 3), hooks=[method])
    assert what_it_is(model) == before
    with pytest.raises(InvalidArgument, match="^plan: expected "):
        method.plan()


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_is_refused_before_the_run(name: str) -> None:
    model = tiny()
    before = weights(model)
    kinds = {group.kind for group in sc.inspect(model).groups} - {*registry.named(name).kinds}
    for wanted in [{"target": sc.Target(macs=1e-3)}, *({"groups": [kind]} for kind in sorted(kinds - {"layer"}))]:
        with pytest.raises(InvalidArgument, match="^(target|groups): expected "):
            sc.finetune(model, batches(), hooks=[method_for(name, **wanted)])
    assert same(weights(model), before)


@pytest.mark.parametrize("name", METHODS)
def test_groups_that_are_frozen_stay_whole(name: str) -> None:
    model = tiny()
    method = method_for(name, freeze=["blocks.1.*"], target=None, ratios=dict.fromkeys(registry.named(name).kinds, 0.5))
    sc.finetune(model, batches(), hooks=[method])
    plan = method.plan()
    assert plan.keep
    assert all(group.startswith("blocks.0.") for group in plan.keep)
    assert all(keep.dtype == np.int64 for keep in plan.keep.values())
