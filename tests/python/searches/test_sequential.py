"""Pruning block by block: what each block is fitted to, that nothing is changed before the end, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import secateur as sc
import torch
from models import images, make
from secateur.calibration.calibrate import calibrate_block
from secateur.data.loader import loader

ALL = {"qk": 0.5, "v": 0.5, "ffn": 0.5, "width": 0.2}


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "inner_norms", "gate", "swiglu_packed", "registers_layer_scale"])
@pytest.mark.parametrize("method", ["project", "refit", "snp"])
def test_block_by_block_by_hand(kind, method):
    """Against the pruned stream: calibrate, plan and prune one block after the other by the public functions."""
    model = make(kind)
    batches = [images(model, 5, seed) for seed in range(2)]
    by_hand = copy.deepcopy(model)
    sizes = {group.name: group for group in sc.inspect(model).groups}
    for block in ("blocks.0", "blocks.1", "width"):
        ratios = {name: ALL.get(group.kind, 0) for name, group in sizes.items() if name.startswith(block)}
        sc.prune(by_hand, sc.plan(by_hand, sc.calibrate(by_hand, batches), method=method, ratios=ratios))
    report = sc.prune_sequential(model, batches, method, ratios=ALL, target_stream="pruned")
    x = images(model, 3, 9)
    with torch.no_grad():
        assert torch.equal(model(x), by_hand(x))
    assert report.params[1] == sum(p.numel() for p in model.parameters()) == sc.inspect(model).params
    assert report.macs[1] == sc.inspect(model).macs


def test_a_block_is_calibrated_alone(digits_model, digits_images):
    """The same sums as a whole calibration, of that block's groups only, and the rest of the model is never run."""
    whole = sc.calibrate(digits_model, [digits_images])
    seen = []
    handle = digits_model.blocks[2].register_forward_pre_hook(lambda *_: seen.append(1))
    part = calibrate_block(digits_model, [digits_images], 1, max_images=None, token_fraction=1.0)
    handle.remove()
    assert not seen
    assert part.groups
    assert all(name.startswith("blocks.1.") for name in part.groups)
    assert all((part.tensors[name] == whole.tensors[name]).all() for name in part.tensors)


def test_merged_tokens_are_no_residual_width(monkeypatch):
    """They need no statistics of norms: their cut changes no weights."""
    model = make("plain")
    assert [group.name for group in sc.inspect(model).widths] == ["width"]
    assert str(sc.inspect(model)).count("residual width") == 1
    monkeypatch.setattr("secateur.searches.sequential.calibrate_norms", None)
    sc.prune_sequential(model, [images(model, 5)], ratios={"qk": 0.5, "tokens": 0.3})
    assert any(sc.inspect(model).merged.values())


@pytest.fixture(scope="module")
def calibration(make_digits_model):
    """Batches of one half of the digits, their statistics, and those of the first 256, with measured losses."""
    model = make_digits_model()
    batches = [images for images, _ in loader("digits", model, split="train", batch_size=64, max_images=512)]
    first = sc.calibrate(model, batches, max_images=256, sensitivity=True, row_weights=False)
    return batches, sc.calibrate(model, batches), first


@pytest.mark.parametrize("target_stream", ["pruned", "dense"])
@pytest.mark.parametrize("macs", [0.5, 0.35])
def test_it_loses_no_more_than_one_shot(digits_model, digits_loader, calibration, macs, target_stream):
    """Calibrated on one half of the digits, compared on the other."""
    batches, stats, first = calibration
    held_out, targets = (torch.cat(parts) for parts in zip(*digits_loader, strict=True))
    arguments = {"target": sc.Target(macs=macs), "round_to": 3}
    at_once = copy.deepcopy(digits_model)
    # The sizes are chosen by the first 256 images, and fitted on all.
    whole = sc.inspect(digits_model).sizes
    sizes = {name: keep.shape[1] for name, keep in sc.plan(at_once, first, **arguments).keep.items()}
    removed = {name: 1 - size / whole[name] for name, size in sizes.items()}
    sc.prune(at_once, sc.plan(at_once, stats, ratios=removed))
    by_block = copy.deepcopy(digits_model)
    report = sc.prune_sequential(by_block, batches, "project", **arguments, target_stream=target_stream)
    assert sc.inspect(by_block).sizes == sc.inspect(at_once).sizes
    assert macs - 0.03 < report.macs[1] / report.macs[0] <= macs
    # A few 1e-4 nats: which of the two is ahead is chance, a block fitted to the wrong inputs is not.
    with torch.no_grad():
        dense, *answers = (model(held_out).log_softmax(1) for model in (digits_model, by_block, at_once))
    lost = [float((dense.exp() * (dense - answer)).sum(1).mean()) for answer in answers]
    assert lost[0] <= 1.15 * lost[1]
    right = [int((answer.argmax(1) == targets).sum()) for answer in answers]
    assert right[0] >= right[1] - 1


def test_nothing_changes_before_the_end(digits_model, digits_images):
    before = {name: value.clone() for name, value in digits_model.state_dict().items()}

    class Failing:
        reads = 0

        def __iter__(self):
            self.reads += 1
            yield digits_images[:8]
            if self.reads == 2:
                raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        sc.prune_sequential(digits_model, Failing(), ratios=ALL, target_stream="pruned")
    for batches, error, text in (
        (Failing(), OSError, "gone"),
        (iter([digits_images]), sc.InvalidArgument, "loader: expected batches that can be read several times"),
        ((x for x in [digits_images]), sc.InvalidArgument, "generator, an iterator"),
        (3, sc.InvalidArgument, "loader"),
    ):
        with pytest.raises(error, match=text):
            sc.prune_sequential(digits_model, batches, ratios=ALL)
    for arguments, text in (
        ({}, "target, ratios"),
        ({"ratios": ALL, "allocation": "error"}, "allocation"),
        ({"target": 0.5}, "target"),
        ({"ratios": ALL, "method": "none"}, "method"),
        ({"ratios": ALL, "max_images": 0}, "max_images"),
        ({"ratios": ALL, "token_fraction": 0}, "token_fraction"),
        ({"ratios": ALL, "target_stream": "both"}, "target_stream: expected 'dense' or 'pruned', got 'both'"),
        ({"ratios": ALL, "streams": "disk"}, "streams: expected 'memory' or 'recompute', got 'disk'"),
        ({"ratios": ALL, "sizes_of": 3}, "sizes_of: expected a Plan, got int"),
        ({"ratios": ALL, "resume": "/nowhere/file"}, "resume: expected a file in an existing folder"),
        ({"ratios": ALL, "resume": "file", "method": "snp"}, "resume: expected none unless blocks are fitted"),
        ({"ratios": ALL, "resume": "file", "target_stream": "pruned"}, "resume: expected none unless"),
        ({"ratios": {"head": 0.5}}, "ratios"),
        ({"ratios": {"layer": 0.5}}, "ratios"),
    ):
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.prune_sequential(digits_model, [digits_images], **arguments)
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in digits_model.modules())
