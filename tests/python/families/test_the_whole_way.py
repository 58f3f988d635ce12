"""Published models of every family, from inspection to an engine: pruned, saved, loaded, exported and timed."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import timm
import torch

# Side of the images: what the models are exact at is tested elsewhere, and small images take less time.
MODELS = {
    "resnet18": (64, {"conv": 0.3, "width": 0.2}),
    "resnet50": (64, {"conv": 0.45, "width": 0.1}),
    "mobilenetv2_100": (64, {"conv": 0.4, "width": 0.15}),
    "swin_tiny_patch4_window7_224": (224, {"qk": 0.4, "v": 0.3, "ffn": 0.35, "width": 0.1}),
    "deit_tiny_distilled_patch16_224": (224, {"qk": 0.4, "v": 0.3, "ffn": 0.35, "heads": 0.34, "width": 0.1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_goes_the_whole_way(name, tmp_path):
    side, ratios = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=11).eval()
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    before = sc.inspect(model)
    plan = sc.plan(model, method="magnitude", ratios=ratios)
    report = sc.prune(model, plan)
    after = sc.inspect(model)
    assert plan.macs == report.macs == (before.macs, after.macs)
    assert report.params[1] == sum(parameter.numel() for parameter in model.parameters()) < 0.9 * before.params
    assert all(after.sizes[group] == kept.shape[1] for group, kept in plan.keep.items())

    sc.save(model, tmp_path / "pruned.safetensors")
    loaded = sc.load(tmp_path / "pruned.safetensors")
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert np.array_equal([*sc.inspect(loaded).sizes.values()], [*after.sizes.values()])

    exported = sc.export(loaded, tmp_path / "pruned.onnx", batch_sizes=(1, 2))
    assert exported.difference < 1e-4
    timed = sc.bench(loaded, batch_size=1, repeats=2, warmup=0)
    assert timed.milliseconds > 0
    assert timed.input_size == (3, side, side)


def test_both_layouts_are_one_without_attention():
    models = []
    for layout in ("exact", "stock"):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3).eval()
        sc.prune(model, sc.plan(model, method="magnitude", ratios={"conv": 0.3, "width": 0.2}), layout=layout)
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
