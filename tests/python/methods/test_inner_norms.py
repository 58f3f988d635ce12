"""Values and hidden units in front of norms of their own: over fewer channels they take off and divide by others."""

from __future__ import annotations

import copy

import pytest
import reference
import secateur as sc
import torch
from models import images, make
from prepared import prepared
from torch import nn

KINDS = ("inner_norms", "inner_rms_norms")


@torch.no_grad()
def with_copies(model, factor):
    """Of every head's 13 values, six are ``factor`` times others, one is nothing; the projection reads none of them."""
    for block in model.blocks:
        rows = slice(2 * 39, 3 * 39)
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
            heads = parameter[rows].unflatten(0, (3, 13))
            heads[:, 6:12] = factor * heads[:, :6]
            heads[:, 12] = 0
        block.attn.proj.weight.unflatten(1, (3, 13))[:, :, 6:] = 0
    return model


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 3.0, -0.5])
@pytest.mark.parametrize("scale", [True, False])
def test_values_that_copy_others_leave_without_a_trace(factor, scale):
    model = with_copies(make("inner_rms_norms").double(), factor)
    if not scale:
        for block in model.blocks:
            block.attn.norm.weight = None
    x = images(model, 9).double()
    expected = model(x)
    stats = sc.calibrate(model, [x])
    sc.prune(model, sc.plan(model, stats, method="refit", ratios={"v": 7 / 13}, selection="energy"))
    assert sc.inspect(model).sizes["blocks.1.v"] == 6
    assert float((model(x) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["v", "ffn"])
@pytest.mark.parametrize("selection", ["greedy", "snp", "energy"])
def test_the_plan_is_what_the_cut_model_computes(kind, cut, selection):
    model = make(kind).double()
    x = images(model, 9).double()
    plan = sc.plan(model, sc.calibrate(model, [x]), method="refit", ratios={cut: 0.4}, selection=selection)
    pruned = copy.deepcopy(model)
    sc.prune(pruned, plan)
    with torch.no_grad():
        expected = reference.substituted(model, plan)(x)
        assert float((pruned(x) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def added(model, block, layer, x):
    """What a layer adds to the residual stream."""
    found = []
    name = {"v": "drop_path1", "ffn": "drop_path2"}[layer]
    handle = getattr(model.blocks[block], name).register_forward_hook(lambda _m, _a, out: found.append(out))
    model(x)
    handle.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "fraction", "most"), [("v", 0.5, 1.2), ("ffn", 0.5, 1.1), ("ffn", 0.8, 1.05)])
def test_no_other_refit_would_do_much_better(kind, layer, fraction, most):
    """Than the one of the statistics: least squares on what really enters the cut layer, behind its norm."""
    model = make(kind).double()
    x = images(model, 40).double()
    pruned = copy.deepcopy(model)
    plan = sc.plan(model, sc.calibrate(model, [x]), method="refit", ratios={f"blocks.0.{layer}": fraction})
    sc.prune(pruned, plan)
    entering = []
    block = pruned.blocks[0]
    reader = block.attn.proj if layer == "v" else block.mlp.fc2
    reader.register_forward_pre_hook(lambda _m, args: entering.append(args[0].flatten(0, 1)))
    expected, found = (added(each, 0, layer, x).flatten(0, 1) for each in (model, pruned))
    inputs = torch.cat([entering[0], torch.ones(len(expected), 1, dtype=torch.float64)], 1)
    best = expected - inputs @ torch.linalg.lstsq(inputs, expected).solution
    assert float((expected - found).square().sum()) <= most * float(best.square().sum())


# On a trained model


def lost(trained_normed, layer, method, fraction, block, **options):
    model, stats, x = trained_normed
    pruned = copy.deepcopy(model)
    sc.prune(pruned, sc.plan(model, stats, method=method, ratios={f"blocks.{block}.{layer}": fraction}, **options))
    expected, found = added(model, block, layer, x), added(pruned, block, layer, x)
    return float((found - expected).square().sum() / (expected - expected.mean((0, 1))).square().sum())


@pytest.mark.parametrize(("layer", "fraction", "most"), [("v", 0.25, 0.01), ("v", 0.5, 0.08), ("ffn", 0.5, 0.02)])
@pytest.mark.parametrize("block", range(3))
def test_trained_layers_keep_their_output(trained_normed, layer, fraction, most, block):
    found = lost(trained_normed, layer, "refit", fraction, block)
    assert found <= most
    assert found == lost(trained_normed, layer, "project", fraction, block)
    assert found < 0.1 * lost(trained_normed, layer, "snp", fraction, block)


@pytest.mark.parametrize("block", range(3))
def test_predicted_errors_are_of_the_size_of_those_found(trained_normed, block):
    model, stats, _ = trained_normed
    anatomy = sc.inspect(model)
    method = prepared(model, stats, "refit")
    for layer, kept in (("v", 15), ("ffn", 186)):
        size = anatomy.sizes[f"blocks.{block}.{layer}"]
        found = lost(trained_normed, layer, "refit", 1 - kept / size, block)
        predicted = method.errors(anatomy.group(f"blocks.{block}.{layer}"))[kept]
        assert found / 20 < predicted < 5 * found


@torch.no_grad()
def test_the_norm_itself_is_timms(trained_normed):
    model, stats, _ = trained_normed
    pruned = copy.deepcopy(model)
    sc.prune(pruned, sc.plan(model, stats, method="project", ratios={"v": 0.5, "ffn": 0.5}))
    for block in pruned.blocks:
        assert type(block.attn.norm) is type(model.blocks[0].attn.norm)
        assert isinstance(block.mlp.norm, nn.LayerNorm)
        assert block.mlp.norm.normalized_shape == (186,)
