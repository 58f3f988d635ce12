"""FFN layers of timm's other models: every cut is the masked dense model, or it is refused by name."""

from __future__ import annotations

import copy
import re
from functools import partial

import numpy as np
import pytest
import secateur as sc
import timm
import timm_ffn
import torch
from launch import run_script
from pruning import plan_of, set_fused
from secateur.statistics.measurements.divergence import _noise
from timm.layers import GlobalResponseNormMlp, GluMlp, SwiGLU
from timm.models.beit import Beit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def random_keep(model, seed=0):
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.choice(group.size, group.size * 2 // 3, replace=False))[None]
        for group in sc.inspect(model).groups
    }


def masked(dense, keep):
    """The dense model with hidden units zeroed after the activation, and norms taken over the others."""
    model = copy.deepcopy(dense)
    for name, layer in sc.inspect(dense).layers.items():
        mlp, kept = model.get_submodule(name), torch.from_numpy(keep[layer.groups["ffn"]][0])
        writer = model.get_submodule(layer.writer)
        axis = 1 if isinstance(writer, nn.Conv2d) else -1
        mask = torch.zeros(writer.weight.shape[1], dtype=torch.float64)
        mask[kept] = 1
        mask = mask[:, None, None] if axis == 1 else mask
        writer.register_forward_pre_hook(lambda _module, args, mask=mask: args[0] * mask)
        if isinstance(mlp, GlobalResponseNormMlp):
            mlp.grn.register_forward_hook(lambda grn, args, _out, mask=mask, a=axis: responses(grn, args[0], mask, a))
        elif layer.inner is not None:
            mlp.norm.register_forward_hook(lambda norm, args, _out, mask=mask: normalised(norm, args[0], mask))
    return model


def normalised(norm, x, mask):
    count = mask.sum()
    mean = (x * mask).sum(-1, keepdim=True) / count
    variance = ((x - mean).square() * mask).sum(-1, keepdim=True) / count
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def responses(grn, x, mask, axis):
    weight, bias = (w[:, None, None] if axis == 1 else w for w in (grn.weight, grn.bias))
    each = x.square().sum((2, 3) if axis == 1 else (1, 2), keepdim=True).sqrt()
    mean = (each * mask).sum(axis, keepdim=True) / mask.sum()
    return x + bias + weight * x * each / (mean + grn.eps)


@pytest.mark.parametrize("kind", timm_ffn.MODELS)
def test_a_cut_is_the_masked_dense_model(kind):
    dense = timm_ffn.make(kind).double()
    anatomy, keep = sc.inspect(dense), random_keep(dense)
    assert {group.kind for group in anatomy.groups} == {"ffn"}
    assert {"qk", "v", "heads", "width", "layer", "conv"} <= anatomy.refused.keys()
    pruned = copy.deepcopy(dense)
    report = sc.prune(pruned, plan_of(dense, keep))
    images = timm_ffn.images(dense, 2).double()
    with torch.no_grad():
        expected, found = masked(dense, keep)(images), pruned(images)
        assert (dense(images) - expected).abs().max() > 1e-4 * expected.abs().max()
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    after = sc.inspect(pruned)
    assert after.sizes == {name: kept.shape[1] for name, kept in keep.items()}
    assert after.params == report.params[1] == sum(parameter.numel() for parameter in pruned.parameters())
    assert after.macs == report.macs[1] == anatomy.macs_at(after.sizes) < anatomy.macs
    set_fused(pruned, False)
    with FlopCounterMode(display=False) as counter:
        pruned(images[:1])
    assert after.macs == counter.get_total_flops() // 2


LOADED = """
import sys, torch, secateur as sc
for path in sys.argv[1:]:
    images, expected = torch.load(f"{path}.pt")
    torch.set_num_threads(1)
    with torch.no_grad():
        found = sc.load(f"{path}.safetensors")(images)
    assert torch.equal(found, expected), path
"""


def test_the_whole_way(tmp_path):
    """Calibrated, planned for 80 % of the MACs where that can be reached, pruned, saved, and loaded elsewhere."""
    files = []
    for kind in timm_ffn.MODELS.keys() - timm_ffn.LARGE:
        model = timm_ffn.make(kind)
        anatomy = sc.inspect(model)
        images = timm_ffn.images(model, 6)
        stats = sc.calibrate(model, [images])
        if anatomy.macs_at(dict.fromkeys(anatomy.sizes, 1)) < 0.75 * anatomy.macs:
            plan = sc.plan(model, stats, method="refit", target=sc.Target(macs=0.8), round_to=1)
            assert 0.7 < plan.macs[1] / plan.macs[0] <= 0.8, kind
        else:
            plan = sc.plan(model, stats, method="snp", ratios={"ffn": 0.3})
        sc.prune(model, plan)
        path = tmp_path / str(len(files))
        sc.save(model, f"{path}.safetensors")
        torch.set_num_threads(1)
        with torch.no_grad():
            torch.save((images, model(images)), f"{path}.pt")
        files.append(str(path))
    code, _, errors = run_script(LOADED, *files, fresh=True)
    assert code == 0, errors


