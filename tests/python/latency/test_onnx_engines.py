"""onnxruntime and OpenVINO, which read an ONNX file, as the engines that are timed."""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import secateur as sc
import torch
from engines import installed
from secateur.latency.agreement import difference, largest
from secateur.latency.runtimes.registry import RUNTIMES
from secateur.latency.table import Grid, Layer
from small_vits import small_vit
from torch import nn

# The package's attribute of this name is the function.
benching = importlib.import_module("secateur.latency.bench")


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request):
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def prepared(engine):
    def prepare(module, example):
        with torch.inference_mode():
            return RUNTIMES.named(engine).prepare(module, example)

    return prepare


def version_of(engine):
    return importlib.import_module(engine).__version__.split("-")[0]


@pytest.mark.parametrize("layout", ["exact", "stock"])
def test_it_computes_a_trained_model_that_was_pruned(layout, prepared, digits_model, digits_images):
    """Fewer queries than values, a head less, fewer channels, and one layer gone."""
    ratios = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "heads": 0.34, "width": 0.2, "blocks.1.attn": 1}
    sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=ratios), layout=layout)
    for number in (1, 5):
        run = prepared(digits_model, digits_images[:number])
        for start in (0, 7):
            images = digits_images[start : start + number]
            with torch.inference_mode():
                expected = digits_model(images)
            assert difference(run(images), expected) <= 1e-5 * largest(expected)


def test_float16(prepared):
    model = small_vit().half()
    images = torch.rand(2, 3, 12, 12).half()
    with torch.inference_mode():
        expected = model(images)
    found = torch.as_tensor(prepared(model, images)(images))
    assert found.dtype == torch.float16
    assert difference(found, expected) <= 1e-2 * largest(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_that_it_has_no_operations_for(dtype, engine):
    name = str(dtype).removeprefix("torch.")
    text = f"^dtype: expected float32 or float16 for {engine}, got '{name}'$"
    with pytest.raises(sc.Unsupported, match=text):
        sc.bench(small_vit().to(dtype), batch_size=1, runtime=engine)
    with pytest.raises(sc.Unsupported, match=text):
        sc.measure_latency(small_vit(), dtype=dtype, runtime=engine)


def test_it_runs_on_the_processor_alone(engine, prepared):
    with pytest.raises(sc.Unsupported, match=f"^device: expected 'cpu' for {engine}, got 'meta'$"):
        prepared(nn.Linear(3, 3), torch.empty(1, 3, device="meta"))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "the engine's own"])
def test_a_missing_package_is_named_with_what_installs_it(package, engine, monkeypatch):
    package = engine if package == "the engine's own" else package
    extra = {"onnxruntime": "onnx", "openvino": "openvino"}[engine]
    monkeypatch.setitem(sys.modules, package, None)
    for call in (sc.bench, sc.measure_latency):
        with pytest.raises(sc.InvalidArgument) as caught:
            call(small_vit(), batch_size=1, runtime=engine)
        assert str(caught.value) == (
            f"runtime: expected {package} to be installed (pip install 'secateur[{extra}]'), got none"
        )


def test_what_else_fails_is_named(engine):
    class Branching(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images  # depends on the values

    with pytest.raises(
        sc.InvalidArgument, match=f"^runtime: expected one that runs the model, got {engine}'s .*Error: "
    ):
        sc.bench(Branching().eval(), batch_size=1, input_size=4, runtime=engine)


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_has_torchs_number_of_threads_on_the_processor(threads, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    seen = []
    session = onnxruntime.InferenceSession

    def watched(path, options, providers):
        seen.append((options.intra_op_num_threads, options.inter_op_num_threads, providers))
        return session(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    sc.bench(linear, batch_size=1, input_size=4, repeats=1, threads=threads, runtime="onnxruntime")
    assert seen == [(threads, 1, ["CPUExecutionProvider"])]


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_has_torchs_number_of_threads_and_computes_in_float32(threads, monkeypatch):
    """Some processors would compute in bfloat16 by themselves."""
    openvino = pytest.importorskip("openvino")
    seen = []
    compile_model = openvino.Core.compile_model

    def watched(core, model, device, settings):
        made = compile_model(core, model, device, settings)
        seen.append((device, *(made.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS"))))
        assert str(made.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"
        return made

    monkeypatch.setattr(openvino.Core, "compile_model", watched)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    sc.bench(linear, batch_size=1, input_size=4, repeats=1, threads=threads, runtime="openvino")
    assert seen == [("CPU", threads, 1)]


def test_a_result_stays_when_another_is_computed(prepared):
    model = small_vit()
    images = torch.rand(2, 1, 3, 12, 12)
    run = prepared(model, images[0])
    first = torch.as_tensor(run(images[0]))
    run(images[1])
    with torch.inference_mode():
        assert difference(first, model(images[0])) < 1e-4


def test_fused_attention_is_on_again(prepared, digits_model):
    prepared(digits_model, torch.rand(1, 3, 32, 32))
    assert all(block.attn.fused_attn for block in digits_model.blocks)


def test_torch_takes_no_part_and_nothing_is_left_behind(prepared, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, calls = small_vit(), []
    run = prepared(model, torch.rand(2, 3, 12, 12))
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        run(torch.rand(2, 3, 12, 12))
    assert not calls
    assert not list(tmp_path.iterdir())
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_table_and_a_target_are_of_its_times(engine, monkeypatch):
    """What is timed for `measured` is the dense model and the one that the plan makes, both run by the engine."""
    model = small_vit(depth=1)
    images = torch.rand(1, 3, 12, 12)
    timed = []

    def in_turn(runs, *_):
        assert not any(isinstance(run, nn.Module) for run in runs)
        timed.append([torch.as_tensor(run(images)) for run in runs])
        return np.array([[0.97, 1.0]])

    monkeypatch.setattr(benching, "in_turn", in_turn)
    table = sc.measure_latency(model, groups=("ffn",), grid={"ffn": [1]}, repeats=1, runtime=engine)
    assert (table.runtime, table.runtime_version) == (engine, version_of(engine))
    assert not timed  # by bench
    size = sc.inspect(model).sizes["blocks.0.ffn"]
    line = Layer(({"ffn": "blocks.0.ffn"},), Grid({"ffn": (1, size)}, np.array([1.0, size])))
    chosen = sc.plan(
        model,
        method="magnitude",
        target=sc.Target(latency=0.9999),
        groups=("ffn",),
        round_to=1,
        latency_table=replace(table, layers=(line,), scale=1.0, overhead=0.0),
    )
    assert (chosen.latency.runtime, chosen.latency.runtime_version) == (engine, version_of(engine))
    assert chosen.latency.measured == pytest.approx(0.97)
    (found,) = timed
    with torch.inference_mode():
        expected = model(images)
    assert difference(found[1], expected) <= 1e-4 * largest(expected)
    assert difference(found[0], expected) > 1e-3 * largest(expected)
