"""ExecuTorch as the engine that is timed; its errors are tested beside the exporter's."""

from __future__ import annotations

import tempfile

import pytest
import secateur as sc
import torch
from engines import installed
from secateur.latency.agreement import difference, largest
from secateur.latency.runtimes.registry import RUNTIMES
from small_vits import small_vit
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine threads wait for each other."""
    torch.set_num_threads(1)


def prepared(module, example):
    with torch.inference_mode():
        return RUNTIMES.named("executorch").prepare(module, example)


needs_executorch = pytest.mark.skipif(not installed("executorch"), reason="executorch is not installed")


@needs_executorch
def test_it_computes_a_trained_model_that_was_pruned_and_leaves_nothing(
    digits_model, digits_images, tmp_path, monkeypatch
):
    """Fewer queries than values, a head less, fewer channels, and one layer gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ratios = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "heads": 0.34, "width": 0.2, "blocks.1.attn": 1}
    sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=ratios))
    run, calls = prepared(digits_model, digits_images[:5]), []
    assert all(block.attn.fused_attn for block in digits_model.blocks if hasattr(block.attn, "fused_attn"))
    with torch.inference_mode():
        first, second = (torch.as_tensor(run(digits_images[start : start + 5])) for start in (0, 7))
        for start, found in ((0, first), (7, second)):  # a result stays when another is computed
            expected = digits_model(digits_images[start : start + 5])
            assert difference(found, expected) <= 1e-5 * largest(expected)
    digits_model.register_forward_hook(lambda *_: calls.append(1))
    run(digits_images[:5])
    assert not calls
    assert not list(tmp_path.iterdir())


@needs_executorch
def test_float16():
    model = small_vit().half()
    images = torch.rand(2, 3, 12, 12).half()
    with torch.inference_mode():
        expected = model(images)
    found = torch.as_tensor(prepared(model, images)(images))
    assert found.dtype == torch.float16
    assert difference(found, expected) <= 1e-2 * largest(expected)


@needs_executorch
def test_it_runs_on_the_processor_alone():
    with pytest.raises(sc.Unsupported, match="^device: expected 'cpu' for executorch, got 'meta'$"):
        prepared(nn.Linear(3, 3), torch.empty(1, 3, device="meta"))
    with pytest.raises(sc.Unsupported, match="^dtype: expected float32 or float16 for executorch, got 'float64'$"):
        sc.bench(small_vit().double(), batch_size=1, runtime="executorch")


@needs_executorch
def test_it_has_torchs_number_of_threads():
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    seen = []
    for threads in (1, 2, 1):
        sc.bench(linear, batch_size=1, input_size=4, repeats=1, threads=threads, runtime="executorch")
        seen.append(_threadpool_get_thread_count())
    assert seen == [1, 2, 1]
    held = prepared(linear, torch.rand(1, 3, 4, 4))
    with pytest.raises(
        sc.Unsupported, match="^threads: expected 1, which ExecuTorch has while its programs are loaded"
    ):
        sc.bench(linear, batch_size=1, input_size=4, threads=2, runtime="executorch")
    assert torch.isfinite(torch.as_tensor(held(torch.rand(1, 3, 4, 4)))).all()
