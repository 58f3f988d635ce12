"""Steps: which multiples of sizes a runtime rewards, in a table, its file, and plans with round_to="auto"."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import torch
from secateur.latency import measure as timing
from secateur.latency import table as tables
from secateur.latency.machine import Machine
from secateur.latency.steps import step_of
from secateur.plans import on_the_clock
from timm.models.vision_transformer import VisionTransformer

OLD = Path(__file__).parents[2] / "data" / "0.1.0" / "latency.json"


def staircase(step):
    return lambda size: 50.0 + step * -(-size // step)


def slower_between(step, share):
    return lambda size: (50.0 + size) * (1 + share * (size % step != 0))


class Clock:
    """Seconds of a layer as a function of its size, with noise."""

    def __init__(self, seconds, noise=0.0, seed=0):
        self.seconds, self.noise, self.seen = seconds, noise, set()
        self.random = np.random.default_rng(seed)

    def __call__(self, sizes):
        self.seen |= set(sizes)
        times = np.array([self.seconds(size) for size in sizes], float)
        return times * np.exp(self.noise * self.random.standard_normal((7, len(times))))


# --- Which step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [45, 64, 93, 197, 768, 1537])
@pytest.mark.parametrize("step", [2, 4, 8, 16])
def test_sizes_that_take_longer_than_multiples_make_a_step(size, step):
    assert step_of(size, Clock(slower_between(step, 0.25))) == step
    noisy = [step_of(size, Clock(slower_between(step, 0.25), noise=0.02, seed=seed)) for seed in range(20)]
    assert noisy == [step] * 20


@pytest.mark.parametrize(("size", "step"), [(60, 8), (64, 8), (93, 16), (197, 32)])
def test_a_staircase_is_its_step(size, step):
    clock = Clock(staircase(step))
    clock.seconds = lambda n: float(step * -(-n // step))
    assert step_of(size, clock) == step


@pytest.mark.parametrize(
    "seconds",
    [
        lambda n: 1.0,
        lambda n: float(n),
        lambda n: 100.0 + n,
        lambda n: n * (1 + 0.02 * (n % 32 != 0)),  # the 2 % that onnxruntime takes longer
        lambda n: n * (0.9 + 0.2 * (n % 8 == 0)),  # multiples are slower
    ],
)
def test_without_a_reward_there_is_no_step_and_three_sizes_tell(seconds):
    for size in (1, 3, 4, 7, 45, 64, 93, 768, 3072):
        clock = Clock(seconds)
        assert step_of(size, clock) == 1
        assert len(clock.seen) <= 3
        assert all(1 <= each <= size for each in clock.seen)


@pytest.mark.parametrize("size", [60, 64, 768])
def test_noise_makes_no_step(size):
    assert {step_of(size, Clock(float, noise=0.02, seed=seed)) for seed in range(200)} == {1}


def test_what_rounding_costs_more_than_it_saves_is_no_step():
    """33 to 48 take a little longer than the line to 64 tells, but much less than 64."""
    assert step_of(64, Clock(lambda n: n * (1 + 0.05 * (n % 32 != 0)))) == 1
    assert step_of(64, Clock(lambda n: n * (1 + 0.5 * (n % 32 != 0)))) == 32


def test_sizes_are_multiples_of_what_the_group_asks_for():
    """Rotary pairs: odd numbers of them cannot be measured, so that only a step above the group's own counts."""
    for step, found in ((2, 1), (4, 4), (8, 8)):
        clock = Clock(slower_between(step, 0.25))
        assert step_of(96, clock, multiple=2) == found
        assert all(size % 2 == 0 for size in clock.seen)
    assert step_of(96, Clock(slower_between(8, 0.25)), multiple=3) == 1


# --- Measuring --------------------------------------------------------------------------------------------------------


def small(width=48, depth=2, heads=3, ratio=2.5):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=ratio, num_classes=5
    ).eval()


