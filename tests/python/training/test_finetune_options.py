"""Mixed images, averaged weights and mixed precision in `finetune`."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import models
import numpy as np
import pytest
import secateur
import torch
from finetuning import Breaking, Killed, batches, quiet, same, tiny, weights
from secateur.errors import NumericalError
from secateur.training.evaluate import evaluate
from secateur.training.finetune import finetune
from secateur.training.loop import _seed_generators
from secateur.training.mixing import Mixing
from torch import Tensor, nn
from torch.nn import functional

PLAIN = {"opt": "momentum", "lr": 0.1, "weight_decay": 0.0, "clip_grad": None, "warmup": 0}


class Seen(nn.Module):
    """A linear classifier that keeps what it was shown."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(192, classes, generator=generator) / 14)
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.images.append(images.detach().clone())
        return images.flatten(1) @ self.weight


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_a_mixed_step_by_hand(options: dict[str, float], size: int) -> None:
    images, targets = batches(1, size)[0]
    before = images.clone()
    model, teacher = Seen(), Seen()
    start = model.weight.detach().clone()
    finetune(model, [(images, targets)], teacher=teacher, alpha=0.0, label_smoothing=0.1, **PLAIN, **options)
    assert torch.equal(images, before)
    (shown,) = model.images
    # What share of its own each image kept is read off the images; the others come from the far end of the batch.
    even = size - size % 2
    truth = functional.one_hot(targets, 3).double()
    mixed = truth.clone()
    for index in range(even):
        other = even - 1 - index
        if "cutmix" not in options:
            change = (shown - before)[index].double(), (before[other] - before[index]).double()
            share = 1 - float((change[0] * change[1]).sum() / change[1].square().sum())
        else:
            kept = (shown[index] == before[index]).double().mean()
            pasted = (shown[index] == before[other]).double().mean()
            if kept + pasted < 1:  # this batch drew mixup
                change = (shown - before)[index].double(), (before[other] - before[index]).double()
                share = 1 - float((change[0] * change[1]).sum() / change[1].square().sum())
            else:
                share = float(kept)
        mixed[index] = share * truth[index] + (1 - share) * truth[other]
    if size % 2:
        assert torch.equal(shown[-1], before[-1])
    soft = mixed * 0.9 + 0.1 / 3
    weight = start.double().requires_grad_()
    loss = -(soft * (shown.double().flatten(1) @ weight).log_softmax(1)).sum(1).mean()
    loss.backward()
    torch.testing.assert_close(model.weight.detach().double(), start - 0.1 * weight.grad, rtol=1e-4, atol=1e-6)


def test_mixing_shares_sum_to_one_and_follow_beta() -> None:
    np.random.seed(0)  # noqa: NPY002
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    own = []
    for _ in range(2000):
        mixed, shares = Mixing(0.5, 0.0).images(images)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed[:, 0, 0, 0], shares @ torch.arange(4.0))
        own.append(float(shares[0, 0]))
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)): 1/8, each within four standard errors.
    assert np.mean(own) == pytest.approx(0.5, abs=4 * math.sqrt(0.125 / 2000))
    assert np.var(own) == pytest.approx(0.125, rel=0.1)
    cut = [Mixing(0.5, 0.5).images(torch.eye(4)[:, None, None].expand(4, 3, 8, 4).clone())[0] for _ in range(200)]
    rectangles = sum(bool(((each == 0) | (each == 1)).all()) for each in cut)
    assert 60 < rectangles < 140


def test_the_teacher_sees_the_mixed_images_without_targets_too() -> None:
    images = batches(1, 6)[0][0]
    model, teacher = Seen(), Seen()
    finetune(model, [images], teacher=teacher, alpha=1.0, cutmix=1.0)
    assert torch.equal(model.images[0], teacher.images[0])
    assert not torch.equal(model.images[0], images)


def test_soft_targets_are_mixed() -> None:
    images, targets = batches(1, 6)[0]
    first, second = Seen(), Seen()
    finetune(first, [(images, targets)], mixup=1.0, label_smoothing=0.1)
    finetune(second, [(images, functional.one_hot(targets, 3).double())], mixup=1.0, label_smoothing=0.1)
    torch.testing.assert_close(first.weight, second.weight)


def test_the_average_by_hand() -> None:
    decay = 0.6
    trained = []

    class Watching(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> object:
            for batch in list.__iter__(self):
                trained.append(weights(model))
                yield batch

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))

    model, raw = build(), build()
    found = finetune(model, Watching(batches(3)), epochs=2, ema=decay, lr=1e-2, val_loader=batches(3))
    finetune(raw, batches(3), epochs=2, lr=1e-2)
    # The weights after the last step: neither the average nor its validation has a say in training.
    trained.append(weights(raw))
    average = {name: tensor.double() for name, tensor in trained[1].items()}
    for step, state in enumerate(trained[2:], 2):
        share = min(decay, 1 - step ** (-2 / 3))
        average = {name: share * average[name] + (1 - share) * tensor.double() for name, tensor in state.items()}
    for name, tensor in weights(model).items():
        if name == "1.num_batches_tracked":
            assert int(tensor) == 6
        else:
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights(model)["1.running_mean"], weights(raw)["1.running_mean"])
    assert found.history[1]["val_loss"] == evaluate(model, batches(3)).loss
    assert found.history[1]["val_loss"] != evaluate(raw, batches(3)).loss


def test_the_average_of_a_model_in_half_precision() -> None:
    model = quiet().bfloat16()
    arguments = {"ema": 0.5, "lr": 1e-2, "opt": "momentum"}
    found = finetune(model, batches(), val_loader=batches(2), **arguments)
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.bfloat16}
    assert found.history[-1]["val_loss"] == evaluate(model, batches(2)).loss
    expected = quiet()
    finetune(expected, batches(), **arguments)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(model)[name].float(), tensor, rtol=0.05, atol=0.02)


