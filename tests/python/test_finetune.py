from __future__ import annotations

import copy
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from secateur.data import ImageLoader, loader
from secateur.errors import InvalidArgument, NumericalError
from secateur.evaluate import evaluate
from secateur.finetune import FinetuneResult, finetune
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def tiny(**arguments: object) -> nn.Module:
    """Build a ViT of 5 tokens with dropout and stochastic depth, so that a lost generator state shows."""
    torch.manual_seed(3)
    chosen = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    noise = {"proj_drop_rate": 0.2, "drop_path_rate": 0.2}
    name = arguments.pop("name", "vit_tiny_patch16_224")
    return timm.create_model(name, **{**chosen, **noise, **arguments})


def quiet(**arguments: object) -> nn.Module:
    return tiny(proj_drop_rate=0.0, drop_path_rate=0.0, **arguments)


def batches(count: int = 5, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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
    assert before < 0.6 < 0.95 < agreement()


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


class Killed(Exception):
    pass


class Breaking:
    """A loader that stops the process, or so it seems, before a certain batch."""

    def __init__(self, source: object, after: int) -> None:
        self.source, self.left = source, after

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> object:
        if name in ("set_epoch", "description") and hasattr(self.source, name):
            return getattr(self.source, name)
        raise AttributeError(name)

    def __iter__(self) -> object:
        for batch in self.source:
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield batch


def image_source(kind: str) -> object:
    if kind == "list":
        return batches()
    if kind == "torch":
        images, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
        return DataLoader(TensorDataset(images, targets), batch_size=4, shuffle=True)
    return loader("digits", tiny(num_classes=10), train=True, shuffle=True, batch_size=4, max_images=20)


@pytest.mark.parametrize("kind", ["list", "torch", "secateur"])
@pytest.mark.parametrize(("every", "after"), [(3, 3), (3, 7), (5, 9), (5, 5), (2, 13)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, kind: str, every: int, after: int) -> None:
    def train(source: object, **arguments: object) -> tuple[dict[str, Tensor], FinetuneResult]:
        model = tiny(num_classes=10)
        result = finetune(model, source, teacher=tiny(num_classes=10), steps=14, seed=4, **arguments)
        return weights(model), result

    expected, whole = train(image_source(kind))
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train(Breaking(image_source(kind), after), resume=path, checkpoint_every=every)
    torch.rand(3)
    found, resumed = train(image_source(kind), resume=path, checkpoint_every=every)
    assert same(found, expected)
    assert resumed.history == whole.history
    assert resumed.resumed == after // every * every
    assert [entry["step"] for entry in whole.history] == [5, 10, 14]
    # Once more is no more training.
    again, done = train(Breaking(image_source(kind), 0), resume=path)
    assert same(again, expected)
    assert (done.resumed, done.history) == (14, whole.history)


@pytest.mark.parametrize("opt", ["sgd", "adamw", "muon", "lion", "adafactor"])
def test_resuming_holds_for_optimizers_of_every_kind(tmp_path: Path, opt: str) -> None:
    expected, model = tiny(), tiny()
    finetune(expected, batches(), epochs=2, opt=opt, lr=1e-3)
    path = tmp_path / "run.safetensors"
    arguments = {"epochs": 2, "opt": opt, "lr": 1e-3, "resume": path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        finetune(model, Breaking(batches(), 7), **arguments)
    model = tiny()
    assert finetune(model, batches(), **arguments).resumed == 6
    assert same(weights(model), weights(expected))


def test_buffers_are_in_the_checkpoint(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))

    expected, model = build(), build()
    finetune(expected, batches(), epochs=2)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        finetune(model, Breaking(batches(), 7), epochs=2, resume=path, checkpoint_every=4)
    model = build()
    finetune(model, batches(), epochs=2, resume=path)
    assert same(weights(model), weights(expected))
    assert int(model[1].num_batches_tracked) == 10


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_finetune import tiny, batches
from secateur.finetune import finetune

class Kill(list):
    seen = 0
    def __iter__(self):
        for batch in list.__iter__(self):
            if Kill.seen == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            Kill.seen += 1
            yield batch

finetune(tiny(), Kill(batches()), epochs=4, resume={path!r}, checkpoint_every=5)
"""


def test_a_killed_process_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    code = SCRIPT.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["run.safetensors"]
    expected, model = tiny(), tiny()
    finetune(expected, batches(), epochs=4)
    assert finetune(model, batches(), epochs=4, resume=path).resumed == 10
    assert same(weights(model), weights(expected))


def interrupted(path: Path) -> Path:
    with pytest.raises(Killed):
        finetune(tiny(), Breaking(batches(), 3), resume=path, checkpoint_every=2)
    return path


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"lr": 1e-3}, r"got one with lr=0.0005 where it is 0.001 now"),
        ({"seed": 1}, r"got one with seed=0 where it is 1 now"),
        ({"steps": 9}, r"got one with steps=5 where it is 9 now"),
        ({"opt": "lion"}, r"got one with opt='adamw' where it is 'lion' now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, arguments: dict[str, object], text: str) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    model = tiny()
    before = weights(model)
    with pytest.raises(InvalidArgument, match=f"^resume: expected a checkpoint of this run, {text}$"):
        finetune(model, batches(), resume=path, **arguments)
    assert same(weights(model), before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    with pytest.raises(
        InvalidArgument, match=r"^resume: expected a checkpoint of this model, got blocks.1.attn.proj.bias"
    ):
        finetune(tiny(depth=1), batches(), resume=path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    whole = path.read_bytes()
    model = tiny()
    before = weights(model)
    for damaged in (whole[:-100], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b"no file of ours"):
        path.write_bytes(damaged)
        with pytest.raises(InvalidArgument):
            finetune(model, batches(), resume=path)
    assert same(weights(model), before)


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
    with pytest.raises(InvalidArgument, match=r"^loader: expected at least one batch in every pass, got none$"):
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
    with pytest.raises(InvalidArgument, match=r"^teacher: expected a model with weights, got one on the meta device$"):
        finetune(tiny(), batches(), teacher=tiny().to("meta"))


def nudged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] += 1e-6
    return model


def pairs(count: int = 20, batch_size: int = 4) -> object:
    images, targets = (torch.cat(parts)[:count] for parts in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


@pytest.mark.parametrize(
    ("model", "teacher", "source", "text"),
    [
        (lambda: nudged(tiny()), tiny, pairs, "that began with this model, got one whose model had other weights"),
        (tiny, lambda: nudged(tiny()), pairs, "that began with this teacher, got one whose teacher had other weights"),
        (tiny, tiny, lambda: pairs(batch_size=2), "of this loader, got one with batches=5 where it is 10 now"),
        (tiny, tiny, lambda: pairs(12), "of this loader, got one with batches=5 where it is 3 now"),
        (tiny, tiny, lambda: pairs(18), "of this loader, got one with images=20 where it is 18 now"),
        (tiny, tiny, lambda: pairs(5, 1), "of this loader, got one with batch_size=4 where it is 1 now"),
    ],
)
def test_a_checkpoint_that_began_otherwise_is_refused(
    tmp_path: Path,
    model: Callable[[], nn.Module],
    teacher: Callable[[], nn.Module],
    source: Callable[[], object],
    text: str,
) -> None:
    path = tmp_path / "run.safetensors"
    finetune(tiny(), pairs(), teacher=tiny(), steps=4, resume=path)
    assert finetune(tiny(), pairs(), teacher=tiny(), steps=4, resume=path).resumed == 4
    student = model()
    before = weights(student)
    with pytest.raises(InvalidArgument, match=f"^resume: expected a checkpoint {text}$"):
        finetune(student, source(), teacher=teacher(), steps=4, resume=path)
    assert same(weights(student), before)


def test_a_checkpoint_of_other_frozen_parameters_is_refused(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    model = tiny()
    model.patch_embed.requires_grad_(False)
    before = weights(model)
    with pytest.raises(InvalidArgument, match=r"^resume: expected a checkpoint of the parameters that require"):
        finetune(model, batches(), resume=path)
    assert same(weights(model), before)
