"""What trained methods share: registration from outside, a budget that is checked before the run, and the plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import torch
from finetuning import batches, quiet, same, weights
from secateur.anatomy import Anatomy, Group
from secateur.errors import InvalidArgument
from secateur.methods.base import Decision
from secateur.trained.base import TrainedMethod
from secateur.trained.registry import register, registry
from secateur.training.hooks import State
from torch import nn


@dataclass(frozen=True)
class FirstOptions:
    factor: float = 1.0


class First(TrainedMethod):
    """The first units of each head stay; what a layer loses grows with its block's number."""

    name = "first"
    paper = "none"
    Options = FirstOptions
    kinds = ("v", "ffn")

    @contextmanager
    def attach(self, model: nn.Module, anatomy: Anatomy, groups: list[Group]) -> Iterator[tuple[()]]:
        del model, anatomy
        self.trained = [group.name for group in groups]
        self.steps = 0
        yield ()

    def after_step(self, step: int) -> None:
        self.steps = step

    def state(self) -> State:
        return {"steps": self.steps}

    def load_state(self, state: State) -> None:
        self.steps = state["steps"]

    def losses(self, group: Group) -> np.ndarray:
        return self.options.factor * (1.0 + 9 * group.block) * np.arange(group.size, -1, -1.0)

    def decide(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> Decision:
        del model
        keep = {
            group.name: np.tile(np.arange(sizes[group.name]), (group.heads, 1))
            for group in anatomy.groups
            if sizes[group.name] < group.size
        }
        assert keep.keys() <= {*self.trained}
        return Decision(keep)


@pytest.fixture(autouse=True)
def _first(monkeypatch: pytest.MonkeyPatch) -> None:
    sc.trained_methods()  # those of the package register themselves once
    monkeypatch.setattr(registry, "_found", dict(registry._found))
    register(First)


def test_a_method_from_outside_trains_and_plans() -> None:
    model, images = quiet(num_heads=3, embed_dim=21), batches(3)
    assert "first" in sc.trained_methods()
    first = sc.trained_method("first", ratios={"v": 0.4, "blocks.1.ffn": 0.25}, factor=2.0)
    found = sc.finetune(model, images, epochs=2, hooks=[first])
    assert (found.steps, first.steps) == (6, 6)
    assert first.trained == ["blocks.0.v", "blocks.1.v", "blocks.1.ffn"]
    plan = first.plan()
    assert (plan.method, plan.options) == ("first", {"factor": 2.0, "target": None, "round_to": None})
    assert {name: keep.shape for name, keep in plan.keep.items()} == {
        "blocks.0.v": (3, 4),
        "blocks.1.v": (3, 4),
        "blocks.1.ffn": (1, 63),
    }
    anatomy = sc.inspect(model)
    report = sc.prune(model, plan)
    assert report.params == plan.params == (anatomy.params, sc.inspect(model).params)
    assert report.macs == plan.macs


def test_a_target_is_shared_out_uniformly_or_by_the_method() -> None:
    model = quiet(global_pool="avg")  # the last block costs as much as the first
    plans = {}
    for allocation in (None, "uniform", "error"):
        first = sc.trained_method(
            "first", target=sc.Target(macs=0.8), groups=["ffn"], round_to=1, allocation=allocation
        )
        sc.finetune(model, batches(1), hooks=[first])
        plans[allocation] = {name: keep.shape[1] for name, keep in first.plan().keep.items()}
        assert first.plan().macs[1] <= 0.8 * first.plan().macs[0]
    assert plans[None] == plans["uniform"]
    assert abs(plans[None]["blocks.0.ffn"] - plans[None]["blocks.1.ffn"]) <= 1
    # The first block's units are lost at a tenth of what the second's are.
    assert plans["error"]["blocks.0.ffn"] < plans["uniform"]["blocks.0.ffn"] - 10
    assert "blocks.1.ffn" not in plans["error"]


def test_other_budgets_of_one_run() -> None:
    first = sc.trained_method("first", target=sc.Target(macs=0.9), groups=["v", "ffn"], round_to=1)
    sc.finetune(quiet(), batches(1), hooks=[first])
    half = first.plan(target=sc.Target(params=0.7))
    assert half.params[1] <= 0.7 * half.params[0]
    assert half.options["target"] == {"macs": None, "params": 0.7, "latency": None}
    assert first.plan(ratios={"ffn": 0.5}).keep["blocks.0.ffn"].shape == (1, 32)
    assert first.plan().options["target"]["macs"] == 0.9


def linear(table: sc.LatencyTable) -> sc.LatencyTable:
    """The same layers with times that no other process changes: they grow by a microsecond with every unit."""
    layers = []
    for layer in table.layers:
        seconds = 1e-5 + 1e-6 * sum(np.meshgrid(*layer.grid.axes.values(), indexing="ij"), np.zeros(()))
        layers.append(replace(layer, grid=replace(layer.grid, seconds=seconds), uneven=None))
    return replace(table, layers=tuple(layers), scale=1.0, overhead=0.0)


def test_a_target_for_latency() -> None:
    model = quiet(depth=1, global_pool="avg")
    first = sc.trained_method("first", target=sc.Target(latency=0.999), groups=["ffn"], round_to=1, batch_size=2)
    sc.finetune(model, batches(1), hooks=[first])
    with pytest.MonkeyPatch.context() as patch:
        table = linear(sc.measure_latency(model, batch_size=2, groups=["ffn"]))
        patch.setattr("secateur.trained.base.table_for", lambda *_: table)
        patch.setattr("secateur.plans.on_the_clock.measured_ratio", lambda *_, **__: (0.99, (0.98, 1.0)))
        plan = first.plan()
    assert plan.latency is not None
    assert plan.latency.batch_size == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "last"}, r"name: expected one of .*first.*, got 'last'"),
        ({"speed": 1}, r"options: expected factor, got 'speed'"),
        ({}, r"target, ratios: expected exactly one, got neither"),
        ({"ratios": {"v": 0.5}, "target": sc.Target(macs=0.5)}, r"target, ratios: expected exactly one, got both"),
        ({"target": 0.5}, r"target: expected a Target, such as Target\(macs=0.5\), got 0.5"),
        (
            {"target": sc.Target(macs=0.5), "allocation": "even"},
            r"allocation: expected 'error' or 'uniform', got 'even'",
        ),
        ({"ratios": {"v": 0.5}, "groups": "v"}, r"groups: expected a sequence of names, got 'v'"),
        ({"ratios": {"v": 0.5}, "batch_size": 1}, r"batch_size: expected none without Target\(latency=\), got 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        sc.trained_method(**{"name": "first", **arguments})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ratios": {"qk": 0.5}}, r"groups: expected kinds that 'first' removes \(v, ffn\), got 'qk'"),
        ({"target": sc.Target(macs=0.9)}, r"groups: expected kinds that 'first' removes \(v, ffn\), got 'qk'"),
        ({"ratios": {"blocks.7.v": 0.5}}, r"ratios: expected .* or a group's name, got 'blocks.7.v'"),
        (
            {"target": sc.Target(macs=0.01), "groups": ["ffn"]},
            r"target: expected .* \(the least these groups reach\), .*",
        ),
    ],
)
def test_budgets_that_the_model_cannot_meet_are_refused_before_the_run(arguments: dict[str, object], text: str) -> None:
    model = quiet()
    before = weights(model)
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        sc.finetune(model, batches(1), hooks=[sc.trained_method("first", **arguments)])
    assert same(weights(model), before)