def test_an_error_leaves_the_trained_weights() -> None:
    data = batches()
    expected, model = tiny(), tiny()
    finetune(expected, data[:3], steps=3, warmup=0, lr=1e-3, min_lr=1e-3)
    data[3] = (torch.full((4, 3, 8, 8), math.nan), data[3][1])
    with pytest.raises(NumericalError):
        finetune(model, data, steps=5, warmup=0, lr=1e-3, min_lr=1e-3, ema=0.9, val_loader=batches(1))
    assert same(weights(model), weights(expected))


OPTIONS = [
    {"mixup": 0.5, "cutmix": 0.5, "ema": 0.8},
    {"ema": 0.8, "amp": "bfloat16"},
    {"mixup": 0.5, "amp": "float16", "ema": 0.8},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, options: dict[str, object]) -> None:
    def train(source: object, **more: object) -> tuple[dict[str, Tensor], object]:
        model = tiny()
        result = finetune(
            model, source, teacher=tiny(), steps=12, lr=1e-2, val_loader=batches(1, seed=5), **options, **more
        )
        return weights(model), result.history

    expected = train(batches(size=5))
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train(Breaking(batches(size=5), 8), resume=path, checkpoint_every=3)
    found = train(batches(size=5), resume=path)
    assert same(found[0], expected[0])
    assert found[1] == expected[1]
    again = train(Breaking(batches(size=5), 0), resume=path)  # a run that is done is not trained further
    assert same(again[0], expected[0])


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_half_and_keeps_weights_and_losses_whole(amp: str) -> None:
    seen: dict[str, set[torch.dtype]] = {"model": set(), "teacher": set()}
    model, teacher = quiet(), quiet()
    nn.init.normal_(teacher.head.weight)
    nn.init.normal_(model.head.weight, std=0.5)
    expected = copy.deepcopy(model)
    for name, each in (("model", model), ("teacher", teacher)):
        each.head.register_forward_hook(lambda _m, _i, output, name=name: seen[name].add(output.dtype))
    arguments = {"teacher": teacher, "lr": 1e-3, "opt": "momentum", "epochs": 2}
    found = finetune(model, batches(), amp=amp, **arguments).history[-1]["loss"]
    assert seen == {"model": {getattr(torch, amp)}, "teacher": {getattr(torch, amp)}}
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}
    whole = finetune(expected, batches(), **arguments).history[-1]["loss"]
    assert found == pytest.approx(whole, rel=0.02)
    assert found != whole
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=0.05, atol=0.01)


class Steep(nn.Module):
    """Finite logits, and a gradient of ``factor`` that a scale of 2**16 takes beyond float16."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        # In float16, as a layer under autocast computes.
        return (self.weight.half() * self.factor).float().expand(len(images), -1)


def test_a_step_whose_scaled_gradient_overflows_is_left_out() -> None:
    model = Steep(64.0)
    start = weights(model)
    finetune(model, [batches(1)[0]], amp="float16", warmup=0, clip_grad=None, lr=1.0)
    assert same(weights(model), start)
    # The scale halves until the gradient fits; then training goes on.
    finetune(model, [batches(1)[0]], steps=12, amp="float16", warmup=0, clip_grad=None, lr=1.0)
    assert not same(weights(model), start)
    assert bool(model.weight.isfinite().all())


def test_the_scale_is_in_the_checkpoint(tmp_path: Path) -> None:
    expected, model = Steep(64.0), Steep(64.0)
    arguments = {"amp": "float16", "steps": 14, "warmup": 0, "clip_grad": None}
    finetune(expected, [batches(1)[0]] * 14, **arguments)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        finetune(model, Breaking([batches(1)[0]] * 14, 10), resume=path, checkpoint_every=10, **arguments)
    model = Steep(64.0)
    finetune(model, [batches(1)[0]] * 14, resume=path, **arguments)
    assert same(weights(model), weights(expected))


class RootAtZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight.sqrt().expand(len(images), -1)


def test_a_gradient_that_no_scale_makes_finite_is_an_error() -> None:
    model = RootAtZero()
    with pytest.raises(NumericalError, match=r"^gradient: expected a finite value, got (nan|inf) in step 17; the weig"):
        finetune(model, batches(), steps=30, amp="float16")
    assert torch.equal(model.weight.detach(), torch.zeros(3))


# torch has no fused RMSNorm for an input in half precision and a weight that is not, and says so.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "qk_norm", "qk_rms_norm", "map_pool", "gate", "swiglu_packed_norm"])
def test_pruned_models_train_with_every_option(kind: str) -> None:
    model = models.make(kind)
    teacher = copy.deepcopy(model)
    images = [models.images(model, 3, seed) for seed in range(3)]
    stats = secateur.calibrate(model, images)
    plan = secateur.plan(model, stats, method="snp", ratios={"qk": 0.5, "v": 0.3, "ffn": 0.5, "width": 0.2})
    secateur.prune(model, plan)
    before = weights(model)
    options = {"mixup": 0.5, "cutmix": 0.5, "ema": 0.5, "amp": "bfloat16"}
    found = finetune(model, images, teacher=teacher, alpha=1.0, lr=1e-3, **options)
    assert math.isfinite(found.history[0]["loss"])
    assert weights(model).keys() == before.keys()
    assert not same(weights(model), before)


def test_each_rank_draws_its_own() -> None:
    def draw(rank: int) -> tuple[float, float]:
        _seed_generators(1, 2, rank, torch.device("cpu"))
        return float(torch.rand(())), float(np.random.random())  # noqa: NPY002

    assert draw(0) == draw(0)
    assert len({draw(rank) for rank in range(3)}) == 3
