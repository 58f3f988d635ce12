"""Moments in which tokens have weights: `calibrate(row_weights=True)`."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import swin_models
import torch
from finetuning import quiet
from launch import on_ranks
from models import images, make
from secateur.data.loader import loader
from secateur.families.registry import family_of
from secateur.statistics.measurements import Work, measurements
from secateur.statistics.rows import RowWeights
from sums import assert_close
from torch import nn

SPLITS = [2, 5, 1, 6]
KINDS = ["plain", "registers_layer_scale", "rms_norm", "post_norm", "swiglu_split", "no_class_token", "identity_head"]
FOLDS = {None: slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def read_by_hooks(model: nn.Module, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Values, inputs of projections and hidden units by observation, and the stream after each layer, one block alone.

    The stream is what enters the next layer, by timm's own modules.
    """
    found: dict[str, torch.Tensor] = {}
    streams: dict[str, torch.Tensor] = {}
    handles = []

    def note(where: dict[str, torch.Tensor], name: str):
        return lambda _module, args, *_: where.__setitem__(name, args[0].detach())

    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}"
        handles += [
            block.attn.qkv.register_forward_hook(
                lambda _m, _a, y, n=name: found.__setitem__(f"{n}.v", y.detach().chunk(3, -1)[2])
            ),
            block.attn.proj.register_forward_pre_hook(note(found, f"{name}.attn.proj")),
            block.mlp.fc2.register_forward_pre_hook(note(found, f"{name}.ffn")),
            block.drop_path2.register_forward_pre_hook(note(streams, f"{name}.added")),
        ]
        after = model.blocks[number + 1] if number + 1 < len(model.blocks) else model.norm
        handles.append(after.register_forward_pre_hook(note(streams, f"{name}.mlp")))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for number in range(len(model.blocks)):
        # Before the FFN is after the attention.
        streams[f"blocks.{number}.attn"] = streams[f"blocks.{number}.mlp"] - streams.pop(f"blocks.{number}.added")
    return found, streams


def layer_of(observation: str) -> str:
    block = ".".join(observation.split(".")[:2])
    return f"{block}.{'mlp' if observation.endswith('.ffn') else 'attn'}"


