"""Defaults that functions share, and words of earlier versions that are still read."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import secateur as sc
import torch
from small_vits import small_batches, small_vit


@pytest.mark.parametrize("function", [sc.plan, sc.search, sc.prune_sequential])
def test_one_default_method(function):
    assert inspect.signature(function).parameters["method"].default == "project"


@pytest.mark.parametrize("function", [sc.plan, sc.prune_sequential])
def test_ratios_say_that_they_remove(function):
    described = inspect.getdoc(function)
    assert "ratios: fraction removed" in described.lower() or "ratios: as for ``plan``" in described.lower()


def test_a_target_says_that_it_keeps():
    assert inspect.getdoc(sc.Target).splitlines()[0].lower().startswith("fraction")
    assert "kept" in inspect.getdoc(sc.Target).splitlines()[0].lower()


@pytest.fixture(scope="module")
def measured():
    model = small_vit()
    return model, sc.calibrate(model, small_batches(), sensitivity="noise")


def same(first, second):
    assert first.keep.keys() == second.keep.keys()
    assert first.keep
    assert all(np.array_equal(first.keep[name], second.keep[name]) for name in first.keep)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.mark.parametrize(
    "arguments",
    [
        lambda word: {"target": sc.Target(macs=0.5), "groups": ("qk", "ffn", word)},
        lambda word: {"target": sc.Target(macs=0.7), "groups": ("qk", "v", "ffn"), "freeze": [word, "blocks.0.ffn"]},
        lambda word: {"target": sc.Target(macs=0.7), "groups": ("ffn", word), "min_keep": {word: 1}},
        lambda word: {"target": sc.Target(macs=0.5), "groups": ("ffn", word), "round_to": {word: 1, "ffn": 3}},
        lambda word: {"ratios": {word: 0.3, "v": 0.2}},
    ],
)
def test_layers_may_still_be_called_blocks(measured, arguments):
    model, stats = measured
    same(sc.plan(model, stats, **arguments("block")), sc.plan(model, stats, **arguments("layer")))


def test_what_is_shown_and_written_says_layer(measured):
    model, _ = measured
    assert {group["kind"] for group in sc.inspect(model).to_dict()["groups"]} >= {"layer"}
    with pytest.raises(sc.InvalidArgument, match=r"ratios\['layer'\]: expected layers by name"):
        sc.plan(model, sc.calibrate(model, small_batches()), ratios={"block": 0.5})


@pytest.mark.parametrize("argument", ["ratios", "min_keep", "round_to"])
def test_one_kind_by_two_names_is_refused(measured, argument):
    model, stats = measured
    other = {} if argument == "ratios" else {"target": sc.Target(macs=0.5)}
    with pytest.raises(sc.InvalidArgument, match=f"^{argument}: expected 'block' or 'layer', which are one kind"):
        sc.plan(model, stats, **other, **{argument: {"block": 1, "layer": 1}})
