"""Engines: which one times a model, what its times are kept with, and what is refused."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path

import outside
import pytest
import secateur as sc
import torch
from secateur.latency import table as latency
from secateur.latency.machine import Machine
from secateur.latency.runtimes.registry import RUNTIMES, chosen, register
from secateur.latency.table import Grid, LatencyTable, Layer
from secateur.plans import on_the_clock
from secateur.plans.on_the_clock import LatencyReport
from secateur.searches import course as searching
from secateur.searches.objectives import LatencySensitive, settings_of
from timm.models.vision_transformer import VisionTransformer
from torch import nn

DATA = next(parent for parent in Path(__file__).parents if parent.name == "tests") / "data" / "0.1.0"


def small(width=24, depth=2):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=width, depth=depth, num_heads=2, mlp_ratio=2.5, num_classes=5
    ).eval()


class Engine:
    """Runs a copy of the module; keeps what it was asked for and how often it ran."""

    name = "spy"
    version = "7.1"

    def __init__(self):
        self.prepared, self.ran, self.wrong = [], 0, 0.0

    def prepare(self, module, example):
        self.prepared.append((module, tuple(example.shape), torch.is_inference_mode_enabled(), module.training))
        twin = copy.deepcopy(module)

        def run(x):
            self.ran += 1
            return (twin(x) * (1 + self.wrong)).numpy()

        return run


@pytest.fixture
def spy(monkeypatch):
    RUNTIMES.names()
    monkeypatch.setattr(RUNTIMES, "_found", dict(RUNTIMES._found))
    register(Engine)
    return RUNTIMES.named("spy")


# --- bench ------------------------------------------------------------------------------------------------------------


def test_the_engine_is_what_is_timed(spy):
    model, reference = small(), small(32)
    calls = []
    for each in (model, reference):
        each.register_forward_hook(lambda *_: calls.append(1))
    found = sc.bench(model.train(), reference, batch_size=3, repeats=2, warmup=1, runtime="spy")
    assert [given for given, *_ in spy.prepared] == [model, reference]
    assert {shape for _, shape, *_ in spy.prepared} == {(3, 3, 16, 16)}
    assert all(inference and not training for *_, inference, training in spy.prepared)
    assert spy.ran >= 2 * (1 + 1 + 1 + 2)
    assert model.training
    assert found.runtime == "spy"
    assert "on cpu by spy, 2 threads" in str(found)


def test_torch_is_the_engine_unless_told(spy):
    assert sc.bench(small(), batch_size=1, repeats=1, warmup=0).runtime == "torch"
    assert not spy.prepared
    assert chosen(None).name == "torch"
    assert chosen(None, compile=True).name == chosen("torch.compile").name == "torch.compile"


def test_an_engine_that_computes_something_else_is_refused(spy):
    spy.wrong = 0.1
    for call in (lambda **more: sc.bench(small(), **more), lambda **more: sc.measure_latency(small(), **more)):
        with pytest.raises(sc.InvalidArgument, match="runtime: expected one that computes what the model does, got "):
            call(batch_size=2, repeats=1, runtime="spy")


def test_an_engine_may_round_otherwise(spy):
    spy.wrong = 1e-3
    sc.bench(small(), batch_size=2, repeats=1, runtime="spy")


def test_whose_failure_it_is_is_said(spy, monkeypatch):
    with pytest.raises(sc.InvalidArgument, match=r"reference: expected a model that takes images of \(1, 3, 16, 16\)"):
        sc.bench(small(), nn.Linear(5, 5), batch_size=1, runtime="spy")

    def fail(*_):
        raise KeyError("no operation Erf\nand more")

    monkeypatch.setattr(Engine, "prepare", fail)
    with pytest.raises(sc.InvalidArgument) as caught:
        sc.bench(small(), batch_size=1, runtime="spy")
    text = "runtime: expected one that runs the model, got spy's KeyError: 'no operation Erf\\nand more'"
    assert str(caught.value) == text

    def refuse(*_):
        raise sc.Unsupported("device: expected cpu for spy, got cuda")

    monkeypatch.setattr(Engine, "prepare", refuse)
    with pytest.raises(sc.Unsupported, match="^device: expected cpu for spy, got cuda$"):
        sc.bench(small(), batch_size=1, runtime="spy")


@pytest.mark.parametrize("call", [sc.bench, sc.measure_latency])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"runtime": "tensorrt"}, "runtime: expected one of .*torch, torch.compile, got 'tensorrt'"),
        ({"runtime": 3}, "runtime: expected one of .*torch, torch.compile, got 3"),
        (
            {"runtime": "torch", "compile": True},
            "compile, runtime: expected one of them, got compile=True and runtime='torch'",
        ),
    ],
)
def test_wrong_engines(call, arguments, text):
    with pytest.raises(sc.InvalidArgument, match=f"^{text}$"):
        call(small(), **arguments)


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_every_layer_and_whole_model_is_measured_on_the_engine(spy):
    model = small(depth=5)
    how = {"groups": ("ffn",), "grid": {"ffn": [20]}, "repeats": 1, "batch_size": 2}
    table = sc.measure_latency(model, **how, runtime="spy", steps=False)
    assert (table.runtime, table.runtime_version, table.compiled) == ("spy", "7.1", False)
    assert "float32, by spy 7.1, on" in str(table)
    # The reference, attention in both forms of the last block, FFN of two sizes, also for the class token alone, what
    # stands around, the model and four cuts of it. Copies of layers would be prepared as well: none are made.
    shapes = [shape for _, shape, *_ in spy.prepared]
    assert shapes.count((2, 3, 16, 16)) == 1 + 1 + 4
    assert shapes.count((2, 17, 24)) == 1 + 2 + 2
    assert shapes.count((2, 1, 24)) == 2
    assert not any(isinstance(module, nn.Sequential) for module, *_ in spy.prepared)
    assert table.predict(sc.inspect(model), {"blocks.0.ffn": 20}) > 0


def test_the_reference_is_prepared_once(spy):
    few = sc.measure_latency(small(), groups=("ffn",), grid={"ffn": [20]}, repeats=1, runtime="spy", steps=False)
    first = len(spy.prepared)
    many = sc.measure_latency(
        small(), groups=("ffn",), grid={"ffn": [10, 20, 30]}, repeats=1, runtime="spy", steps=False
    )
    for ffn in (2, 3):
        assert many.layers[ffn].grid.seconds.size - few.layers[ffn].grid.seconds.size == 2
    assert len(spy.prepared) - first == first + 4


def table_of(model, **changes):
    """Of time in proportion to the hidden units."""
    anatomy = sc.inspect(model)
    size = anatomy.sizes["blocks.0.ffn"]
    places = tuple({"ffn": f"blocks.{block}.ffn"} for block in range(2))
    found = LatencyTable(
        model=latency.Fingerprint.without_weights(anatomy),
        input_size=anatomy.input_size,
        batch_size=1,
        dtype="float32",
        runtime="spy",
        runtime_version="7.1",
        machine=Machine.here(torch.device("cpu")),
        layers=(Layer(places, Grid({"ffn": (1, size)}, latency.np.array([1.0, size]))),),
        scale=1.0,
        overhead=0.0,
    )
    return replace(found, **changes)


@pytest.fixture
def planned(monkeypatch):
    """A model, and what plans for half its latency: returns the plan and the engines that were measured on."""
    model = small()
    stats = sc.calibrate(model, [torch.randn(4, 3, 16, 16)])
    measured = []

    def ratio(model, table, sizes):
        measured.append(table.runtime)
        return 0.49, (0.48, 0.5)

    monkeypatch.setattr(on_the_clock, "measured_ratio", ratio)

    def plan(**arguments):
        measured.clear()
        return sc.plan(model, stats, target=sc.Target(latency=0.5), groups=("ffn",), round_to=1, **arguments), measured

    return model, plan


def test_a_plan_is_measured_on_the_tables_engine(spy, planned, tmp_path):
    model, plan = planned
    for given in ({}, {"runtime": "spy"}):
        chosen, measured = plan(latency_table=table_of(model), **given)
        assert measured == ["spy"]
        assert (chosen.latency.runtime, chosen.latency.runtime_version) == ("spy", "7.1")
        assert "(batch 1, float32, spy)" in str(chosen)
    chosen.save(tmp_path / "plan.json")
    assert sc.Plan.load(tmp_path / "plan.json").latency == chosen.latency


def test_the_promise_is_kept_on_the_engine(spy, monkeypatch):
    """`measured` is of what the engine ran, the cut model and the dense one, not of torch."""
    model = small()

    def in_turn(runs, inputs, *_):
        for run, x in zip(runs, inputs, strict=True):
            run(x)
        return latency.np.array([[0.97, 1.0]])

    monkeypatch.setattr(importlib.import_module("secateur.latency.bench"), "in_turn", in_turn)
    chosen = sc.plan(
        model,
        sc.calibrate(model, [torch.randn(4, 3, 16, 16)]),
        target=sc.Target(latency=0.999),
        groups=("ffn",),
        min_keep={"ffn": 59},
        round_to=1,
        latency_table=table_of(model),
        runtime="spy",
    )
    assert chosen.latency.measured == pytest.approx(0.97)
    sizes = [sc.inspect(module).sizes for module, *_ in spy.prepared[:2]]
    assert [each["blocks.0.ffn"] + each["blocks.1.ffn"] for each in sizes] == [119, 120]
    assert spy.ran == 2 * (1 + 3 + 1 + 1)


def test_a_table_is_measured_on_the_engine_that_is_asked_for(planned, monkeypatch, spy):
    plan = planned[1]
    asked = []

    def measure(model, **arguments):
        asked.append(arguments["runtime"])
        return table_of(model, runtime=arguments["runtime"] or "torch", runtime_version=torch.__version__)

    monkeypatch.setattr(on_the_clock, "measure_latency", measure)
    for name in (None, "torch.compile"):
        chosen, measured = plan(runtime=name)
        assert measured == [chosen.latency.runtime] == [name or "torch"]
    assert asked == [None, "torch.compile"]
    assert chosen.latency.compiled


def test_a_table_of_another_engine_is_refused(planned, spy):
    model, plan = planned
    with pytest.raises(sc.InvalidArgument, match="^latency_table: expected one of runtime 'torch', got one of 'spy'$"):
        plan(latency_table=table_of(model), runtime="torch")
    with pytest.raises(sc.InvalidArgument, match="^runtime: expected one of .*, got 'tensorrt'$"):
        plan(latency_table=table_of(model), runtime="tensorrt")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"runtime_version": "7.0"}, r"this has spy '7.1' where it was '7.0'\."),
        ({"runtime": "tensorrt"}, r"this has no engine 'tensorrt' \(runtime: expected one of .*"),
    ],
)
def test_an_engine_that_is_not_here_is_named_and_not_measured_on(planned, spy, changes, text):
    model, plan = planned
    with pytest.warns(UserWarning, match=f"latency_table: expected one of this machine, .*{text}"):
        chosen, measured = plan(latency_table=table_of(model, **changes))
    assert measured == []
    assert chosen.latency.measured is None
    assert chosen.latency.predicted <= 0.5


def test_an_engine_goes_with_a_latency_alone(digits_model):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    stats = sc.calibrate(digits_model, [images], collect="scores")
    for arguments in ({"target": sc.Target(macs=0.5)}, {"ratios": {"ffn": 0.5}}):
        with pytest.raises(sc.InvalidArgument, match="runtime: expected none without Target.*, got 'torch'"):
            sc.plan(digits_model, stats, runtime="torch", **arguments)
        with pytest.raises(sc.InvalidArgument, match="runtime: expected none without Target.*, got 'torch'"):
            sc.prune_sequential(digits_model, [images], runtime="torch", **arguments)


def test_block_by_block_on_the_engine(spy, monkeypatch):
    model = small()
    measured = []

    def ratio(model, table, sizes):
        measured.append(table.runtime)
        return 0.59, (0.58, 0.6)

    monkeypatch.setattr(on_the_clock, "measured_ratio", ratio)
    arguments = {"target": sc.Target(latency=0.6), "groups": ("ffn",), "allocation": "uniform"}
    images = [torch.rand(8, 3, 16, 16) * 2 - 1]
    sc.prune_sequential(copy.deepcopy(model), images, latency_table=table_of(model), runtime="spy", **arguments)
    assert measured == ["spy"]
    with pytest.raises(sc.InvalidArgument, match="latency_table: expected one of runtime 'torch', got one of 'spy'"):
        sc.prune_sequential(model, images, latency_table=table_of(model), runtime="torch", **arguments)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_tables_of_the_first_release_say_torch_or_torch_compile(tmp_path):
    table = LatencyTable.load(DATA / "latency.json")
    assert (table.runtime, table.compiled) == ("torch", False)
    assert table.runtime_version == table.machine.pytorch
    outer = json.loads((DATA / "latency.json").read_text())
    assert outer["format"] < 3
    for number, compiled in ((1, True), (2, True), (2, False)):
        outer["table"]["compiled"], outer["format"] = compiled, number
        outer["sha256"] = latency._digest(outer["table"])
        (tmp_path / "older.json").write_text(json.dumps(outer))
        older = LatencyTable.load(tmp_path / "older.json")
        assert older.compiled == compiled
        older.save(tmp_path / "newer.json")
        newer = LatencyTable.load(tmp_path / "newer.json")
        assert (newer.runtime, newer.runtime_version) == (older.runtime, older.machine.pytorch)
        assert newer.runtime == ("torch.compile" if compiled else "torch")
        assert json.loads((tmp_path / "newer.json").read_text())["format"] == 5


def test_the_engine_comes_back_from_a_file(tmp_path, spy):
    table_of(small()).save(tmp_path / "table.json")
    found = LatencyTable.load(tmp_path / "table.json")
    assert (found.runtime, found.runtime_version) == ("spy", "7.1")


@pytest.mark.parametrize("compiled", [False, True])
def test_reports_of_the_first_release(compiled):
    machine = {"processor": "Abacus", "threads": 2, "device": "cpu", "pytorch": "2.6.0"}
    values = {
        "target": 0.5,
        "predicted": 0.49,
        "measured": None,
        "quartiles": None,
        "rounds": 1,
        "batch_size": 1,
        "dtype": "float32",
        "compiled": compiled,
        "machine": machine,
    }
    report = LatencyReport.from_dict(values)
    assert (report.runtime, report.runtime_version) == ("torch.compile" if compiled else "torch", "2.6.0")
    assert report.to_dict() == {**values, "runtime": report.runtime, "runtime_version": "2.6.0"}
    assert LatencyReport.from_dict(report.to_dict()) == report


# --- search -----------------------------------------------------------------------------------------------------------


def test_a_search_times_on_its_engine(monkeypatch, digits_model, digits_images, spy):
    asked = []

    class Found:
        speedup = 2.0

    def bench(*_, **arguments):
        asked.append(arguments["runtime"])
        return Found

    monkeypatch.setattr(searching, "bench", bench)
    stats = sc.calibrate(digits_model, [digits_images[:16]], sensitivity="noise")
    objective = LatencySensitive(latency=0.6, runtime="spy")
    sc.search(digits_model, stats, objective=objective, loader=[digits_images[:16]], rounds=2, step=0.3)
    assert set(asked) == {"spy"}


def test_a_search_on_torch_is_described_as_it_was():
    """So that files of searches from before there were engines are resumed."""
    given = LatencySensitive(latency=0.6)
    assert settings_of(given) == {
        "name": "LatencySensitive",
        "macs": None,
        "latency": 0.6,
        "batch_size": 32,
        "repeats": 15,
    }
    assert settings_of(replace(given, runtime="torch.compile"))["runtime"] == "torch.compile"
    with pytest.raises(sc.InvalidArgument, match="^runtime: expected one of .*, got 'tensorrt'$"):
        LatencySensitive(latency=0.5, runtime="tensorrt")


# --- From outside -----------------------------------------------------------------------------------------------------


def test_an_engine_of_another_package(tmp_path):
    """That of docs/extending, found by its entry point, in a process of its own; imported when it is asked for."""
    folder = outside.installed(tmp_path, *outside.documented("runtime.md"))
    outside.run(
        folder,
        """
        import warnings
        warnings.simplefilter("ignore")
        import timm, torch
        import secateur as sc
        torch.set_num_threads(1)
        small = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2, "global_pool": "avg"}
        model = timm.create_model("vit_tiny_patch16_224", **small).eval()
        sc.bench(model, batch_size=1, repeats=1)
        assert "outside_engine" not in sys.modules
        assert sc.bench(model, batch_size=1, repeats=1, runtime="torch.export").runtime == "torch.export"
        table = sc.measure_latency(model, groups=("ffn",), grid={"ffn": [32]}, repeats=1, runtime="torch.export")
        assert (table.runtime, table.runtime_version) == ("torch.export", torch.__version__)
        stats = sc.calibrate(model, [torch.rand(2, 3, 32, 32) * 2 - 1], collect="scores")
        target = sc.Target(latency=1.0)
        chosen = sc.plan(model, stats, method="snp", target=target, groups=("ffn",), latency_table=table)
        assert chosen.latency.runtime == "torch.export"
        """,
    )


def test_models_of_another_kind_have_engines_too(spy):
    """bench takes any module."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 3))
    assert sc.bench(model, batch_size=2, input_size=5, repeats=1, runtime="spy").runtime == "spy"
