from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from finetuning import batches, quiet, same, tiny, weights
from secateur.data.loader import ImageLoader, loader
from secateur.errors import InvalidArgument, NumericalError
from secateur.training.evaluate import evaluate
from secateur.training.finetune import finetune
from torch import Tensor, nn
from torch.nn import functional


def test_one_step_of_sgd_by_hand() -> None:
    model, teacher = quiet(), quiet()
    nn.init.normal_(teacher.head.weight)
    images, targets = batches(1)[0]
    temperature, alpha, smoothing = 3.0, 0.3, 0.1
    expected = copy.deepcopy(model)
    logits = expected(images)
    wanted = teacher(images).detach()
    # Hinton et al. write T² Σ p log(p / q); the label part is smoothed cross entropy, written out.
    p, q = (wanted / temperature).softmax(1), (logits / temperature).softmax(1)
    soft = temperature**2 * (p * (p / q).log()).sum(1).mean()
    truth = functional.one_hot(targets, 3) * (1 - smoothing) + smoothing / 3
    hard = -(truth * logits.log_softmax(1)).sum(1).mean()
    loss = alpha * soft + (1 - alpha) * hard
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    found = finetune(
        model,
        [(images, targets)],
        teacher=teacher,
        opt="momentum",  # timm's name for SGD without Nesterov; the first step has no momentum yet
        lr=0.1,
        weight_decay=0.0,
        clip_grad=None,
        temperature=temperature,
        alpha=alpha,
        label_smoothing=smoothing,
    )
    assert found.history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_gradient_is_clipped_to_the_norm() -> None:
    model = quiet()
    before = weights(model)
    finetune(model, batches(1), opt="momentum", lr=1.0, weight_decay=0.0, clip_grad=1e-3)
    moved = math.sqrt(sum(float((tensor - before[name]).square().sum()) for name, tensor in model.state_dict().items()))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_gradients_of_frozen_parameters_do_not_count() -> None:
    """Nor are they changed: they are the caller's."""
    model = quiet()
    frozen = model.pos_embed.requires_grad_(False)
    frozen.grad = torch.full_like(frozen, 100.0)
    before = weights(model)
    finetune(model, batches(1), opt="momentum", lr=1.0, weight_decay=0.0, clip_grad=1e-3)
    moved = math.sqrt(sum(float((tensor - before[name]).square().sum()) for name, tensor in model.state_dict().items()))
    assert moved == pytest.approx(1e-3, rel=1e-3)
    assert (frozen.grad == 100).all()


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    # A pass of one batch has one history entry for each step.
    history = finetune(quiet(), batches(1), steps=20, lr=1.0, min_lr=0.1, warmup=4, opt="sgd").history
    expected = [0.2 + 0.2 * step for step in range(4)]
    expected += [0.1 + 0.45 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert [entry["lr"] for entry in history] == pytest.approx(expected)


def test_training_learns_and_beats_its_start(digits_model: nn.Module, digits_loader: ImageLoader) -> None:
    nn.init.normal_(digits_model.head.weight, std=0.02)
    nn.init.zeros_(digits_model.head.bias)
    before = evaluate(digits_model, digits_loader, max_images=256).top1
    training = loader("digits", digits_model, split="train", shuffle=True, batch_size=32, max_images=512)
    validation = loader("digits", digits_model, max_images=256)
    found = finetune(digits_model, training, epochs=2, lr=1e-3, val_loader=validation)
    assert before < 60 < 90 < found.history[-1]["top1"]
    assert found.history[-1]["top1"] == evaluate(digits_model, validation).top1
    assert [entry["step"] for entry in found.history] == [16, 32]
    assert [entry["images"] for entry in found.history] == [512, 512]
    assert found.history[1]["loss"] < found.history[0]["loss"]
    assert (found.steps, found.resumed) == (32, 0)


def test_a_teacher_alone_teaches(digits_model: nn.Module, digits_images: Tensor) -> None:
    student = copy.deepcopy(digits_model)
    nn.init.normal_(student.head.weight, std=0.02)

    def agreement() -> float:
        with torch.inference_mode():
            return float((student(digits_images).argmax(1) == digits_model(digits_images).argmax(1)).double().mean())

    before = agreement()
    finetune(student, [digits_images[:32], digits_images[32:]], teacher=digits_model, alpha=1.0, epochs=12, lr=1e-3)
    assert before < 0.6 < 0.9 < agreement()


def test_same_seed_same_bits_and_another_seed_others() -> None:
    def train(seed: int) -> dict[str, Tensor]:
        model = tiny()
        torch.rand(7)  # the state of the caller's generator has no say
        finetune(model, batches(), epochs=2, seed=seed)
        return weights(model)

    assert same(train(1), train(1))
    assert not same(train(1), train(2))


def test_caller_keeps_generators_modes_and_teacher() -> None:
    model, teacher = tiny(), tiny()
    model.blocks[0].eval()
    teacher.train()
    teacher.blocks[1].eval()
    modes = [module.training for each in (model, teacher) for module in each.modules()]
    before = weights(teacher)
    flags = [parameter.requires_grad for parameter in teacher.parameters()]

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = draw()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    finetune(model, batches(), teacher=teacher)
    assert draw() == expected
    assert [module.training for each in (model, teacher) for module in each.modules()] == modes
    assert same(weights(teacher), before)
    assert [parameter.requires_grad for parameter in teacher.parameters()] == flags
    assert all(parameter.grad is None for each in (model, teacher) for parameter in each.parameters())


def test_teacher_answers_in_evaluation_mode() -> None:
    noisy = tiny(proj_drop_rate=0.9).train()
    first, second = (quiet() for _ in range(2))
    finetune(first, batches(), teacher=noisy, alpha=1.0)
    finetune(second, batches(), teacher=copy.deepcopy(noisy).eval(), alpha=1.0)
    assert same(weights(first), weights(second))


def test_frozen_parameters_stay() -> None:
    model = tiny()
    model.patch_embed.requires_grad_(False)
    before = weights(model)
    finetune(model, batches(), weight_decay=0.5, lr=0.01)
    after = weights(model)
    assert torch.equal(after["patch_embed.proj.weight"], before["patch_embed.proj.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_soft_targets() -> None:
    images, targets = batches(1)[0]
    first, second = quiet(), quiet()
    finetune(first, [(images, targets)], steps=3)
    finetune(second, [(images, functional.one_hot(targets, 3).float())], steps=3)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=1e-4, atol=1e-6)


class Distilled(nn.Module):
    """Has the interface of timm's models with a distillation token."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_dist = nn.Linear(4, 3), nn.Linear(4, 3)
        self.distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pooled = images.flatten(1)[:, :4]
        if self.distilled_training and self.training:
            return self.head(pooled), self.head_dist(pooled)
        return (self.head(pooled) + self.head_dist(pooled)) / 2


class Fixed(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def test_distilled_heads_learn_from_labels_and_from_the_teacher() -> None:
    torch.manual_seed(0)
    model = Distilled()
    images = torch.rand(16, 3, 2, 2)
    batch = (images, torch.zeros(16, dtype=torch.long))
    finetune(
        model, [batch], teacher=Fixed([0.0, 0.0, 9.0]), alpha=0.5, steps=300, lr=0.1, weight_decay=0, temperature=1
    )
    pooled = images.flatten(1)[:, :4]
    assert (model.head(pooled).argmax(1) == 0).all()  # labels say 0
    assert (model.head_dist(pooled).argmax(1) == 2).all()  # the teacher says 2
    assert not model.distilled_training
    # Without a teacher, and with one alone, both heads learn together.
    for arguments in ({}, {"teacher": Fixed([9.0, 0.0, 0.0]), "alpha": 1.0}):
        torch.manual_seed(0)
        model = Distilled()
        model.set_distilled_training(True)
        finetune(model, [batch], steps=300, lr=0.1, weight_decay=0, **arguments)
        assert model.distilled_training
        assert (model.eval()(images).argmax(1) == 0).all()
        assert (model.head(pooled) - model.head_dist(pooled)).abs().max() < 3.0


def test_timms_distilled_deit() -> None:
    model = tiny(name="deit_tiny_distilled_patch16_224")
    before = weights(model)
    finetune(model, batches(), teacher=tiny(), lr=0.01)
    after = weights(model)
    for name in ("head.weight", "head_dist.weight", "dist_token"):
        assert not torch.equal(after[name], before[name]), name
    assert not model.distilled_training


@pytest.mark.parametrize("bad", [2, 4])
def test_a_loss_that_is_not_finite_stops_before_the_step(bad: int) -> None:
    data = batches()
    good = tiny()
    expected = finetune(good, data[:bad], steps=bad, warmup=0, lr=1e-3, min_lr=1e-3)
    images, targets = data[bad]
    data[bad] = (images.clone(), targets)
    data[bad][0][1, 0, 0, 0] = math.nan
    model = tiny().train()
    with pytest.raises(
        NumericalError, match=rf"^loss: expected a finite value, got nan in step {bad + 1}; the weights"
    ):
        finetune(model, data, steps=5, warmup=0, lr=1e-3, min_lr=1e-3)
    assert expected.steps == bad
    assert same(weights(model), weights(good))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


class RootAtZero(nn.Module):
    """Has a finite value and an infinite gradient where its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight.sqrt().expand(len(images), -1)


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    model = RootAtZero()
    with pytest.raises(
        NumericalError, match=r"^gradient: expected a finite value, got (nan|inf) in step 1; the weights"
    ):
        finetune(model, batches(), clip_grad=None)
    assert torch.equal(model.weight.detach(), torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"epochs": 1, "steps": 1}, "steps: expected either epochs or steps, got epochs=1 and steps=1"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a number of more than 0, got 0.0"),
        ({"lr": math.nan}, "lr: expected a number of more than 0, got nan"),
        ({"min_lr": 1.0}, "min_lr: expected a number of at least 0 and at most 0.0005, got 1.0"),
        ({"warmup": 5}, "warmup: expected fewer than the 5 steps of the run, got 5"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number of at least 0, got -1.0"),
        ({"clip_grad": 0.0}, "clip_grad: expected a number of more than 0, got 0.0"),
        ({"temperature": 0.0}, "temperature: expected a number of more than 0, got 0.0"),
        ({"alpha": 1.5}, r"alpha: expected a fraction in \[0, 1\], got 1.5"),
        ({"alpha": 0.5}, "teacher: expected a model with alpha=0.5, got None"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a fraction in \[0, 1\), got -0.1"),
        ({"opt": "nothing"}, r"opt: expected an optimizer of timm.optim, got 'nothing' \(.*\)"),
        ({"checkpoint_every": 2}, "checkpoint_every: expected a resume file to write, got no resume"),
        ({"resume": "no/such/folder/run"}, "resume: expected a file in an existing folder, got no/such/folder/run"),
        ({"resume": "."}, r"resume: expected a file in an existing folder, got \."),
        ({"resume": ".", "checkpoint_every": "2"}, "checkpoint_every: expected an integer of at least 1, got '2'"),
        ({"steps": "3"}, "steps: expected an integer of at least 1, got '3'"),
        ({"steps": 1.5}, "steps: expected an integer of at least 1, got 1.5"),
        ({"lr": "x"}, "lr: expected a number of more than 0, got 'x'"),
        ({"alpha": "x"}, r"alpha: expected a fraction in \[0, 1\], got 'x'"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"warmup": 0.5}, "warmup: expected an integer of at least 0, got 0.5"),
        ({"warmup": -1}, "warmup: expected an integer of at least 0, got -1"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a fraction in \[0, 1\), got 1.0"),
        ({"mixup": -0.1}, "mixup: expected a number of at least 0, got -0.1"),
        ({"cutmix": "x"}, "cutmix: expected a number of at least 0, got 'x'"),
        ({"ema": 1.0}, r"ema: expected a fraction in \[0, 1\), got 1.0"),
        ({"amp": "half"}, "amp: expected 'bfloat16', 'float16' or None, got 'half'"),
        ({"amp": torch.bfloat16}, "amp: expected 'bfloat16', 'float16' or None, got torch.bfloat16"),
        ({"teacher": "vit"}, "teacher: expected an nn.Module, got str"),
        ({"device": "gpu"}, r"device: expected one that is there, got 'gpu' \(.*\)"),
    ],
)
def test_refusals(arguments: dict[str, object], text: str) -> None:
    model = tiny()
    before = weights(model)
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        finetune(model, batches(), **arguments)
    assert same(weights(model), before)


def test_refusals_about_models_and_loaders() -> None:
    model = tiny()
    before = weights(model)
    with pytest.raises(InvalidArgument, match=r"^teacher: expected another model than the one to train, got the same$"):
        finetune(model, batches(), teacher=model)
    with pytest.raises(InvalidArgument, match=r"^teacher: expected logits of shape \(4, 3\), got \(4, 5\)$"):
        finetune(model, batches(), teacher=tiny(num_classes=5))
    with pytest.raises(InvalidArgument, match=r"^loader: expected \(images, targets\), or alpha=1 .* alpha=0$"):
        finetune(model, [batches(1)[0][0]])
    with pytest.raises(InvalidArgument, match=r"^loader: expected \(images, targets\), or alpha=1 .* alpha=0.5$"):
        finetune(model, [batches(1)[0][0]], teacher=tiny())
    with pytest.raises(InvalidArgument, match=r"^loader: expected class indices from 0 to 2, got 3$"):
        finetune(model, [(batches(1)[0][0], torch.full((4,), 3))])
    with pytest.raises(InvalidArgument, match=r"^loader: expected at least one batch, got none$"):
        finetune(model, [])
    with pytest.raises(InvalidArgument, match=r"^steps: expected a number for a loader of unknown length, got None"):
        finetune(model, iter(batches()))
    assert same(weights(model), before)
    with pytest.raises(InvalidArgument, match=r"^loader: expected at least one image in every pass, got none$"):
        finetune(model, iter(batches()), steps=6)
    model.requires_grad_(False)
    with pytest.raises(InvalidArgument, match=r"^model: expected a parameter that requires a gradient, got none$"):
        finetune(model, batches())


def test_an_iterator_is_enough_for_the_steps_it_has() -> None:
    assert finetune(tiny(), iter(batches()), steps=4).steps == 4


def test_text_says_what_was_done() -> None:
    found = finetune(tiny(), batches(), epochs=2, val_loader=batches())
    assert str(found) == (
        f"10 steps, 2 epochs, loss {found.history[-1]['loss']:.4f}, top-1 {found.history[-1]['top1']:.2f} %"
    )


@pytest.mark.parametrize(
    ("dtype", "opt"),
    # Adam, and with it Muon's part for vectors, squares gradients to zero in float16.
    [
        (torch.float16, "momentum"),
        *((dtype, opt) for dtype in (torch.bfloat16, torch.float64) for opt in ("momentum", "muon")),
    ],
)
def test_models_of_every_precision(opt: str, dtype: torch.dtype) -> None:
    model, expected = quiet().to(dtype), quiet()
    before = weights(model)
    arguments = {"opt": opt, "lr": 1e-2, "epochs": 2, "val_loader": batches()}
    found = finetune(model, batches(), teacher=quiet(), **arguments)
    whole = finetune(expected, batches(), teacher=quiet(), **arguments)
    assert found.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=0.05)
    assert {tensor.dtype for tensor in weights(model).values()} == {dtype}
    assert not same(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_precision(dtype: torch.dtype) -> None:
    teacher = quiet()
    nn.init.normal_(teacher.head.weight)
    first, second = quiet(), quiet()
    expected = finetune(first, batches(), teacher=teacher, alpha=1.0).history[-1]["loss"]
    found = finetune(second, batches(), teacher=teacher.to(dtype), alpha=1.0).history[-1]["loss"]
    assert found == pytest.approx(expected, rel=0.05)
    assert {tensor.dtype for tensor in weights(second).values()} == {torch.float32}


def test_soft_targets_of_another_precision() -> None:
    images, targets = batches(1)[0]
    soft = functional.one_hot(targets, 3).double()
    assert math.isfinite(finetune(tiny(), [(images, soft)]).history[0]["loss"])


def test_an_optimizer_that_float16_is_too_narrow_for() -> None:
    model = quiet().half()
    before = weights(model)
    with pytest.raises(NumericalError, match=r"^weights: expected finite values, .* in step 1: adamw .* after step 0$"):
        finetune(model, batches(), opt="adamw")
    assert same(weights(model), before)


def test_images_of_another_size_are_refused() -> None:
    model = tiny()
    before = weights(model)
    with pytest.raises(InvalidArgument, match=r"^loader: expected images \(B, 3, 8, 8\), got \(4, 3, 12, 12\)$"):
        finetune(model, [(torch.zeros(4, 3, 12, 12), torch.zeros(4, dtype=torch.long))])
    assert same(weights(model), before)


def test_what_is_no_model() -> None:
    with pytest.raises(InvalidArgument, match=r"^model: expected an nn.Module, got str$"):
        finetune("vit", batches())  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"^model: expected a model with weights, got one on the meta device$"):
        finetune(tiny().to("meta"), batches())
    with pytest.raises(InvalidArgument, match=r"^model: expected the model alone, got it wrapped in DataParallel$"):
        finetune(nn.DataParallel(tiny()), batches())
    with pytest.raises(InvalidArgument, match=r"^amp: expected a model in float32, got cls_token in torch.bfloat16$"):
        finetune(tiny().bfloat16(), batches(), amp="float16")
    with pytest.raises(InvalidArgument, match=r"^teacher: expected a model with weights, got one on the meta device$"):
        finetune(tiny(), batches(), teacher=tiny().to("meta"))


def test_subnormal_gradients_cost_nothing_and_nothing_else_changes() -> None:
    """Behind sharp attention maps they are common; every thread must flush them, in the steps and there alone."""

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(_subnormals())
            return self.inner(x)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert _subnormals() == 1
        model = Watched(quiet())
        finetune(model, batches(2), val_loader=batches(1))
        assert model.seen == [0, 0, 1]
        assert _subnormals() == 1
    finally:
        torch.set_num_threads(before)


def _subnormals() -> float:
    """Share of a tensor's elements, many enough for all threads, that arithmetic leaves in the subnormal range."""
    return float((torch.full((1 << 17,), 1e-39) * 1.0 != 0).double().mean())


def test_none_is_no_end_of_a_pass() -> None:
    first, second = batches(2)
    with pytest.raises(InvalidArgument, match="^loader: expected batches of images"):
        finetune(quiet(), [first, None, second], steps=2)
