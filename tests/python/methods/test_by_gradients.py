"""Methods that rank by gradients keep what the literal sums say; the sums are held to autograd elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import torch
from small_vits import small_batches, small_vit
from torch.nn import functional


def kept(scores, count):
    """Indices of the largest scores of each row, ties to the lower index, sorted."""
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :count], axis=1)


@pytest.fixture(scope="module")
def found():
    model = small_vit().double()
    return model, sc.calibrate(model, [each.double() for each in small_batches()], gradients=True)


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_the_largest_stay(found, method):
    model, stats = found
    plan = sc.plan(model, stats, method=method, ratios={"qk": 0.4, "v": 0.3, "ffn": 0.5, "width": 0.2})
    assert len(plan.keep) == 10
    for name, units in plan.keep.items():
        assert np.array_equal(units, kept(stats.gradients(name, method), units.shape[1]))


def test_heads_by_their_own_sums(found):
    model, stats = found
    for index in range(3):
        heads = f"blocks.{index}.heads"
        summed = sum(stats.gradients(f"blocks.{index}.{kind}", "taylor").sum(1) for kind in ("qk", "v"))
        for method, scores in (("taylor", summed[None]), ("fisher", stats.gradients(heads, "fisher"))):
            plan = sc.plan(model, stats, method=method, ratios={"heads": 0.34})
            assert np.array_equal(plan.keep[heads], kept(scores, 2))


def test_heads_of_michel_are_those_of_the_gate(found):
    model, stats = found
    plan = sc.plan(model, stats, method="michel", ratios={"heads": 0.34})
    for index in range(3):
        heads = f"blocks.{index}.heads"
        assert np.array_equal(plan.keep[heads], kept(stats.gradients(heads, "gate"), 2))
    with pytest.raises(
        sc.InvalidArgument, match=r"^groups: expected kinds that this method cuts \(heads, layer\), got"
    ):
        sc.plan(model, stats, method="michel", ratios={"ffn": 0.5})


def test_readers_are_summed_before_the_square():
    """A channel that two layers use with opposite signs is worth nothing to fisher, but each row counts in taylor."""
    model = small_vit(depth=1).double()
    x = torch.cat(small_batches(4)).double()
    stats = sc.calibrate(model, [x], gradients=True)
    terms = []
    for image in x:
        factor = torch.ones(27, dtype=torch.float64, requires_grad=True)
        readers = (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1, model.head)
        handles = [each.register_forward_pre_hook(lambda _m, args, f=factor: (args[0] * f,)) for each in readers]
        out = model(image[None])
        terms.append(torch.autograd.grad(functional.cross_entropy(out, out.argmax(1)), factor)[0].square())
        for handle in handles:
            handle.remove()
    expected = torch.stack(terms).mean(0).numpy()
    np.testing.assert_allclose(stats.gradients("width", "fisher")[0], expected, rtol=1e-8)