@pytest.mark.parametrize("kind", timm_ffn.REFUSED)
def test_what_has_no_known_layer_is_refused_by_name(kind):
    name, text = timm_ffn.REFUSED[kind]
    model = timm.create_model(name, device="meta")
    with pytest.raises(sc.Unsupported, match=rf"^model: expected {type(model).__name__} with FFN layers of .*{text}"):
        sc.inspect(model)


class Peeking(nn.Module):
    """Uses weights of another module."""

    def __init__(self, mlp):
        super().__init__()
        self.held = [mlp]

    def forward(self, x):
        return x + self.held[0].fc1.weight.sum()


def _peeked(mlp, block):
    block.norm1 = nn.Sequential(block.norm1, Peeking(mlp))


def _softmax(mlp, block):
    mlp.act = nn.Softmax(-1)


class PerUnit(nn.Module):
    """An activation with a number of its own for each unit, which nobody would cut."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(81))

    def forward(self, x):
        return x.relu() * self.scale


def _per_unit(mlp, block):
    mlp.act = PerUnit()


def _subclass(mlp, block):
    mlp.fc1.__class__ = type("Mine", (nn.Linear,), {})


def _unused(mlp, block):
    block.mlp.forward = lambda x: x


def _twice(mlp, block):
    block.norm1 = nn.Sequential(mlp, block.norm1)


def _drop(mlp, block):
    mlp.drop1 = nn.Softmax(-1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_peeked, r"blocks\.1\.norm1\.1: it uses blocks\.1\.mlp\.fc1\.weight itself"),
        (_softmax, r"blocks\.1\.mlp\.act: _softmax does not act on each unit alone"),
        (_per_unit, r"blocks\.1\.mlp\.act: mul does not act on each unit alone"),
        (_subclass, r"blocks\.1\.mlp\.fc1: expected nn\.Linear, got Mine"),
        (_unused, r"blocks\.1\.mlp: the model does not run it"),
        (_twice, r".*(tied|several times|itself).*"),
        (_drop, r"blocks\.1\.mlp\.drop1: expected nn\.Dropout or nn\.Identity, got Softmax"),
    ],
)
def test_a_layer_that_computes_something_else_is_refused_alone(change, text):
    model = timm_ffn.make("beit")
    change(model.blocks[1].mlp, model.blocks[1])
    anatomy = sc.inspect(model)
    assert list(anatomy.sizes) == ["blocks.0.ffn"]
    (reason,) = (reason for name, reason in anatomy.refused.items() if "." in name)
    assert re.match(text, reason), reason


def test_layers_that_do_not_see_images_are_refused():
    anatomy = sc.inspect(timm_ffn.make("swinv2_cr"))
    reasons = [reason for name, reason in anatomy.refused.items() if "meta_mlp" in name]
    assert len(reasons) == 3
    assert all("does not depend on the images" in reason for reason in reasons)


def keep_rows(seen, name, axis, _module, args):
    seen[name] = args[0].movedim(axis, -1).flatten(0, -2)


def test_statistics_are_of_hidden_units():
    """In convolutions and windows too: rows are positions of an image, channels are hidden units."""
    for kind in ("convnext of convolutions", "mobilevit", "volo", "mixer"):
        model = timm_ffn.make(kind)
        anatomy = sc.inspect(model)
        images, seen = timm_ffn.images(model, 2), {}
        for layer in anatomy.layers.values():
            fc2 = model.get_submodule(layer.writer)
            axis = 1 if isinstance(fc2, nn.Conv2d) else -1
            fc2.register_forward_pre_hook(partial(keep_rows, seen, layer.groups["ffn"], axis))
        stats = sc.calibrate(model, [images])
        for name, rows in seen.items():
            rows = rows.double()
            second = torch.from_numpy(stats.moments(name).second)
            assert torch.allclose(second, rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-5 * float(second.abs().max()))


def hidden_units(model, images):
    """What each FFN layer's tap makes of what enters its last linear layer."""
    seen, hooks = {}, []
    for name, layer in sc.inspect(model).layers.items():
        tap = layer.taps["hidden"]
        hook = partial(keep_view, seen, name, tap.view)
        hooks.append(model.get_submodule(tap.module).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def keep_view(seen, name, view, _module, args):
    seen[name] = view(args[0])


def test_hidden_units_are_told_apart_by_image():
    """Windows and patches are parts of their image, wherever the model puts them along the first axis."""
    for kind in ("mobilevit", "maxvit", "tnt", "davit", "volo", "convnext of convolutions"):
        model = timm_ffn.make(kind).double()
        images = timm_ffn.images(model, 3).double()
        together = hidden_units(model, images)
        for number, image in enumerate(images):
            for name, alone in hidden_units(model, image[None]).items():
                assert len(alone) == 1
                assert torch.allclose(together[name][number], alone[0], rtol=1e-9, atol=1e-9), (kind, name)


def test_refits_lose_less_than_selection():
    for kind in ("beit", "convnext of convolutions", "eva02, with inner norms", "convnextv2"):
        model = timm_ffn.make(kind)
        images = timm_ffn.images(model, 64)
        stats, lost = sc.calibrate(model, [images]), {}
        for method in ("random", "refit"):
            pruned = copy.deepcopy(model)
            sc.prune(pruned, sc.plan(model, stats, method=method, ratios={"ffn": 0.5}))
            with torch.no_grad():
                lost[method] = float((pruned(images) - model(images)).square().sum())
        assert lost["refit"] < 0.5 * lost["random"], (kind, lost)


@pytest.mark.parametrize("kind", ["levit", "efficientvit"])
def test_what_a_refit_adds_survives_fusing(kind):
    """timm fuses batch norms with layers before them as if these had no biases."""
    model = timm_ffn.make(kind)
    images, layers = timm_ffn.images(model, 12), sc.inspect(model).layers.values()
    sc.prune(model, sc.plan(model, sc.calibrate(model, [images]), method="refit", ratios={"ffn": 0.5}, round_to=1))
    assert all(model.get_submodule(layer.writer).bias is None for layer in layers)
    with torch.no_grad():
        found, expected = timm.utils.reparameterize_model(model, inplace=False)(images), model(images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_mean_that_is_lost_moves_into_the_batch_norm():
    """Units that are always the same can go without a trace."""
    model = timm_ffn.make("levit").double()
    layer = next(iter(sc.inspect(model).layers.values()))
    with torch.no_grad():
        norm = model.get_submodule(layer.name).ln1.bn
        norm.weight[::2], norm.bias[::2] = 0, 0.7
        images = timm_ffn.images(model, 4).double()
        expected = model(images)
        stats = sc.calibrate(model, [images])
        name = layer.groups["ffn"]
        sc.prune(model, sc.plan(model, stats, method="refit", ratios={name: 0.5}, round_to=1))
        assert sc.inspect(model).sizes[name] == 128
        assert (model(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_classes_are_taken_by_exact_type():
    class Mine(Beit):
        pass

    with pytest.raises(sc.Unsupported, match="by exact class, got .*Mine"):
        sc.inspect(Mine(img_size=32, embed_dim=48, depth=1, num_heads=3))
    gated = timm_ffn.make("eva02, packed")
    assert type(gated.blocks[0].mlp) is GluMlp
    assert type(timm_ffn.make("eva02, with inner norms").blocks[0].mlp) is SwiGLU
    assert sc.inspect(timm.create_model("vit_tiny_patch16_224", device="meta")).family == "vision_transformer"
    assert sc.inspect(timm.create_model("swin_tiny_patch4_window7_224", device="meta")).family == "swin"


def test_noise_in_convolutions_stays_in_its_channel():
    """What differs from channel to channel, and from nowhere else, is no variance."""
    output = torch.arange(5.0)[None, :, None, None].expand(2, 5, 3, 4)
    changed = _noise(None, centred=True, axis=1)(output, torch.Generator().manual_seed(0))
    assert torch.allclose(changed, output)


@pytest.mark.parametrize("sensitivity", [True, "noise"])
def test_losses_are_measured(sensitivity):
    model = timm_ffn.make("convnext of convolutions")
    stats = sc.calibrate(model, [timm_ffn.images(model, 8)], sensitivity=sensitivity)
    plan = sc.plan(model, stats, target=sc.Target(macs=0.8), round_to=1)
    assert plan.macs[1] <= 0.8 * plan.macs[0]
    sc.prune(model, plan)


def test_layers_are_pruned_at_once_where_blocks_are_not_known():
    model = timm_ffn.make("convnext of convolutions")
    images, by_block = timm_ffn.images(model, 8), copy.deepcopy(model)
    sc.prune_sequential(by_block, [images], method="refit", ratios={"ffn": 0.5})
    sc.prune(model, sc.plan(model, sc.calibrate(model, [images]), method="refit", ratios={"ffn": 0.5}))
    assert set(sc.inspect(model).sizes.values()) == {32, 48, 64, 80}
    with torch.no_grad():
        assert torch.allclose(by_block(images), model(images), rtol=1e-4, atol=1e-4)