def test_plans_before_a_run_after_a_broken_one_and_of_other_weights() -> None:
    model = quiet()
    first = sc.trained_method("first", ratios={"v": 0.5})
    nothing = r"^plan: expected 'first' in the hooks of a finetune that ended, got none$"
    with pytest.raises(InvalidArgument, match=nothing):
        first.plan()
    sc.finetune(model, batches(1), hooks=[first])
    assert first.plan().keep.keys() == {"blocks.0.v", "blocks.1.v"}
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[0, 0] += 1
    with pytest.raises(InvalidArgument, match=r"^model: expected the same model, got other weights of .*fc2.weight$"):
        first.plan()
    with pytest.raises(InvalidArgument, match="^loader: "):
        sc.finetune(model, [torch.ones(2, 3)], hooks=[first], teacher=quiet(), alpha=1.0, steps=1)
    with pytest.raises(InvalidArgument, match=nothing):
        first.plan()


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"factor": 2.0}, "factor"),
        ({"ratios": {"v": 0.25}}, "ratios"),
        ({"freeze": ["blocks.0.*"]}, "freeze"),
        ({"ratios": None, "target": sc.Target(macs=0.9), "groups": ["ffn"]}, "target"),
    ],
)
def test_a_checkpoint_of_other_options_or_another_budget_is_refused(
    tmp_path: Path, other: dict[str, object], name: str
) -> None:
    mine = {"ratios": {"v": 0.5}}
    sc.finetune(quiet(), batches(1), hooks=[sc.trained_method("first", **mine)], resume=tmp_path / "run")
    again = sc.trained_method("first", **mine)
    assert sc.finetune(quiet(), batches(1), hooks=[again], resume=tmp_path / "run").resumed == 1
    assert again.steps == 1
    text = f"^resume: expected a checkpoint of this run, got one with hooks=.*'{re.escape(name)}': "
    changed = sc.trained_method("first", **{**mine, **other})
    with pytest.raises(InvalidArgument, match=text):
        sc.finetune(quiet(), batches(1), hooks=[changed], resume=tmp_path / "run")


def test_the_example_of_the_documents() -> None:
    text = (Path(__file__).parents[3] / "docs/extending.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "TrainedMethod" in block]
    exec(example, {"__name__": "example"})
    assert 20 <= len(example.splitlines()) <= 45
    model = quiet()
    for allocation in ("uniform", "error"):
        taylor = sc.trained_method(
            "taylor", target=sc.Target(macs=0.6), groups=["ffn"], round_to=1, allocation=allocation
        )
        sc.finetune(model, batches(3), hooks=[taylor])
        plan = taylor.plan()
        assert 0.58 * plan.macs[0] < plan.macs[1] <= 0.6 * plan.macs[0]
    scores = {name: score.clone() for name, score in taylor.state().items()}
    for name, keep in plan.keep.items():
        kept = scores[name][keep[0]]
        scores[name][keep[0]] = 0
        assert kept.min() >= scores[name].max()
    sc.prune(model, plan)
