"""The baselines against literal forms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from small_vits import small_vit


def kept(scores, count):
    """Indices of the largest scores of each row, ties to the lower index, sorted."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1)


def norms(rows):
    return (rows.detach().double() ** 2).sum(-1).numpy()


def test_magnitude_by_the_weights_of_a_trained_model(digits_model):
    plan = sc.plan(
        digits_model, method="magnitude", ratios={"qk": 0.5, "v": 0.4, "ffn": 0.3, "heads": 0.34, "width": 0.2}
    )
    for index, block in enumerate(digits_model.blocks):
        q, k, v = block.attn.qkv.weight.detach().double().unflatten(0, (3, 3, 31))
        assert np.array_equal(plan.keep[f"blocks.{index}.qk"], kept(norms(q) + norms(k), 15))
        assert np.array_equal(plan.keep[f"blocks.{index}.v"], kept(norms(v), 19))
        assert np.array_equal(plan.keep[f"blocks.{index}.ffn"], kept(norms(block.mlp.fc1.weight)[None], 260))
        whole = (norms(q) + norms(k) + norms(v)).sum(1)
        assert np.array_equal(plan.keep[f"blocks.{index}.heads"], kept(whole[None], 2))
    writers = [digits_model.patch_embed.proj.weight.flatten(1)]
    writers += [layer.weight for block in digits_model.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    shares = [np.sqrt(norms(weight)) for weight in writers]
    scores = np.mean([share / share.sum() for share in shares], axis=0)
    assert np.array_equal(plan.keep["width"], kept(scores[None], 74))


@pytest.mark.parametrize("kind", ["swiglu_packed", "swiglu_split"])
def test_both_rows_of_a_gated_unit_count(kind):
    model = make(kind).double()
    plan = sc.plan(model, method="magnitude", ratios={"ffn": 0.4})
    mlp = model.blocks[0].mlp
    rows = norms(torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight])) if kind == "swiglu_split" else norms(mlp.fc1.weight)
    both = rows.reshape(2, -1).sum(0)
    found = plan.keep["blocks.0.ffn"]
    assert np.array_equal(found, kept(both[None], found.shape[1]))


def test_random_depends_on_the_seed_and_the_group_alone():
    model = small_vit()
    ratios = {"qk": 0.5, "ffn": 0.5}
    plans = [sc.plan(model, method="random", ratios=ratios, seed=seed).keep for seed in (0, 0, 1)]
    assert all(np.array_equal(plans[0][name], plans[1][name]) for name in plans[0])
    assert any(not np.array_equal(plans[0][name], plans[2][name]) for name in plans[0])
    assert not np.array_equal(plans[0]["blocks.0.ffn"], plans[0]["blocks.1.ffn"])
    alone = sc.plan(model, method="random", ratios={"ffn": 0.5}, seed=0).keep
    assert np.array_equal(alone["blocks.0.ffn"], plans[0]["blocks.0.ffn"])
    with pytest.raises(sc.InvalidArgument, match="^seed: expected an integer of at least 0, got -1$"):
        sc.plan(model, method="random", ratios=ratios, seed=-1)


def test_magnitude_loses_less_than_chance(digits_model, digits_images):
    def agreement(method):
        model = copy.deepcopy(digits_model)
        sc.prune(model, sc.plan(model, method=method, ratios={"qk": 0.6, "v": 0.6, "ffn": 0.6}))
        with torch.no_grad():
            return float((model(digits_images).argmax(1) == digits_model(digits_images).argmax(1)).double().mean())

    assert agreement("magnitude") > agreement("random") + 0.1


def test_without_statistics_a_target_is_shared_out_uniformly():
    model = make("plain")
    plan = sc.plan(model, method="magnitude", target=sc.Target(macs=0.7))
    assert plan.macs[1] <= 0.7 * plan.macs[0]
    sc.prune(model, plan)
    assert model(images(model)).isfinite().all()
