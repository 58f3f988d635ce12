"""What a cut is said to lose without refit, against units switched off by hand; the budgets shared out by it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from prepared import prepared
from scores import queries_and_keys
from secateur.methods import selection_error as losses


def inputs_of(model, layer, x):
    """What a layer reads, (rows, inputs)."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def shuffled(heads, size):
    """Another order for each head."""
    return np.stack([np.random.default_rng(head).permutation(size) for head in range(heads)])


def predicted(model, x, name, order):
    anatomy = sc.inspect(model)
    stats = sc.calibrate(model, [x[:7], x[7:]])
    return losses.of_selection(model, anatomy, stats, anatomy.group(name), order)


@pytest.mark.parametrize("kind", ["digits", "plain", "rms_norm", "registers_layer_scale", "swiglu_packed"])
@pytest.mark.parametrize("part", ["v", "ffn"])
def test_what_writers_lose(request, kind, part):
    """The output that is missing, seen as the next norm sees it, over the variance of the whole."""
    model = (request.getfixturevalue("digits_model") if kind == "digits" else make(kind)).double()
    x = (request.getfixturevalue("digits_images")[:20] if kind == "digits" else images(model, 20)).double()
    anatomy = sc.inspect(model)
    group = anatomy.group(f"blocks.1.{part}")
    layer = "blocks.1.attn.proj" if part == "v" else "blocks.1.mlp.fc2"
    order = shuffled(group.heads, group.size)
    found = predicted(model, x, group.name, order)
    hidden, weight = inputs_of(model, layer, x), model.get_submodule(layer).weight.detach()
    if kind == "registers_layer_scale":
        weight = weight * getattr(model.blocks[1], "ls1" if part == "v" else "ls2").gamma.detach()[:, None]
    centred = isinstance(model.blocks[1].norm1, torch.nn.LayerNorm)

    def seen(rows):
        output = rows @ weight.mT
        return output - output.mean(1, keepdim=True) if centred else output

    whole = seen(hidden)
    total = (whole - whole.mean(0)).square().sum()
    expected = []
    for kept in range(group.size + 1):
        missing = torch.zeros_like(hidden)
        for head in range(group.heads):
            gone = head * group.size + order[head, kept:]
            missing[:, gone] = hidden[:, gone]
        expected.append(float(seen(missing).detach().square().sum() / total))
    expected = np.minimum.accumulate(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert found[0] > 0.1 > found[-1] == 0


@pytest.mark.parametrize("kind", ["digits", "plain", "qk_norm"])
def test_what_scores_lose(request, kind):
    model = (request.getfixturevalue("digits_model") if kind == "digits" else make(kind)).double()
    x = (request.getfixturevalue("digits_images")[:20] if kind == "digits" else images(model, 20)).double()
    group = sc.inspect(model).group("blocks.1.qk")
    order = shuffled(group.heads, group.size)
    found = predicted(model, x, group.name, order)
    query, key = queries_and_keys(model, x)[1]
    key = key - key.mean(1, keepdim=True)
    expected = []
    for kept in range(group.size + 1):
        shares = []
        for head in range(group.heads):
            gone = order[head, kept:]
            missing = torch.einsum("bnd,bmd->bnm", query[:, :, head, gone], key[:, :, head, gone])
            whole = torch.einsum("bnd,bmd->bnm", query[:, :, head], key[:, :, head])
            shares.append(float(missing.square().sum() / whole.square().sum()))
        expected.append(np.mean(shares))
    np.testing.assert_allclose(found, np.minimum.accumulate(expected), rtol=1e-6, atol=1e-9)


def test_what_norms_lose(digits_model, digits_images):
    model, x = digits_model.double(), digits_images[:20].double()
    order = shuffled(1, 93)
    found = predicted(model, x, "width", order)
    energy = torch.zeros(93, dtype=torch.float64)
    for norm in sc.inspect(model).norms:
        rows = inputs_of(model, norm.name, x)
        rows = rows - rows.mean(1, keepdim=True)
        energy += (rows / rows.square().mean(1, keepdim=True).sqrt()).square().mean(0)
    expected = [float(energy[order[0, kept:]].sum() / energy.sum()) for kept in range(94)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_nothing_is_said_without_moments(digits_model, digits_images):
    anatomy = sc.inspect(digits_model)
    stats = sc.calibrate(digits_model, [digits_images], collect="scores", sensitivity="noise")
    order = shuffled(3, 31)
    assert losses.of_selection(digits_model, anatomy, stats, anatomy.group("blocks.0.qk"), order) is None
    with pytest.raises(sc.InvalidArgument, match="allocation: expected a method that knows"):
        sc.plan(digits_model, stats, method="snp", target=sc.Target(macs=0.5), allocation="error")


@pytest.fixture(scope="module")
def halves(make_digits_model):
    """Statistics of images of one half of the digits, images of the other, and what the model answers to these."""
    model = make_digits_model()
    batches = [x for x, _ in sc.data.loader("digits", model, split="train", batch_size=64, max_images=256)]
    held_out, _ = next(iter(sc.data.loader("digits", model, batch_size=384)))
    with torch.no_grad():
        return sc.calibrate(model, batches, sensitivity="noise"), held_out, model(held_out).log_softmax(1)


INNER = ("qk", "v", "ffn")


@pytest.mark.parametrize(("method", "macs", "share"), [("snp", 0.7, 0.7), ("refit", 0.7, 0.7), ("refit", 0.5, 0.7)])
def test_shared_out_by_loss_a_budget_costs_less(digits_model, halves, method, macs, share):
    """Against the better of one ratio for all with and without the width, on images that were not calibrated on.

    What is shared out by is predicted for each group alone, and adds up while the answers hardly move: over weights
    trained from three seeds these budgets cost at most 0.64, 0.31 and 0.54 of what one ratio does. SNP, which has no
    refit, moves them by 0.1 to 0.3 nats at half of the MACs; there it was 0.37 to 1.04: chance, which no test holds. At
    0.73 and more nothing is cut: the last block for prefix tokens alone saves as much.
    """
    stats, held_out, wanted = halves

    def lost(groups, allocation):
        model = copy.deepcopy(digits_model)
        arguments = {"target": sc.Target(macs=macs), "groups": groups, "round_to": 3}
        sc.prune(model, sc.plan(model, stats, method=method, allocation=allocation, **arguments))
        with torch.no_grad():
            return float((wanted.exp() * (wanted - model(held_out).log_softmax(1))).sum(1).mean())

    uniform = min(lost(groups, "uniform") for groups in (INNER, (*INNER, "width")))
    assert uniform > 1e-6, "the budget cuts nothing"
    assert lost((*INNER, "width"), "error") <= share * uniform
    assert lost(INNER, None) <= share * uniform


@pytest.mark.parametrize("method", ["snp", "refit"])
@pytest.mark.parametrize("macs", [0.7, 0.5, 0.35])
def test_what_is_predicted_is_the_least(digits_model, halves, method, macs):
    """At any budget, and whether or not the prediction holds there: less than with one ratio for all."""
    stats = halves[0]
    bound = prepared(digits_model, stats, method)
    groups = [group for group in sc.inspect(digits_model).groups if group.kind in INNER]

    def predicted(allocation):
        arguments = {"target": sc.Target(macs=macs), "groups": INNER, "round_to": 3}
        keep = sc.plan(digits_model, stats, method=method, allocation=allocation, **arguments).keep
        kept = {group: keep[group.name].shape[1] if group.name in keep else group.size for group in groups}
        return sum(stats.sensitivity(group.name) * bound.errors(group)[size] for group, size in kept.items())

    # The last of three blocks computes one token of 65, so there is little to choose from in it.
    assert 0 < predicted("error") <= 0.95 * predicted("uniform")