@pytest.fixture
def clock_of_steps(monkeypatch):
    """FFN layers take as long as their units rounded up to 8, all else as long as it has weights.

    Attention with more queries than values, or fewer, takes half as long again, by another kernel.
    """
    seen = []

    def seconds(module):
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        hidden = [shape[0] for name, shape in shapes.items() if name.endswith("fc1.weight")]
        if hidden and not any("attn" in name or "qkv" in name for name in shapes):
            return sum(1000.0 * 8 * -(-units // 8) for units in hidden)
        unequal = any(getattr(m, "qk_dim", 0) != getattr(m, "v_dim", 0) for m in module.modules())
        return float(sum(shape.numel() for shape in shapes.values())) * (1.5 if unequal else 1.0)

    def in_turn(models, inputs, loops, repeats, advance):
        seen.append(len(models))
        for model, x in zip(models, inputs, strict=True):
            model(x)
        return np.tile([seconds(model) for model in models], (repeats, 1))

    monkeypatch.setattr(timing, "in_turn", in_turn)
    return seen


def test_a_table_finds_the_steps_of_its_kinds(clock_of_steps):
    model = small()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for groups, steps in (
        (("qk", "ffn"), {"qk": 1, "ffn": 8}),
        (("qk", "v"), {"qk": 1, "v": 1}),
        (("width", "heads", "ffn"), {"ffn": 8}),
        (("width",), {}),
    ):
        assert sc.measure_latency(model, groups=groups, repeats=1).steps == steps
    table = sc.measure_latency(model, repeats=1)
    assert table.steps == {"qk": 1, "v": 1, "ffn": 8}
    assert str(table).endswith("; steps qk 1, v 1, ffn 8")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_steps_change_nothing_else_in_a_table_and_cost_little(clock_of_steps, monkeypatch):
    model, prepared, ready = small(), [], timing.prepared
    monkeypatch.setattr(timing, "prepared", lambda *arguments: prepared.append(1) or ready(*arguments))
    without = sc.measure_latency(model, groups=("qk", "v", "ffn"), repeats=1, steps=False)
    timed, made = len(clock_of_steps), len(prepared)
    assert without.steps is None
    assert "steps" not in str(without)
    clock_of_steps.clear()
    prepared.clear()
    table = sc.measure_latency(model, groups=("qk", "v", "ffn"), repeats=1)
    # Attention, without a step, at three sizes; the FFN at 64, 65, 66, 68, 72 and 96, and then at 71 too.
    assert len(prepared) - made == 3 + 7
    assert len(clock_of_steps) - timed == 1 + 5
    sizes, anatomy = {"blocks.0.ffn": 61, "blocks.1.qk": 5, "blocks.1.v": 5}, sc.inspect(model)
    assert table.predict(anatomy, sizes) == without.predict(anatomy, sizes)


def test_the_largest_layer_of_a_kind_tells(clock_of_steps, monkeypatch):
    model = small(depth=3)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stats = sc.calibrate(model, [images], collect="scores")
    sc.prune(model, sc.plan(model, stats, method="snp", ratios={"blocks.0.ffn": 0.5, "blocks.1.qk": 0.5}))
    asked = []
    monkeypatch.setattr(timing, "step_of", lambda size, clock, multiple: asked.append((size, multiple)) or size)
    steps = sc.measure_latency(model, repeats=1).steps
    assert steps == {"qk": 16, "v": 16, "ffn": 120}
    assert sorted(asked) == [(16, 1), (120, 1)]


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(make_digits_model):
    """Of the digits model: its times do not matter here, but for a target for latency."""
    with pytest.MonkeyPatch.context() as patch:

        def in_turn(models, inputs, loops, repeats, advance):
            return np.tile([float(sum(p.numel() for p in model.parameters())) for model in models], (repeats, 1))

        patch.setattr(timing, "in_turn", in_turn)
        found = sc.measure_latency(make_digits_model(), repeats=1)
    assert found.steps == {"qk": 1, "v": 1, "ffn": 1}
    # The fixtures set two threads for every test.
    machine = replace(Machine.here(torch.device("cpu")), threads=2)
    return replace(found, steps={"qk": 5, "v": 5, "ffn": 24}, machine=machine)


def test_steps_come_back_from_a_file(table, tmp_path):
    table.save(tmp_path / "table.json")
    found = sc.LatencyTable.load(tmp_path / "table.json")
    assert found.steps == table.steps
    assert str(found) == str(table)
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "table.json").read_bytes()
    replace(table, steps=None).save(tmp_path / "without.json")
    assert sc.LatencyTable.load(tmp_path / "without.json").steps is None


def test_tables_of_before_have_no_steps(table, tmp_path):
    assert sc.LatencyTable.load(OLD).steps is None
    table.save(tmp_path / "table.json")
    outer = json.loads((tmp_path / "table.json").read_text())
    outer["format"] = 4
    del outer["table"]["steps"]
    outer["sha256"] = tables._digest(outer["table"])
    (tmp_path / "table.json").write_text(json.dumps(outer))
    assert sc.LatencyTable.load(tmp_path / "table.json").steps is None


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ({"ffn": 0}, r"steps\['ffn'\]: expected an integer of at least 1, got 0"),
        ({"ffn": 1.5}, r"steps\['ffn'\]: expected an integer of at least 1, got 1.5"),
        ({"head": 8}, "steps of 'head', which is no kind"),
        ([8], ""),
        (8, ""),
        ("ffn", ""),
    ],
)
def test_damaged_steps_are_refused(table, tmp_path, steps, text):
    table.save(tmp_path / "table.json")
    outer = json.loads((tmp_path / "table.json").read_text())
    outer["table"]["steps"] = steps
    outer["sha256"] = tables._digest(outer["table"])
    (tmp_path / "table.json").write_text(json.dumps(outer))
    with pytest.raises(sc.InvalidArgument, match=f"^table.json: expected a secateur latency table, got .*{text}"):
        sc.LatencyTable.load(tmp_path / "table.json")


