"""Variance-based pruning against its formula: which units stay, and what the next layer's bias becomes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from prepared import prepared

RATIOS = {"qk": 0.37, "v": 0.41, "ffn": 0.53}


def kept(scores, count):
    """Indices of the largest scores of each row, ties to the lower index, sorted."""
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :count], axis=1)


def entering(model, layer, x):
    """All rows that enter a layer."""
    rows = []
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(x)
    hook.remove()
    return torch.cat(rows)


def shifted(model, layer, rows, staying):
    """Zero a layer's inputs but for those that stay, and add what the mean of the others contributed."""
    gone = torch.ones(rows.shape[1], dtype=torch.bool)
    gone[staying] = False
    with torch.no_grad():
        layer.bias += layer.weight[:, gone] @ rows.mean(0)[gone]
        layer.weight[:, gone] = 0


@pytest.fixture(scope="module")
def calibrated(make_digits_model, digits_images):
    model, x = make_digits_model().double(), digits_images[:40].double()
    return model, x, sc.calibrate(model, x.split(16))


def test_the_formula_on_a_trained_model(calibrated):
    """Query/key neurons are not shifted, so the two kinds are cut alone."""
    dense, x, stats = calibrated
    plan = sc.plan(dense, stats, method="vbp", ratios={"v": 0.41, "ffn": 0.53})
    expected = copy.deepcopy(dense)
    for index, (block, other) in enumerate(zip(dense.blocks, expected.blocks, strict=True)):
        hidden = entering(dense, block.mlp.fc2, x)
        units = kept(hidden.var(0, correction=0)[None].numpy(), plan.keep[f"blocks.{index}.ffn"].shape[1])
        assert np.array_equal(plan.keep[f"blocks.{index}.ffn"], units)
        shifted(expected, other.mlp.fc2, hidden, torch.from_numpy(units[0]))
        values = entering(dense, block.attn.proj, x)
        units = kept(values.var(0, correction=0).reshape(3, 31).numpy(), plan.keep[f"blocks.{index}.v"].shape[1])
        assert np.array_equal(plan.keep[f"blocks.{index}.v"], units)
        staying = (torch.arange(3)[:, None] * 31 + torch.from_numpy(units)).flatten()
        shifted(expected, other.attn.proj, values, staying)
    pruned = copy.deepcopy(dense)
    sc.prune(pruned, plan)
    with torch.no_grad():
        wanted = expected(x)
        assert (dense(x) - wanted).abs().max() > 1e-3
        assert (pruned(x) - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_heads_that_are_removed_leave_their_mean(calibrated):
    dense, x, stats = calibrated
    plan = sc.plan(dense, stats, method="vbp", ratios={"heads": 0.34})
    expected = copy.deepcopy(dense)
    for index, (block, other) in enumerate(zip(dense.blocks, expected.blocks, strict=True)):
        values = entering(dense, block.attn.proj, x)
        heads = kept(values.var(0, correction=0).reshape(3, 31).sum(1)[None].numpy(), 2)
        assert np.array_equal(plan.keep[f"blocks.{index}.heads"], heads)
        staying = (torch.from_numpy(heads[0])[:, None] * 31 + torch.arange(31)).flatten()
        shifted(expected, other.attn.proj, values, staying)
    pruned = copy.deepcopy(dense)
    sc.prune(pruned, plan)
    with torch.no_grad():
        wanted = expected(x)
        assert (pruned(x) - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_errors_are_those_of_the_cut(calibrated):
    """The variance that is lost where the second layer writes, as a share of what it writes."""
    dense, x, stats = calibrated
    layer = dense.blocks[1].mlp.fc2
    hidden, weight = entering(dense, layer, x), layer.weight.detach()
    order = hidden.var(0, correction=0).argsort(descending=True, stable=True)
    centred = hidden - hidden.mean(0)
    # What the next norm ignores does not count.
    seen = weight - weight.mean(0)
    whole = (centred @ seen.mT).square().sum()
    errors = prepared(dense, stats, "vbp").errors(sc.inspect(dense).group("blocks.1.ffn"))
    part, lost = torch.zeros(len(centred), len(seen), dtype=torch.float64), [0.0]
    for unit in order.flip(0):
        part += centred[:, unit, None] * seen[:, unit]
        lost.append(float(part.square().sum() / whole))
    # A larger size never counts as worse, since it could do what the smaller one does.
    expected = np.minimum.accumulate(lost[::-1])
    assert np.allclose(errors, expected, rtol=1e-7, atol=1e-12)
    assert errors[0] == pytest.approx(1, rel=1e-9)


def test_units_that_never_vary_go_without_a_trace():
    """They go first, and what they always add stays."""
    model = make("plain").double()
    x = images(model, 12).double()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[::2], block.mlp.fc1.bias[::2] = 0, 1.5
        expected = model(x)
        size = model.blocks[0].mlp.fc1.out_features
        stats = sc.calibrate(model, [x])
        plan = sc.plan(model, stats, method="vbp", ratios={"ffn": (size - size // 2 - size % 2) / size}, round_to=1)
        sc.prune(model, plan)
        assert (model(x) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_it_needs_moments(calibrated):
    dense, x, _ = calibrated
    stats = sc.calibrate(dense, [x[:8]], collect="scores")
    with pytest.raises(sc.InvalidArgument, match="^stats: expected moments"):
        sc.plan(dense, stats, method="vbp", ratios=RATIOS)