def weights_of(model: nn.Module, batches: list[torch.Tensor]) -> RowWeights:
    """By formulas that have tests of their own (`test_row_weights_by_hand`)."""
    anatomy, family = sc.inspect(model), family_of(model)
    work = Work(model, family, anatomy, batches, sc.calibrate(model, batches, collect="scores"))
    (sums,) = measurements.named("rows").take(work)
    return RowWeights(model, anatomy, family.prefix_tokens(model), sums)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_moments_by_hand(kind, dtype, stride):
    model = make(kind).to(dtype)
    x = images(model, sum(SPLITS), 3).to(dtype)
    stats = sc.calibrate(model, list(x.split(SPLITS)), row_weights=True, token_fraction=1 / stride)
    rows = weights_of(model, list(x.split(SPLITS)))
    found, streams = read_by_hooks(model, x)
    tokens = next(iter(found.values())).shape[1]
    taken = torch.tensor([[(t - i // 2) % stride == 0 for t in range(tokens)] for i in range(len(x))])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert len(found) == 6
    for name, value in found.items():
        weights = rows.of(layer_of(name), streams[layer_of(name)])
        # Tokens differ, or it would be no test of weights.
        assert float(weights.std() / weights.mean()) > 0.05
        for fold, part in FOLDS.items():
            z, w = (each[part][taken[part]].double() for each in (value, weights))
            w = w / w.sum()
            moments = stats.moments(name, fold)
            assert moments.rows == len(z)
            expected = (w[:, None] * z).T @ z
            scale = float(expected.abs().max())
            np.testing.assert_allclose(moments.mean, w @ z, atol=tolerance * scale**0.5, rtol=0)
            np.testing.assert_allclose(moments.second, expected, atol=tolerance * scale, rtol=0)


def test_bfloat16_differs_by_its_rounding_alone():
    model = make("plain").bfloat16()
    x = images(model, 9, 3).bfloat16()
    low = sc.calibrate(model, [x], row_weights=True)
    rows, (found, streams) = weights_of(model, [x]), read_by_hooks(model, x)
    for name, value in found.items():
        w = rows.of(layer_of(name), streams[layer_of(name)]).flatten()
        z = value.double().flatten(0, 1)
        expected = (w[:, None] * z).T @ z / w.sum()
        # The stream after a layer is a sum that the model rounds and these hooks do not.
        np.testing.assert_allclose(low.moments(name).second, expected, atol=0.01 * float(expected.abs().max()), rtol=0)


def test_what_has_no_weights_stays_as_it_was():
    """Scores, Grams of queries and keys, and the inputs of norms."""
    model = make("plain")
    x = list(images(model, 14, 3).split(SPLITS))
    plain, weighted = (sc.calibrate(model, x, row_weights=each) for each in (False, True))
    same = [name for name, array in plain.tensors.items() if np.array_equal(array, weighted.tensors[name])]
    differing = {name.split("/")[1] for name in plain.tensors.keys() - set(same)}
    assert differing == {f"blocks.{block}.{part}" for block in (0, 1) for part in ("v", "attn.proj", "ffn")}
    further = {name.rsplit("/", 1)[1] for name in weighted.tensors.keys() - plain.tensors.keys()}
    assert further == {"weight", "rows"}
    assert "row_weights" not in plain.settings.to_dict()


def test_a_loader_that_uses_its_memory_again():
    model = make("plain")
    x = images(model, 15, 3)

    def reusing():
        memory = torch.empty(5, *x.shape[1:])
        for part in x.split(5):
            yield memory.copy_(part)

    assert_close(
        sc.calibrate(model, reusing(), row_weights=True), sc.calibrate(model, list(x.split(5)), row_weights=True), 0
    )


def test_weights_come_from_the_first_images_and_all_images_count(digits_model, digits_images):
    """More images than the weights are measured on; the rest have the weights of their own streams."""
    x = digits_images[torch.arange(150) % len(digits_images)] * torch.linspace(0.5, 1, 150)[:, None, None, None]
    stats = sc.calibrate(digits_model, list(x.split(40)), row_weights=True)
    sums = stats.tensors["sensitivity/blocks.1.mlp/rows"]
    assert sums[-1] == 128
    rows = weights_of(digits_model, [*x[:120].split(40), x[120:128]])
    found, streams = read_by_hooks(digits_model, x)
    for name, value in found.items():
        w, z = rows.of(layer_of(name), streams[layer_of(name)]).flatten(), value.double().flatten(0, 1)
        expected = (w[:, None] * z).T @ z / w.sum()
        scale = float(expected.abs().max())
        np.testing.assert_allclose(stats.moments(name).second, expected, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("done", [4, 20])
def test_a_resumed_run_is_that_of_one_go(digits_model, digits_images, tmp_path, done):
    """Also where it stopped before the images that weights are measured on were all read."""
    batches, path = digits_images[:29].split(4), tmp_path / "stats.safetensors"
    whole = sc.calibrate(digits_model, batches, row_weights=True)
    first = sc.calibrate(digits_model, batches, row_weights=True, max_images=done, resume=path)
    assert first.images == done
    resumed = sc.calibrate(digits_model, batches, row_weights=True, resume=path)
    assert resumed.images == whole.images == 29
    assert resumed.tensors.keys() == whole.tensors.keys()
    again = sc.calibrate(digits_model, batches, row_weights=True, resume=path)
    assert_close(again, resumed, 0)
    with pytest.raises(sc.InvalidArgument, match="resume: expected a file of row_weights = False, got True"):
        sc.calibrate(digits_model, batches, resume=path)


def test_interrupted_after_the_weights_were_measured(digits_model, digits_images, tmp_path):
    """What was collected goes on to the very bits of a run that was not interrupted."""
    batches, path = digits_images.split(16) * 5, tmp_path / "stats.safetensors"
    assert sum(map(len, batches)) > 144
    whole = sc.calibrate(digits_model, batches, row_weights=True)

    def raising():
        yield from batches[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.calibrate(digits_model, raising(), row_weights=True, resume=path)
    assert sc.Statistics.load(path).images == 144
    assert_close(sc.calibrate(digits_model, batches, row_weights=True, resume=path), whole, 0)


def test_no_file_without_images(digits_model, digits_images, tmp_path, monkeypatch):
    """Interrupted between the measurement and the first image: nothing was collected."""
    path = tmp_path / "stats.safetensors"

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.statistics.passes.RowWeights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sc.calibrate(digits_model, [digits_images], row_weights=True, resume=path)
    assert not path.exists()


def test_files_and_merging(digits_model, digits_images, tmp_path):
    """Each part has weights of its own; merged, they count by their weights."""
    parts = [sc.calibrate(digits_model, [x], row_weights=True) for x in digits_images[:30].split(14)]
    path = tmp_path / "stats.safetensors"
    parts[0].save(path)
    assert_close(sc.Statistics.load(path), parts[0], 0)
    merged = sc.Statistics.merge(parts)
    for group in ("blocks.0.v", "blocks.0.attn.proj", "blocks.1.ffn"):
        shares = [sum(part.tensors[f"{fold}/{group}/weight"][0] for fold in ("even", "odd")) for part in parts]
        expected = np.average([part.moments(group).second for part in parts], axis=0, weights=shares)
        np.testing.assert_allclose(merged.moments(group).second, expected, rtol=1e-12, atol=1e-12)
    plain = sc.calibrate(digits_model, [digits_images])
    for different in ([parts[0], plain], [plain, parts[0]]):
        with pytest.raises(sc.InvalidArgument, match="parts: expected row_weights"):
            sc.Statistics.merge(different)
    assert merged.excess >= 0


def test_massive_tokens_do_not_rule_the_moments():
    """One patch of every image whose hidden units are hundreds of times as large hardly counts in what fits read."""
    model, x = make("plain").double(), images(make("plain"), 20, 3).double()

    def massive(_module, args):
        hidden = args[0].clone()
        hidden[:, 7] *= 300
        return hidden

    model.blocks[0].mlp.fc2.register_forward_pre_hook(massive)
    plain, weighted = (sc.calibrate(model, [x], row_weights=each) for each in (False, True))
    found, _ = read_by_hooks(model, x)
    others = [token for token in range(21) if token != 7]
    z = found["blocks.0.ffn"][:, others].flatten(0, 1)
    expected = float((z.T @ z).trace() / len(z))
    traces = [float(np.trace(stats.moments("blocks.0.ffn").second)) for stats in (plain, weighted)]
    assert traces[0] > 1000 * expected
    assert traces[1] < traces[0] / 5


@pytest.mark.parametrize(
    ("make_model", "arguments", "text"),
    [
        (quiet, {"collect": "scores"}, "row_weights: expected collect='all' with weights, got collect='scores'"),
        (
            lambda: swin_models.make("padded"),
            {},
            "row_weights: expected a model with one stream of tokens of which none merge",
        ),
    ],
)
def test_refused(make_model, arguments, text):
    model = make_model()
    with pytest.raises(sc.Error, match=text):
        sc.calibrate(model, [torch.zeros(1)], row_weights=True, **arguments)


def test_no_images(digits_model):
    with pytest.raises(sc.InvalidArgument, match="loader: expected at least one image, got none"):
        sc.calibrate(digits_model, [], row_weights=True)


def test_the_model_is_left_as_it_was(digits_model, digits_images):
    before = {name: value.clone() for name, value in digits_model.state_dict().items()}
    digits_model.train()
    sc.calibrate(digits_model, [digits_images], row_weights=True)
    assert digits_model.training
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())
    assert all(parameter.grad is None for parameter in digits_model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in digits_model.modules())


ON_RANKS = """
import os, sys
import torch
import secateur as sc
from finetuning import quiet
from secateur.data.loader import loader

torch.set_num_threads(1)
model = quiet(num_classes=10).double()
images = loader("digits", model, batch_size=9, max_images=160, shuffle=True)
sc.calibrate(model, images, row_weights=True).save(f"{sys.argv[1]}/{os.environ['RANK']}")
"""


def test_several_ranks_have_the_sums_of_one(tmp_path):
    assert [code for code, _ in on_ranks(ON_RANKS, tmp_path, ranks=3)] == [0, 0, 0]
    model = quiet(num_classes=10).double()
    whole = sc.calibrate(model, loader("digits", model, batch_size=9, max_images=160, shuffle=True), row_weights=True)
    for rank in range(3):
        assert_close(sc.Statistics.load(tmp_path / str(rank)), whole, 1e-9)


def test_plans_use_them(digits_model, digits_images):
    """Every method that changes weights makes other ones of weighted moments."""
    model = digits_model
    plain, weighted = (sc.calibrate(model, [digits_images], row_weights=each) for each in (False, True))
    for method in ("project", "refit"):
        first, second = (
            sc.plan(model, each, method=method, ratios={"v": 0.4, "ffn": 0.4}) for each in (plain, weighted)
        )
        assert first.weights.keys() == second.weights.keys()
        assert any(not torch.equal(value, second.weights[name]) for name, value in first.weights.items())
