"""Training after the cut, with the dense model as teacher where there is one; resumable to the bit."""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from . import check, container, generators
from .data import images_in, model_input, split_batch
from .errors import InvalidArgument, NumericalError, Unsupported
from .evaluate import borrowed, check_targets, evaluate, full_precision, place_for
from .progress import progress

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["FinetuneResult", "finetune"]

_KIND = "fine-tuning"


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    ``history`` has one entry for each pass over the loader: ``epoch``, ``step`` (steps done at its end), ``loss``
    (mean over its images, in nats), ``lr`` (of the last step), ``images``, and with a validation loader ``top1``,
    ``top5`` (percent) and ``val_loss``. ``resumed`` is the step that a checkpoint brought, 0 without one.
    """

    steps: int
    history: list[dict[str, float]]
    resumed: int = 0

    def __str__(self) -> str:
        last = self.history[-1] if self.history else {}
        validation = f", top-1 {last['top1']:.2f} %" if "top1" in last else ""
        return (
            f"{self.steps:,} steps, {len(self.history)} epochs, loss {last.get('loss', float('nan')):.4f}{validation}"
        )


@dataclass(frozen=True)
class _Settings:
    """What must not change between a checkpoint and its continuation."""

    steps: int
    opt: str
    lr: float
    min_lr: float
    warmup: int
    weight_decay: float
    clip_grad: float | None
    distilled: bool
    temperature: float
    alpha: float
    label_smoothing: float
    seed: int


@dataclass
class _Progress:
    """Where a run is: ``batch`` batches into ``epoch``, whose losses so far sum to ``loss`` over ``images``."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    images: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    opt: str = "adamw",
    lr: float = 5e-4,
    min_lr: float | None = None,
    warmup: int | None = None,
    weight_decay: float = 0.05,
    clip_grad: float | None = 1.0,
    temperature: float = 2.0,
    alpha: float | None = None,
    label_smoothing: float = 0.0,
    val_loader: Iterable[Any] | None = None,
    resume: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> FinetuneResult:
    """Train a model in place, by default for one pass, on labels, on a teacher's logits, or on both.

    The loss is ``(1 - alpha) * cross entropy + alpha * T**2 * KL(teacher || model)`` on logits divided by the
    temperature T (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531). A model with a distillation token (DeiT) learns as
    its paper has it (Touvron et al., 2021, arXiv:2012.12877): the class head from the labels, the distillation head
    from the teacher; without a teacher, or with an ``alpha`` of 0 or 1, the loss is taken on the mean of the two
    heads, which is what the model answers with at inference.

    Models are left in the mode and on the device they came in; the teacher is not changed at all. The caller's random
    generators are put back.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes). Parameters that do not require a gradient stay. It is
            trained in the type it has; images are cast to it, and losses taken in float32 or better. float16 is too
            narrow for the squared gradients of Adam and its like; bfloat16 and float32 are not.
        loader: batches of images or (images, targets, ...), targets (B,) class indices or (B, classes) probabilities.
            A loader with ``set_epoch`` is told the number of each pass.
        teacher: gives logits of the same shape; the dense model, usually.
        epochs: passes over the loader, which then needs a length. One of ``epochs`` and ``steps``, or none for one.
        steps: optimizer steps, over as many passes as they take.
        opt: an optimizer that timm.optim knows.
        lr: the highest learning rate, after the warm-up.
        min_lr: where the cosine ends; a hundredth of ``lr`` by default.
        warmup: steps of linear warm-up, of the total; a twentieth by default.
        weight_decay: not applied to biases, norms and what the model lists in ``no_weight_decay``.
        clip_grad: the largest norm of the whole gradient; None for no limit.
        temperature: T.
        alpha: the teacher's share in the loss, in [0, 1]; 0.5 by default with a teacher. A loader without targets
            needs 1.
        label_smoothing: in [0, 1).
        val_loader: evaluated after each pass.
        resume: the checkpoint file. Where it exists, training continues from it, and ends with the same bits as a run
            that was never interrupted: the model must come as it came to the first call, with the same teacher, batches
            and settings. It is written every ``checkpoint_every`` steps and at the end.
        checkpoint_every: in steps; None writes at the end alone.
        seed: of order, augmentation, dropout and stochastic depth.
        device: where to train; the model's own by default.

    Raises:
        InvalidArgument: an argument or a batch is not as described, or the checkpoint is damaged or of another run.
        NumericalError: the loss or the gradient is NaN or infinite; the weights are those of the last good step.
    """
    place = place_for(model, device)
    if teacher is not None:
        place_for(teacher, argument="teacher")
    total = _total_steps(loader, epochs, steps)
    lr = check.number("lr", lr, open_low=True)
    settings = _Settings(
        steps=total,
        opt=opt,
        lr=lr,
        min_lr=check.number("min_lr", lr / 100 if min_lr is None else min_lr, high=lr),
        warmup=total // 20 if warmup is None else check.integer("warmup", warmup, 0),
        weight_decay=check.number("weight_decay", weight_decay),
        clip_grad=None if clip_grad is None else check.number("clip_grad", clip_grad, open_low=True),
        distilled=teacher is not None,
        temperature=check.number("temperature", temperature, open_low=True),
        alpha=check.fraction("alpha", (0.0 if teacher is None else 0.5) if alpha is None else alpha),
        label_smoothing=check.fraction("label_smoothing", label_smoothing, open_high=True),
        seed=check.integer("seed", seed, 0),
    )
    if settings.warmup >= total:
        raise InvalidArgument(f"warmup: expected fewer than the {total} steps of the run, got {settings.warmup}")
    if teacher is model:
        raise InvalidArgument("teacher: expected another model than the one to train, got the same")
    if teacher is None and settings.alpha > 0:
        raise InvalidArgument(f"teacher: expected a model with alpha={settings.alpha:g}, got None")
    checkpoint_every = check.integer("checkpoint_every", checkpoint_every, optional=True)
    if checkpoint_every is not None and resume is None:
        raise InvalidArgument("checkpoint_every: expected a resume file to write, got no resume")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidArgument("model: expected a parameter that requires a gradient, got none")
    path = None if resume is None else check.writable("resume", resume)
    origin = None if path is None else _origin(model, teacher, loader)

    with generators.kept(*_cuda_devices()), _heads_apart(model, settings), borrowed(model, place, training=True):
        optimizer = _optimizer(model, settings)
        run = _Run(model, teacher, optimizer, settings, place, origin)
        resumed = run.load(path) if path is not None and path.is_file() else 0
        try:
            with torch.enable_grad(), nullcontext() if teacher is None else borrowed(teacher, place):
                run.train(loader, val_loader, path, checkpoint_every)
        finally:
            optimizer.zero_grad()
    return FinetuneResult(run.at.step, run.at.history, resumed)


