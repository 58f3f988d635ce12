"""Engines that are timed with linear layers of 8 bits."""

from __future__ import annotations

import sys

import pytest
import secateur as sc
import torch
from engines import installed
from secateur.latency.agreement import difference, largest
from secateur.latency.runtimes.registry import RUNTIMES
from small_vits import small_vit
from torch import nn

EXACT = {"onnxruntime-int8": "onnxruntime", "openvino-int8": "openvino", "executorch-int8": "executorch"}
NAMES = [name for name in EXACT if installed(name)]


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine threads wait for each other."""
    torch.set_num_threads(1)


def prepared(runtime, module, example):
    with torch.inference_mode():
        return RUNTIMES.named(runtime).prepare(module, example)


def on_a_line():
    """Inputs from -1 to 1 whose ends stay: ranges that are taken from every batch stay too."""
    x = torch.linspace(-1, 1, 400).reshape(40, 10)
    nudged = x + 1e-4
    nudged[0, 0], nudged[-1, -1] = -1, 1
    return x, nudged


@pytest.mark.parametrize("runtime", NAMES)
def test_inputs_of_one_integer_have_one_output(runtime):
    """1e-4 is an eightieth of the step between two of 256 numbers: few rows cross to the next integer."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 7).eval()
    x, nudged = on_a_line()
    run = prepared(runtime, linear, x)
    first, second = (torch.as_tensor(run(each)).clone() for each in (x, nudged))
    with torch.inference_mode():
        expected = linear(x)
    assert (first == second).all(dim=1).double().mean() > 0.7
    exact = prepared(EXACT[runtime], linear, x)
    third, fourth = (torch.as_tensor(exact(each)).clone() for each in (x, nudged))
    assert (third == fourth).all(dim=1).double().mean() < 0.1
    assert difference(first, expected) <= 0.02 * largest(expected)


@pytest.mark.parametrize("runtime", NAMES)
def test_a_trained_model_that_was_pruned(runtime, digits_model, digits_images):
    ratios = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "heads": 0.34, "width": 0.2, "blocks.1.attn": 1}
    sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=ratios))
    images = digits_images[:5]
    found = torch.as_tensor(prepared(runtime, digits_model, images)(images))
    with torch.inference_mode():
        expected = digits_model(images)
    assert 1e-5 * largest(expected) < difference(found, expected) < 0.1 * largest(expected)


@pytest.mark.parametrize("runtime", NAMES)
def test_what_has_no_linear_layers_runs_as_it_is(runtime):
    """As layers do that are timed by themselves, such as the merging of tokens."""
    norm, x = nn.LayerNorm(10).eval(), on_a_line()[0]
    with torch.inference_mode():
        expected = norm(x)
    assert difference(torch.as_tensor(prepared(runtime, norm, x)(x)), expected) <= 1e-5 * largest(expected)


@pytest.mark.parametrize("runtime", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_types_that_are_not_quantized(runtime, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(sc.Unsupported, match=f"^dtype: expected float32 for {runtime}, got '{name}'$"):
        sc.bench(small_vit().to(dtype), batch_size=1, runtime=runtime)


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
def test_nncf_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    text = r"^runtime: expected nncf to be installed \(pip install 'secateur\[openvino\]'\), got none$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.bench(small_vit(), batch_size=1, runtime="openvino-int8")


@pytest.mark.parametrize("runtime", NAMES)
def test_times_beside_the_dense_model_in_full_precision(runtime):
    found = sc.bench(
        small_vit(), small_vit(), batch_size=1, repeats=1, warmup=0, runtime=runtime, reference_runtime=EXACT[runtime]
    )
    assert (found.runtime, found.reference_runtime) == (runtime, EXACT[runtime])
    assert f"images/s by {EXACT[runtime]}, " in str(found)
