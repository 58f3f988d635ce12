"""Heads that users put on a model: all but the residual width is cut, whatever they are and return."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from models import BASE
from pruning import check, random_keep
from reference import randomise
from torch import nn


class Tasks(nn.Module):
    """Two linear heads, whose outputs come as a tuple or by name."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(width, 3), nn.Linear(width, 4), kind

    def forward(self, x: torch.Tensor) -> object:
        pair = self.first(x), self.second(x)
        return {"first": pair[0], "second": list(pair[1:])} if self.kind == "dict" else pair


HEADS = {
    "layers": lambda width: nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 5)),
    "normed": lambda width: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5)),
    "tuple": lambda width: Tasks(width, "tuple"),
    "dict": lambda width: Tasks(width, "dict"),
}
SMALL = {**BASE, "depth": 3}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 3), "window_size": 4}


def with_head(kind, family="vit"):
    torch.manual_seed(0)
    if family == "swin":
        model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
        model.head.fc = HEADS[kind](model.num_features)
    else:
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
        model.head = HEADS[kind](model.embed_dim)
    return randomise(model, 3).eval()


def batches(model, count=12):
    size = sc.inspect(model).input_size
    return list((torch.rand(count, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1).split(5))


def flat(output):
    """All numbers of an output, side by side."""
    if isinstance(output, torch.Tensor):
        return output.flatten(1)
    return torch.cat([flat(part) for part in (output.values() if isinstance(output, dict) else output)], 1)


@pytest.mark.parametrize("kind", HEADS)
def test_only_the_width_is_refused(kind):
    model = with_head(kind)
    anatomy = sc.inspect(model)
    name = type(model.head).__name__
    assert anatomy.refused == {"width": f"head: expected nn.Linear or none, got {name}, whose inputs cannot be cut"}
    assert {group.kind for group in anatomy.groups} >= {"qk", "v", "heads", "ffn", "layer", "tokens"}
    # Its linear layers count.
    plain = sc.inspect(timm.create_model("vit_tiny_patch16_224", **SMALL))
    weights = sum(layer.weight.numel() for layer in model.head.modules() if isinstance(layer, nn.Linear))
    assert anatomy.macs == plain.macs - 39 * 7 + weights
    with pytest.raises(sc.Unsupported, match="groups: expected kinds that this model can lose, got 'width'"):
        sc.plan(model, sc.calibrate(model, batches(model)), method="snp", target=sc.Target(macs=0.7), groups=["width"])


@pytest.mark.parametrize("kind", ["layers", "normed"])
def test_cuts_are_exact(kind):
    """As masks on the dense model, in float64 and in float32."""
    model = with_head(kind)
    keep = random_keep(model, 1, ("qk", "v", "ffn", "heads"), fraction=0.6)
    check(model, keep, torch.cat(batches(model)))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_whole_way(kind, family):
    """Measured by what the head returns, which no method may take for logits, down to a target."""
    model = with_head(kind, family)
    x = batches(model)
    stats = sc.calibrate(model, x, sensitivity=True, head_gradients=True)
    before = copy.deepcopy(model)
    plan = sc.plan(model, stats, target=sc.Target(macs=0.6))
    assert np.isfinite(plan.loss).all()
    assert plan.loss[0] > 0
    report = sc.prune(model, plan)
    assert report.macs[1] <= 0.6 * report.macs[0]
    with torch.no_grad():
        wanted, found = (flat(each(torch.cat(x))) for each in (before, model))
    off = float((found - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())
    # A model cut at random is off by more than the spread of outputs.
    assert 0 < off < 1


@pytest.mark.parametrize("kind", HEADS)
def test_losses_are_relative_squared_changes(kind):
    """One cut of one group, measured by hand."""
    model = with_head(kind)
    x = torch.cat(batches(model))
    stats = sc.calibrate(model, [x], sensitivity=True, methods=["magnitude"])
    size, loss = next(iter(stats.losses("blocks.2.ffn", "cut:magnitude").items()))
    cut = copy.deepcopy(model)
    group = sc.inspect(model).group("blocks.2.ffn")
    sc.prune(cut, sc.plan(cut, stats, method="magnitude", ratios={"blocks.2.ffn": 1 - size / group.size}, round_to=1))
    with torch.no_grad():
        wanted, found = (flat(each(x)).double() for each in (model, cut))
    expected = float((found - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())
    assert loss == pytest.approx(expected, rel=1e-3)


def test_layer_by_layer_and_trained():
    """`prune_sequential` and `reconstruct` with outputs of two tasks."""
    model = with_head("dict")
    dense, x = copy.deepcopy(model), batches(model, 40)
    sc.prune_sequential(model, x, target=sc.Target(macs=0.7))
    report = sc.reconstruct(model, dense, x, seed=0)
    assert report.loss <= report.loss_before
    assert report.loss_before > 0


def test_a_head_put_on_a_model_of_features_makes_it_a_classifier():
    """Whatever ``num_classes`` it was built with."""
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0})
    model.head = nn.Linear(39, 5)
    model = randomise(model, 3).eval()
    twin = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 5})
    twin.load_state_dict(model.state_dict())
    x = batches(model)
    first, second = (sc.calibrate(each.eval(), x, sensitivity=True) for each in (model, twin))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(np.array_equal(array, second.tensors[name]) for name, array in first.tensors.items())


def test_a_head_that_returns_no_tensors_is_refused_with_words():
    class Words(nn.Module):
        def forward(self, x):
            return "a cat"

    model = with_head("layers")
    model.head = Words()
    with pytest.raises(sc.Unsupported, match="model: expected outputs of tensors, got str"):
        sc.calibrate(model, batches(model), sensitivity=True)