# --- round_to="auto" --------------------------------------------------------------------------------------------------

BUDGETS = [
    {"target": sc.Target(macs=0.6)},
    {"target": sc.Target(params=0.6), "groups": ("qk", "v", "ffn", "width")},
    {"ratios": {"qk": 0.4, "v": 0.3, "ffn": 0.55, "width": 0.1}},
]


@pytest.fixture(scope="module")
def stats(make_digits_model, digits_images):
    return sc.calibrate(make_digits_model(), [digits_images[:16]], sensitivity="noise")


@pytest.mark.parametrize("budget", BUDGETS)
def test_auto_is_the_steps_of_the_table(digits_model, stats, table, tmp_path, budget):
    table.save(tmp_path / "table.json")
    found = sc.plan(digits_model, stats, **budget, round_to="auto", latency_table=tmp_path / "table.json")
    wanted = sc.plan(digits_model, stats, **budget, round_to=table.steps)
    assert found.to_dict() == wanted.to_dict()
    assert found.latency is None
    anatomy = sc.inspect(digits_model)
    for name, kept in found.keep.items():
        kind = anatomy.group(name).kind
        assert kept.shape[1] % table.steps.get(kind, 32 if "target" in budget else 1) == 0, name
    assert {anatomy.group(name).kind for name in found.keep} >= {"qk", "v"}
    assert found.options["round_to"] == {"qk": 5, "v": 5, "ffn": 24}
    found.save(tmp_path / "plan.json")
    assert sc.Plan.load(tmp_path / "plan.json").options["round_to"] == {"qk": 5, "v": 5, "ffn": 24}


def test_what_was_rounded_to_is_in_every_plan(digits_model, stats):
    for round_to, recorded in ((None, None), (np.int64(4), 4), ({"block": 1, "ffn": 2}, {"layer": 1, "ffn": 2})):
        found = sc.plan(digits_model, stats, target=sc.Target(macs=0.6), round_to=round_to)
        assert found.options["round_to"] == recorded


def test_a_target_for_latency_takes_the_steps_of_the_table_that_it_measures(digits_model, stats, table, monkeypatch):
    asked = []

    def measured(model, **arguments):
        asked.append(arguments["steps"])
        return table if arguments["steps"] else replace(table, steps=None)

    def ratio(model, table, sizes):
        anatomy = sc.inspect(model)
        return table.predict(anatomy, sizes) / table.predict(anatomy), (0.0, 1.0)

    monkeypatch.setattr(on_the_clock, "measure_latency", measured)
    monkeypatch.setattr(on_the_clock, "measured_ratio", ratio)
    budget = {"target": sc.Target(latency=0.6), "allocation": "error"}
    plans = [
        sc.plan(digits_model, stats, **budget, round_to="auto"),
        sc.plan(digits_model, stats, **budget, round_to="auto", latency_table=table),
        sc.plan(digits_model, stats, **budget, round_to=table.steps, latency_table=table),
    ]
    assert asked == [True]
    for found in plans[:2]:
        assert found.to_dict() == plans[2].to_dict()
    assert plans[0].latency.measured <= 0.6
    sc.plan(digits_model, stats, **budget)
    assert asked == [True, False]


NO_TABLE = r'^round_to: expected latency_table= with "auto", from measure_latency, got none'
NO_STEPS = r'^latency_table: expected one that knows steps for round_to="auto", got one without; measure it again with '
OTHER_WORD = r"""^round_to: expected an integer, a dict or "auto", got 'fast'"""
OTHER_MODEL = r"^latency_table: expected the same model, got "


def refused(table, other):
    return [
        ({"round_to": "auto"}, NO_TABLE),
        ({"round_to": "fast"}, OTHER_WORD),
        ({"round_to": "fast", "latency_table": table}, OTHER_WORD),
        ({"round_to": "auto", "latency_table": replace(table, steps=None)}, NO_STEPS),
        ({"round_to": "auto", "latency_table": other}, OTHER_MODEL),
        ({"round_to": "auto", "latency_table": 5}, "^latency_table: expected a LatencyTable or its file, got 5"),
        ({"round_to": "auto", "latency_table": "nowhere.json"}, "^latency_table: expected a secateur latency table"),
        ({"round_to": 8, "latency_table": table}, '^latency_table: expected none without .*round_to="auto"'),
    ]


@pytest.fixture
def cases(table, clock_of_steps):
    return refused(table, sc.measure_latency(small(), groups=("ffn",), repeats=1))


