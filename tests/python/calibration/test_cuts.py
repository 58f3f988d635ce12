"""What cutting each group alone costs: against models that are really pruned and run from start to end."""

from __future__ import annotations

import copy
import math

import pytest
import secateur as sc
import torch
from models import images, make
from secateur.families.vision_transformer.family import PlainViT
from torch import nn


def divergence(dense: nn.Module, cut: nn.Module, x: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the class probabilities, from its definition."""
    with torch.no_grad():
        p, q = dense(x).double().softmax(-1), cut(x).double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def really_cut(model: nn.Module, stats: sc.Statistics, method: str, group: str, size: int) -> nn.Module:
    full = sc.inspect(model).sizes[group]
    found = copy.deepcopy(model)
    sc.prune(found, sc.plan(model, stats, method=method, ratios={group: 1 - size / full}))
    return found


def measured(stats: sc.Statistics, model: nn.Module, method: str) -> dict[tuple[str, int], float]:
    return {
        (group.name, size): loss
        for group in sc.inspect(model).groups
        for size, loss in stats.losses(group.name, f"cut:{method}").items()
    }


@pytest.mark.parametrize("method", ["project", "refit", "snp", "magnitude"])
def test_losses_are_those_of_pruned_models(digits_model, digits_images, method):
    model = digits_model.double()
    batches = [digits_images[:20].double(), digits_images[20:40].double()]
    stats = sc.calibrate(model, batches, sensitivity=True, methods=[method])
    found = measured(stats, model, method)
    kinds = {group.kind for group in sc.inspect(model).groups} - {"tokens"}
    assert {sc.inspect(model).group(name).kind for name, _ in found} == kinds
    for (name, size), loss in found.items():
        cut = really_cut(model, stats, method, name, size)
        # All of 40 images are compared, and count alike.
        assert loss == pytest.approx(divergence(model, cut, digits_images[:40].double()), rel=1e-6, abs=1e-13), name


@pytest.mark.parametrize(
    "kind", ["rms_norm", "inner_norms", "norm_pre", "qk_norm", "swiglu_packed_norm", "map_pool", "gate", "distilled"]
)
def test_losses_of_all_kinds_of_models(kind):
    model = make(kind).double()
    x = images(model, 6).double()
    stats = sc.calibrate(model, [x], sensitivity=True)
    found = measured(stats, model, "project")
    assert found
    for (name, size), loss in found.items():
        cut = really_cut(model, stats, "project", name, size)
        assert loss == pytest.approx(divergence(model, cut, x), rel=1e-5, abs=1e-12), name


def test_without_a_classifier_features_are_compared():
    model = make("identity_head").double()
    x = images(model, 5).double()
    stats = sc.calibrate(model, [x], sensitivity=True)
    for (name, size), loss in measured(stats, model, "project").items():
        cut = really_cut(model, stats, "project", name, size)
        with torch.no_grad():
            dense, changed = model(x), cut(x)
        spread = (dense - dense.mean(0)).square().mean()
        assert loss == pytest.approx(float((dense - changed).square().mean() / spread), rel=1e-5, abs=1e-12), name


def test_the_model_is_left_as_it_was(digits_model, digits_images):
    model = digits_model.train()
    model(digits_images[:2]).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    owners = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    sc.calibrate(model, [digits_images[:8]], sensitivity=True)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert all(parameter.data_ptr() == owners[name] for name, parameter in model.named_parameters())
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_interrupted_run_goes_on_with_the_next_block(tmp_path, monkeypatch, digits_model, digits_images):
    batches = [digits_images[:10], digits_images[10:20]]
    whole = sc.calibrate(digits_model, batches, sensitivity=True)
    path = tmp_path / "s.safetensors"
    runs = []
    original = PlainViT.from_block

    def counted(self, model, index, x, *merged):
        runs.append(index)
        if len(runs) == 40 and not path.exists():
            raise RuntimeError("enough")
        return original(self, model, index, x, *merged)

    monkeypatch.setattr(PlainViT, "from_block", counted)
    with pytest.raises(RuntimeError, match="enough"):
        sc.calibrate(digits_model, batches, sensitivity=True, resume=path)
    kept = sc.Statistics.load(path)
    assert kept.losses("blocks.0.ffn", "cut:project")
    assert not kept.losses("blocks.2.ffn", "cut:project")
    first = len(runs)
    runs.clear()
    resumed = sc.calibrate(digits_model, batches, sensitivity=True, resume=path)
    total = len(runs)
    for stats in (resumed, sc.Statistics.load(path)):
        assert stats.tensors.keys() == whole.tensors.keys()
        assert all((stats.tensors[name] == whole.tensors[name]).all() for name in whole.tensors)
    runs.clear()
    sc.calibrate(digits_model, batches, sensitivity=True)
    # The block that was interrupted is measured again from its start, those before it are not.
    assert total < len(runs) < total + first


def test_files_and_shards(tmp_path, digits_model, digits_images):
    halves = [sc.calibrate(digits_model, [part], sensitivity=True) for part in (digits_images[:9], digits_images[9:14])]
    merged = sc.Statistics.merge(halves)
    for size in (8, 16, 23):
        first, second = (half.losses("blocks.1.qk", "cut:project")[size] for half in halves)
        assert merged.losses("blocks.1.qk", "cut:project")[size] == pytest.approx((9 * first + 5 * second) / 14)
    merged.save(tmp_path / "s.safetensors")
    assert sc.Statistics.load(tmp_path / "s.safetensors").cuts == ["cut:project"]
    assert halves[0].losses("blocks.1.qk", "cut:snp") == {}


def test_scores_alone_serve_methods_that_need_no_moments(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images[:8]], collect="scores", sensitivity=True)
    assert stats.cuts == ["cut:snp"]
    assert all(loss > 0 and math.isfinite(loss) for loss in stats.losses("blocks.0.qk", "cut:snp").values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sensitivity": "much"}, "sensitivity: expected True, False or 'noise', got 'much'"),
        ({"sensitivity": True, "methods": "project"}, "methods: expected a sequence of names, got 'project'"),
        ({"sensitivity": True, "methods": ["nonesuch"]}, "method: expected"),
        ({"methods": ["project"]}, "methods: expected none without sensitivity=True"),
        ({"sensitivity": True, "methods": ["refit"], "collect": "scores"}, "methods: expected some that need scores"),
    ],
)
def test_wrong_arguments(digits_model, digits_images, arguments, text):
    with pytest.raises(sc.InvalidArgument, match=text.replace("(", "\\(")):
        sc.calibrate(digits_model, [digits_images[:2]], **arguments)
