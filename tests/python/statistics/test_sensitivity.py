"""How much the output moves with each group, and the Grams of single images that errors are measured on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from scores import queries_and_keys
from small_vits import small_batches, small_vit


def literal(model, x, change):
    """Mean divergence per squared share when ``change(module name, output)`` gives what is added to outputs."""
    share = 1e-3
    handles = [
        module.register_forward_hook(
            lambda m, a, out, name=name: out if change(name, out) is None else out + share * change(name, out)
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        moved = model(x).log_softmax(1)
        for handle in handles:
            handle.remove()
        still = model(x).log_softmax(1)
    return float((still.exp() * (still - moved)).sum(1).mean()) / share**2


def noise_like(rows, seed):
    """Gaussian rows of the covariance of the given ones."""
    flat = rows.reshape(-1, rows.shape[-1])
    centred = flat - flat.mean(0)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(len(flat), len(flat), generator=generator, dtype=rows.dtype) / len(flat) ** 0.5
    return (mix @ centred).reshape(rows.shape)


@pytest.mark.parametrize(
    ("group", "module"), [("blocks.0.ffn", "blocks.0.mlp.fc2"), ("blocks.2.v", "blocks.2.attn.proj")]
)
def test_against_gaussian_noise_of_the_same_covariance(digits_model, digits_images, group, module):
    """Other noise, another share, another seed: the same sensitivity within sampling."""
    model, x = digits_model.double(), digits_images[:24].double()
    found = sc.calibrate(model, [x], sensitivity="noise").sensitivity(group)
    samples = [
        literal(model, x, lambda name, out, seed=seed: noise_like(out, seed) if name == module else None)
        for seed in range(3)
    ]
    # One sample of the noise deviates by a third or more; a wrong share or a missing square is a factor of ten.
    assert 1 / 3 < found / np.mean(samples) < 3


def test_every_group_has_one_and_the_model_is_left_as_it_was(digits_model, digits_images):
    digits_model.train()
    before = {name: value.clone() for name, value in digits_model.state_dict().items()}
    stats = sc.calibrate(digits_model, [digits_images[:40], digits_images[40:]], sensitivity="noise")
    for group in sc.inspect(digits_model).groups:
        assert group.of_tokens or 0 < stats.sensitivity(group.name) < np.inf
    assert digits_model.training
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())
    assert not any(module._forward_hooks for module in digits_model.modules())
    assert stats.sensitive
    plain = sc.calibrate(digits_model, [digits_images[:40], digits_images[40:]])
    assert not plain.sensitive
    assert plain.images == stats.images == 64
    assert all((stats.tensors[name] == plain.tensors[name]).all() for name in plain.tensors)
    with pytest.raises(sc.InvalidArgument, match="sensitivity"):
        plain.sensitivity("width")


@pytest.mark.parametrize("kind", ["identity_head", "no_pool", "qk_norm", "distilled", "map_pool", "hybrid", "gate"])
def test_all_kinds_of_models(kind):
    model = make(kind)
    stats = sc.calibrate(model, [images(model, 5)], sensitivity="noise")
    for group in sc.inspect(model).groups:
        assert group.of_tokens or stats.sensitivity(group.name) > 0


def test_a_part_without_influence_has_none(digits_model, digits_images):
    with torch.no_grad():
        digits_model.blocks[1].mlp.fc2.weight.zero_()
    stats = sc.calibrate(digits_model, [digits_images], sensitivity="noise")
    assert abs(stats.sensitivity("blocks.1.ffn")) < 1e-9 < stats.sensitivity("blocks.0.ffn")


def test_files_resuming_and_merging(tmp_path, digits_model, digits_images):
    path = tmp_path / "s.safetensors"
    batches = [digits_images[:30], digits_images[30:]]
    whole = sc.calibrate(digits_model, batches, sensitivity="noise", resume=path)
    again = sc.Statistics.load(path)
    resumed = sc.calibrate(digits_model, batches, sensitivity="noise", resume=path)
    for stats in (again, resumed):
        assert stats.sensitivity("width") == whole.sensitivity("width")
    halves = [sc.calibrate(digits_model, [batch], sensitivity="noise") for batch in batches]
    merged = sc.Statistics.merge(halves)
    weights = [30, 34]
    mean = np.average([half.sensitivity("blocks.0.v") for half in halves], weights=weights)
    assert merged.sensitivity("blocks.0.v") == pytest.approx(mean)


@pytest.mark.parametrize("kind", ["digits", "plain", "qk_norm"])
def test_grams_of_the_first_images(request, kind):
    """Of 70 images the first 64, however they come in batches, after merging shards too."""
    if kind == "digits":
        model, x = request.getfixturevalue("digits_model"), request.getfixturevalue("digits_images")
        x = torch.cat([x, x[:6].flip(0)])
    else:
        model = make(kind)
        x = images(model, 70)
    q, k = (y[:64].double() for y in queries_and_keys(model, x)[1])
    k = k - k.mean(1, keepdim=True)
    stats = sc.calibrate(model, [x[:33], x[33:65], x[65:]])
    shards = [sc.calibrate(copy.deepcopy(model), [part]) for part in (x[:40], x[40:])]
    for found in (stats, sc.Statistics.merge(shards)):
        for grams, y in zip(found.image_grams("blocks.1.qk"), (q, k), strict=True):
            expected = torch.einsum("bnhi,bnhj->bhij", y, y).numpy()
            assert grams.shape == expected.shape
            np.testing.assert_allclose(grams, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(sc.InvalidArgument, match="image"):
        sc.calibrate(model, [x[:2]], collect="scores").image_grams("blocks.1.qk")


def test_blocks_that_are_compiled_are_measured_as_they_are_written():
    model = small_vit()
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(backend="eager")
    wanted = sc.calibrate(model, small_batches(), sensitivity="noise")
    found = sc.calibrate(compiled, small_batches(), sensitivity="noise")
    for group in [group for group in sc.inspect(model).groups if group.kind == "layer"]:
        assert wanted.removal(group.name)[0] > 0
        assert found.removal(group.name) == wanted.removal(group.name)
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)  # and again afterwards
    with torch.no_grad():
        assert torch.equal(compiled(small_batches()[0]), model(small_batches()[0]))
