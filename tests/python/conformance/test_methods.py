"""Every method that is registered, on trained weights: what it keeps fits, and the pruned model is the one planned."""

from __future__ import annotations

import copy
from dataclasses import asdict, fields, is_dataclass
from typing import get_args, get_type_hints

import numpy as np
import pytest
import reference
import secateur as sc
import torch
from prepared import prepared
from secateur.methods.registry import method_named, options_of

RATIOS = {"qk": 0.37, "v": 0.41, "ffn": 0.53, "heads": 0.34}


def ratios(name):
    """What is removed of the kinds that the method cuts."""
    return {kind: ratio for kind, ratio in RATIOS.items() if kind in method_named(name).cuts}


@pytest.mark.parametrize("name", sc.methods())
def test_it_says_what_it_is(name):
    method = method_named(name)
    assert method.name == name
    assert method.paper
    assert is_dataclass(method.Options)
    assert set(method.needs) <= {"scores", "moments", "gradients"}
    assert method.source
    for field in fields(method.Options):
        assert field.metadata["help"], f"{name}: {field.name} has no help"
    assert options_of(method, {}) == method.Options()
    with pytest.raises(sc.InvalidArgument, match=r"^options: expected .*, got 'colour'$"):
        options_of(method, {"colour": "red"})


@pytest.mark.parametrize("name", sc.methods())
@torch.no_grad()
def test_the_pruned_model_is_the_one_planned(name, trained_double, digits_images, tmp_path):
    dense, stats = trained_double
    x = digits_images[:6].double()
    plan = sc.plan(dense, stats, method=name, ratios=ratios(name))
    again = sc.plan(copy.deepcopy(dense), stats, method=name, ratios=ratios(name))
    for group, kept in plan.keep.items():
        assert np.array_equal(kept, again.keep[group])
        assert (np.diff(kept) > 0).all()
    method = method_named(name)
    assert bool(plan.weights) == method.changes_weights
    if method.changes_weights:
        wanted = reference.substituted(dense, plan)
    else:
        wanted = reference.masked(dense, plan.keep)
    expected = reference.outputs_to_compare(wanted(x), wanted, plan.keep)
    pruned = copy.deepcopy(dense)
    report = sc.prune(pruned, plan)
    assert report.params[1] == plan.params[1] == sum(p.numel() for p in pruned.parameters())
    assert float((pruned(x) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))
    plan.save(tmp_path / "plan.json")
    loaded = sc.Plan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == plan.to_dict()
    sc.save(pruned, tmp_path / "model.safetensors")
    assert torch.equal(sc.load(tmp_path / "model.safetensors")(x), pruned(x))


@pytest.mark.parametrize("name", sc.methods())
def test_a_target_is_met(name, trained_double):
    dense, stats = trained_double
    # Those that cut heads alone cannot remove as much.
    groups, macs = (None, 0.6) if "ffn" in method_named(name).cuts else (("heads",), 0.9)
    plan = sc.plan(dense, stats, method=name, target=sc.Target(macs=macs), groups=groups)
    assert plan.macs[1] <= macs * plan.macs[0]
    assert plan.options["target"]["macs"] == macs
    assert {**asdict(method_named(name).Options())}.items() <= plan.options.items()


@pytest.mark.parametrize("name", sc.methods())
def test_errors_fall_from_all_to_nothing(name, trained_double):
    dense, stats = trained_double
    bound = prepared(dense, stats, name)
    for group in sc.inspect(dense).groups:
        errors = bound.errors(group) if group.kind in bound.kinds else None
        if errors is not None:
            assert errors.shape == (group.size + 1,)
            assert (np.diff(errors) <= 0).all()
            assert errors[-1] == 0


@pytest.mark.parametrize("name", sc.methods())
def test_every_value_of_every_option_works(name, trained_double):
    dense, stats = trained_double
    method = method_named(name)
    for option, hint in get_type_hints(method.Options).items():
        for value in get_args(hint) or (3,):
            plan = sc.plan(dense, stats, method=name, ratios=ratios(name), **{option: value})
            assert plan.options[option] == value


@pytest.mark.parametrize("name", sc.methods())
def test_it_cuts_the_kinds_that_it_names(name, trained_double):
    assert prepared(*trained_double, name).kinds == set(method_named(name).cuts)


@pytest.mark.parametrize("name", sc.methods())
def test_what_it_needs_is_asked_for(name, trained_double):
    dense, _ = trained_double
    if method_named(name).needs:
        with pytest.raises(sc.InvalidArgument, match="^stats: expected Statistics from calibrate, got NoneType$"):
            sc.plan(dense, method=name, ratios=ratios(name))
    else:
        assert sc.plan(dense, method=name, ratios=ratios(name)).keep
