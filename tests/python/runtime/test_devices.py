"""What a process has set besides: another device by default, autocast, the seeds of devices not yet in use."""

from __future__ import annotations

import copy

import pytest
import secateur as sc
import torch
from launch import run_script
from small_vits import SMALL, small_batches, small_vit


def test_another_device_by_default_changes_nothing(tmp_path):
    def job():
        torch.manual_seed(0)
        model = copy.deepcopy(dense)
        stats = sc.calibrate(model, images, sensitivity="noise", head_gradients=True)
        plan = sc.plan(
            model, stats, method="project", target=sc.Target(macs=0.6), groups=("qk", "v", "ffn", "width"), round_to=1
        )
        sc.prune(model, plan)
        snp = sc.plan(model, sc.calibrate(model, images), method="snp", ratios={"ffn": 0.3})
        sc.prune(model, snp, layout="stock")
        sc.prune_sequential(model, images, "refit", ratios={"ffn": 0.3})
        assert sc.measure_latency(model, batch_size=1, groups=("ffn",), repeats=1).batch_size == 1
        assert sc.bench(model, copy.deepcopy(model), batch_size=2, repeats=2, warmup=1).speedup > 0
        return model.state_dict()

    dense, images = small_vit(), small_batches()
    wanted = job()
    torch.set_default_device("meta")  # as with "cuda": what is made without a device is elsewhere
    try:
        found = job()
    finally:
        torch.set_default_device(None)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_a_pruned_model_is_saved_whatever_the_device_by_default(tmp_path):
    model = small_vit()
    plan = sc.plan(model, sc.calibrate(model, small_batches()), method="snp", ratios={"qk": 0.4, "ffn": 0.4})
    sc.prune(model, plan)
    factory = ("VisionTransformer", SMALL | {"mlp_ratio": 2.2})
    with torch.device("meta"):
        sc.save(model, tmp_path / "model.safetensors", factory=factory)
        loaded = sc.load(tmp_path / "model.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_read_whatever_the_device_by_default(workers):
    model = small_vit(num_classes=10)
    loader = sc.data.loader("digits", model, batch_size=7, max_images=20, shuffle=True, workers=workers)
    wanted = list(loader)
    with torch.device("meta"):
        found = list(loader)
        again = sc.evaluate(model, loader)
    assert len(found) == 3
    for pair, other in zip(wanted, found, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(pair, other, strict=True))
    assert again == sc.evaluate(model, loader)


def test_training_under_autocast_is_of_the_present_weights():
    """autocast keeps its copies of weights until the outermost block ends."""
    images = torch.cat(small_batches())
    data = [(images, torch.arange(len(images)) % 5)] * 4
    settings = {"steps": 12, "lr": 1e-2, "warmup": 0, "ema": 0.5}
    wanted = small_vit()
    expected = sc.finetune(wanted, data, amp="bfloat16", **settings).history
    for amp in (None, "bfloat16"):
        model = small_vit()
        with torch.autocast("cpu", torch.bfloat16):
            found = sc.finetune(model, data, amp=amp, **settings).history
            inside = model(images)  # with gradients: of what is kept
        for entry, other in zip(found, expected, strict=True):
            assert entry["loss"] == pytest.approx(other["loss"], rel=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(inside, model(images))
    assert expected[-1]["loss"] < 0.8 * expected[0]["loss"]


@pytest.mark.parametrize("method", ["snp", "project"])
@pytest.mark.parametrize("layout", ["exact", "stock"])
def test_pruning_under_autocast_is_seen_at_once(method, layout):
    model = small_vit()
    images = small_batches()[0]
    plan = sc.plan(model, sc.calibrate(model, small_batches()), method=method, ratios={"qk": 0.4, "v": 0.4, "ffn": 0.4})
    with torch.autocast("cpu", torch.bfloat16):
        model(images)  # keeps copies of the dense weights
        sc.prune(model, plan, layout=layout)
        found = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, model(images))


def test_a_gpus_seed_of_before_training_stays():
    """In a fresh process, where torch keeps it until the GPU is used."""
    script = """
import torch, timm, secateur as sc
def seeds():
    kept = torch.cuda._lazy_seed_tracker.manual_seed_all_cb
    return kept[0].__closure__[0].cell_contents
torch.manual_seed(42)
before = seeds()
sizes = dict(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
model = timm.create_model("vit_tiny_patch16_224", **sizes)
sc.finetune(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))], steps=2)
print(before, seeds(), torch.initial_seed())
"""
    code, out, errors = run_script(script)
    assert (code, errors) == (0, "")
    assert out.split() == ["42"] * 3