class _Run:
    """One run: model, optimizer and position, which a checkpoint holds together."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        settings: _Settings,
        place: torch.device,
        origin: Mapping[str, Any] | None,
    ) -> None:
        self.at = _Progress()
        self._model = model
        self._teacher = teacher
        self._optimizer = optimizer
        self._settings = settings
        self._place = place
        self._origin = origin
        self._generators: Any = None
        self._schedule = CosineLRScheduler(
            optimizer,
            t_initial=settings.steps - settings.warmup,
            lr_min=settings.min_lr,
            warmup_t=settings.warmup,
            warmup_lr_init=settings.lr / (settings.warmup + 1),
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def train(
        self, loader: Iterable[Any], val_loader: Iterable[Any] | None, path: Path | None, every: int | None
    ) -> None:
        """Go on from where the run is to its last step."""
        at, steps = self.at, self._settings.steps
        with progress(steps, "finetune", unit="steps") as advance:
            advance(at.step)
            begun = at.step
            while at.step < steps:
                for batch in self._pass(loader):
                    loss = self._step(batch)
                    advance(1, note=f"loss {loss:.4f}")
                    if at.step == steps:
                        break
                    if path is not None and every is not None and at.step % every == 0:
                        self.save(path)
                self._close_epoch(val_loader)
            if path is not None and begun < steps:
                self.save(path)

    def _pass(self, loader: Iterable[Any]) -> Iterator[Any]:
        at, skip = self.at, self.at.batch
        _seed_generators(self._settings.seed, at.epoch)
        if hasattr(loader, "set_epoch"):
            # secateur's own loader can leave out what was used without decoding it.
            if skip and hasattr(loader, "description"):
                loader.set_epoch(at.epoch, skip)
                skip = 0
            else:
                loader.set_epoch(at.epoch)
        batches = iter(loader)
        for _ in range(skip):
            next(batches, None)
        if self._generators is not None:
            generators.put(self._generators, self._place)
            self._generators = None
        yield from batches
        if at.batch == 0:
            raise InvalidArgument("loader: expected at least one batch in every pass, got none")

    def _step(self, batch: Any) -> float:
        at, settings = self.at, self._settings
        images, targets = split_batch(batch)
        loss = self._loss(images, None if targets is None else targets.to(self._place))
        value = float(loss.detach())
        self._finite("loss", value)
        self._optimizer.zero_grad()
        loss.backward()
        limit = float("inf") if settings.clip_grad is None else settings.clip_grad
        norm = nn.utils.clip_grad_norm_([p for p in self._model.parameters() if p.grad is not None], limit)
        self._finite("gradient", float(norm))
        self._schedule.step_update(at.step)
        narrow = [p for p in self._model.parameters() if p.dtype == torch.float16 and p.grad is not None]
        before = [p.detach().clone() for p in narrow]
        self._optimizer.step()
        # Squared gradients and Adam's epsilon are zero in float16.
        if not all(bool(p.isfinite().all()) for p in narrow):
            with torch.no_grad():
                for parameter, value_before in zip(narrow, before, strict=True):
                    parameter.copy_(value_before)
            raise NumericalError(
                f"weights: expected finite values, got nan or inf in step {at.step + 1}: {settings.opt} needs more "
                f"than float16; the weights are those after step {at.step}"
            )
        at.step += 1
        at.batch += 1
        at.loss += value * len(images)
        at.images += len(images)
        return value

    def _loss(self, images: Tensor, targets: Tensor | None) -> Tensor:
        settings = self._settings
        output = self._model(model_input(self._model, images, self._place))
        # Two heads only when `_heads_apart` asked for them.
        heads = output if isinstance(output, tuple) and len(output) == 2 else (output, output)
        student, pupil = (full_precision(head) for head in heads)
        if targets is None and settings.alpha < 1:
            raise InvalidArgument(
                "loader: expected (images, targets), or alpha=1 and a teacher for images alone, "
                f"got images alone with alpha={settings.alpha:g}"
            )
        loss: Tensor = student.new_zeros(())
        if settings.alpha < 1 and targets is not None:
            check_targets(targets, student, soft=True)
            targets = targets.to(student.dtype) if targets.is_floating_point() else targets
            hard = functional.cross_entropy(student, targets, label_smoothing=settings.label_smoothing)
            loss = loss + (1 - settings.alpha) * hard
        if self._teacher is not None and settings.alpha > 0:
            # Not inference mode: its tensors cannot be kept for the backward pass.
            with torch.no_grad():
                wanted = self._teacher(model_input(self._teacher, images, self._place))
            if not isinstance(wanted, Tensor) or wanted.shape != pupil.shape:
                got = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
                raise InvalidArgument(f"teacher: expected logits of shape {tuple(pupil.shape)}, got {got}")
            loss = loss + settings.alpha * _distillation(pupil, wanted.to(pupil.dtype), settings.temperature)
        return loss

    def _finite(self, what: str, value: float) -> None:
        if not np.isfinite(value):
            raise NumericalError(
                f"{what}: expected a finite value, got {value} in step {self.at.step + 1}; "
                f"the weights are those after step {self.at.step}"
            )

    def _close_epoch(self, val_loader: Iterable[Any] | None) -> None:
        at = self.at
        entry: dict[str, float] = {
            "epoch": at.epoch,
            "step": at.step,
            "loss": at.loss / at.images,
            "lr": max(float(group["lr"]) for group in self._optimizer.param_groups),
            "images": at.images,
        }
        if val_loader is not None:
            found = evaluate(self._model, val_loader)
            entry |= {"top1": found.top1, "top5": found.top5, "val_loss": found.loss}
        at.history.append(entry)
        at.epoch, at.batch, at.loss, at.images = at.epoch + 1, 0, 0.0, 0

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        tensors = {f"model.{name}": tensor for name, tensor in _state(self._model).items()}
        rest = {"optimizer": self._optimizer.state_dict(), "generators": generators.get(self._place)}
        header = {
            "origin": self._origin,
            "settings": asdict(self._settings),
            "progress": asdict(self.at),
            "rest": {key: _pack(value, tensors, key) for key, value in rest.items()},
        }
        container.write(path, _KIND, header, tensors)

    def load(self, path: Path) -> int:
        """Take up a checkpoint and return its step; nothing is changed unless all of it fits."""
        header, tensors = container.read(path, _KIND)
        for name, value in asdict(self._settings).items():
            if header["settings"][name] != value:
                raise InvalidArgument(
                    f"resume: expected a checkpoint of this run, got one with {name}={header['settings'][name]!r} "
                    f"where it is {value!r} now"
                )
        model = _state(self._model)
        found = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        for name in sorted(model.keys() | found.keys()):
            shapes = [tuple(state[name].shape) if name in state else None for state in (found, model)]
            if shapes[0] != shapes[1]:
                raise InvalidArgument(
                    f"resume: expected a checkpoint of this model, got {name} of shape {shapes[0]} "
                    f"where the model has {shapes[1]}"
                )
        self._require(header.get("origin") or {})
        rest = {key: _unpack(value, tensors) for key, value in header["rest"].items()}
        try:
            self._optimizer.load_state_dict(rest["optimizer"])
        except ValueError as error:  # raised before anything is loaded
            raise InvalidArgument(
                f"resume: expected a checkpoint of the parameters that require a gradient, got others ({error})"
            ) from error
        with torch.no_grad():
            for name, tensor in model.items():
                tensor.copy_(found[name])
        self.at = _Progress(**header["progress"])
        self._generators = rest["generators"]
        return self.at.step

    def _require(self, found: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that began with other weights, another teacher or other batches."""
        mine = self._origin or {}
        for name in ("model", "teacher"):
            if found.get(name) != mine.get(name):
                raise InvalidArgument(
                    f"resume: expected a checkpoint that began with this {name}, got one whose {name} had other weights"
                )
        for name in ("batches", "batch_size", "images"):
            before, now = found.get(name), mine.get(name)
            # A loader need not know.
            if before is not None and now is not None and before != now:
                raise InvalidArgument(
                    f"resume: expected a checkpoint of this loader, got one with {name}={before} where it is {now} now"
                )