def test_refused_by_plan(digits_model, stats, cases):
    for arguments, text in cases:
        for budget in BUDGETS:
            with pytest.raises(sc.InvalidArgument, match=text):
                sc.plan(digits_model, stats, **budget, **arguments)
    arguments = {"round_to": "auto", "batch_size": 4, "latency_table": cases[2][0]["latency_table"]}
    with pytest.raises(sc.InvalidArgument, match="^batch_size: expected none without Target"):
        sc.plan(digits_model, stats, **BUDGETS[0], **arguments)


def train_with_gates(model, batches, **arguments):
    gates = sc.trained_method("gates", target=sc.Target(macs=0.6), **arguments)
    sc.finetune(model, batches, teacher=copy.deepcopy(model), steps=1, hooks=[gates])


def test_refused_by_what_plans_later(digits_model, digits_images, stats, cases):
    batches = [digits_images[:8]]
    for arguments, text in cases:
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.prune_sequential(digits_model, batches, target=sc.Target(macs=0.6), **arguments)
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.search(digits_model, stats, objective=sc.AccuracyCritical(), loader=batches, **arguments)
        with pytest.raises(sc.InvalidArgument, match=text):
            train_with_gates(digits_model, batches, **arguments)


@pytest.mark.parametrize("target_stream", ["dense", "pruned"])
def test_sequential_pruning_takes_steps(make_digits_model, digits_images, table, target_stream):
    how = {"target": sc.Target(macs=0.6), "allocation": "uniform", "target_stream": target_stream, "groups": ("ffn",)}
    reports = [
        sc.prune_sequential(make_digits_model(), [digits_images[:16]], **how, **rounding)
        for rounding in ({"round_to": "auto", "latency_table": table}, {"round_to": {"ffn": 24}})
    ]
    assert reports[0].groups == reports[1].groups
    assert all(size % 24 == 0 or size == whole for whole, size in reports[0].groups.values())
    measured = sc.prune_sequential(
        make_digits_model(), [digits_images[:16]], target=sc.Target(macs=0.6), round_to="auto", latency_table=table
    )
    after = {name: size for name, (whole, size) in measured.groups.items() if name.endswith(".ffn") and size < whole}
    assert after
    assert all(size % 24 == 0 for size in after.values())


def test_a_search_takes_steps(digits_model, digits_images, stats, table, tmp_path):
    batches = [digits_images[:16]]
    how = {"objective": sc.AccuracyCritical(100.0), "loader": batches, "method": "snp", "rounds": 2, "step": 0.15}
    found = sc.search(
        digits_model, stats, **how, round_to="auto", latency_table=table, resume=tmp_path / "search.safetensors"
    )
    wanted = sc.search(digits_model, stats, **how, round_to=table.steps)
    assert found.plan.to_dict() == wanted.plan.to_dict()
    assert [row.params for row in found.history] == [row.params for row in wanted.history]
    # The file knows what "auto" was.
    changed = replace(table, steps={**table.steps, "ffn": 12})
    with pytest.raises(sc.InvalidArgument, match="^resume: expected the file of this search, got one with round_to: "):
        sc.search(
            digits_model, stats, **how, round_to="auto", latency_table=changed, resume=tmp_path / "search.safetensors"
        )


def test_a_trained_method_measures_steps(digits_model, digits_images, table, monkeypatch):
    monkeypatch.setattr(on_the_clock, "measure_latency", lambda _model, **how: table if how["steps"] else None)
    monkeypatch.setattr(on_the_clock, "measured_ratio", lambda *_: (0.58, (0.57, 0.59)))
    gates = sc.trained_method("gates", target=sc.Target(latency=0.6), groups=["ffn"], round_to="auto")
    sc.finetune(digits_model, [digits_images[:8]], teacher=copy.deepcopy(digits_model), steps=2, alpha=1, hooks=[gates])
    plan = gates.plan()
    assert plan.keep
    assert all(kept.shape[1] % 24 == 0 for kept in plan.keep.values())
    assert plan.options["round_to"] == table.steps


def test_a_trained_method_takes_steps(digits_model, digits_images, table):
    gates = sc.trained_method("gates", target=sc.Target(macs=0.6), groups=["ffn"], round_to="auto", latency_table=table)
    sc.finetune(digits_model, [digits_images[:8]], teacher=copy.deepcopy(digits_model), steps=2, alpha=1, hooks=[gates])
    plan = gates.plan()
    assert plan.keep
    assert all(kept.shape[1] % 24 == 0 for kept in plan.keep.values())
    assert plan.options["round_to"] == table.steps
    assert all(kept.shape[1] % 24 == 0 for kept in gates.plan(ratios={"ffn": 0.3}).keep.values())