def _origin(model: nn.Module, teacher: nn.Module | None, loader: Iterable[Any]) -> dict[str, Any]:
    """Return what a run begins with: digests of the weights, and what the loader tells of its batches."""
    batch_size = getattr(loader, "batch_size", None)
    return {
        "model": _digest(model),
        "teacher": None if teacher is None else _digest(teacher),
        "batches": _length(loader),
        "batch_size": batch_size if isinstance(batch_size, int) else None,
        "images": images_in(loader),
    }


def _digest(model: nn.Module) -> str:
    state = _state(model)
    lines = [f"{name} {state[name].dtype} {value}" for name, value in container.digests(state).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher || student) at temperature T, the mean over images of logits (B, classes)."""
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    result: Tensor = temperature**2 * divergence
    return result


def _total_steps(loader: Iterable[Any], epochs: int | None, steps: int | None) -> int:
    if epochs is not None and steps is not None:
        raise InvalidArgument(f"steps: expected either epochs or steps, got epochs={epochs} and steps={steps}")
    steps = check.integer("steps", steps, optional=True)
    epochs = check.integer("epochs", epochs, optional=True)
    if steps is not None:
        return steps
    length = _length(loader)
    if length is None:
        raise InvalidArgument("steps: expected a number for a loader of unknown length, got None")
    if length < 1:
        raise InvalidArgument("loader: expected at least one batch, got none")
    return length * (1 if epochs is None else epochs)


def _optimizer(model: nn.Module, settings: _Settings) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InvalidArgument(f"opt: expected an optimizer of timm.optim, got {settings.opt!r} ({error})") from error


@contextmanager
def _heads_apart(model: nn.Module, settings: _Settings) -> Iterator[None]:
    """Have a model with a distillation token return both heads while each has a loss of its own."""
    if not hasattr(model, "set_distilled_training"):
        yield
        return
    choose: Callable[[bool], None] = model.set_distilled_training  # type: ignore[assignment]
    before = bool(model.distilled_training)
    choose(settings.distilled and 0 < settings.alpha < 1)
    try:
        yield
    finally:
        choose(before)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and all buffers, those that state_dict leaves out as well."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _seed_generators(seed: int, epoch: int) -> None:
    value = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.manual_seed(value)


def _cuda_devices() -> list[torch.device]:
    """Return all devices whose generators a run may move: those of a process that uses CUDA."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Turn nested values into JSON that keeps tuples and integer keys; tensors become entries of ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise Unsupported(f"opt: expected an optimizer whose state can be saved, got a {type(value).__name__} in {name}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
