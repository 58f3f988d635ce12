"""Fine-tunes a pruned model, optionally with the dense model as teacher; runs can be resumed to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .. import check
from ..data.loader import ImageLoader, refuse_single, refuse_unlabelled
from ..errors import InvalidArgument, Unsupported
from ..runtime import generators
from ..runtime.devices import borrowed, place_for
from ..runtime.ranks import joined
from . import checkpoint as resumption
from .checkpoint import Settings
from .hooks import Hooks
from .loop import Run

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from .hooks import LoopHook

__all__ = ["FinetuneResult", "finetune"]

_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a run.

    ``history`` has one entry for each pass over the loader: ``epoch``, ``step`` (steps done at its end), ``loss`` (mean
    over its images, in nats), ``lr`` (of the last step), ``images`` (of all ranks), and with a validation loader
    ``top1``, ``top5`` (percent) and ``val_loss``. With a loader that may skip images, it also has ``unreadable``, the
    number of images skipped in the pass by all ranks; a pass that ends before its first image has no entry. ``resumed``
    is the step of the checkpoint that the run continued from, or 0.
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
    mixup: float = 0.0,
    cutmix: float = 0.0,
    ema: float | None = None,
    amp: str | None = None,
    val_loader: Iterable[Any] | None = None,
    resume: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    hooks: Iterable[LoopHook] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> FinetuneResult:
    """Train a model in place, by default for one pass, on labels, on a teacher's logits, or on both.

    The loss is ``(1 - alpha) * cross entropy + alpha * T**2 * KL(teacher || model)`` on logits divided by the
    temperature T (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531). A model with a distillation token (DeiT) is
    trained as in its paper (Touvron et al., 2021, arXiv:2012.12877): the class head on the labels, the distillation
    head on the teacher; without a teacher, or with an ``alpha`` of 0 or 1, the loss is taken on the mean of the two
    heads, which is the model's output at inference.

    The modes and devices of both models are restored afterwards; the teacher is not changed at all. The caller's random
    generators are restored, and weights cached by a caller's ``torch.autocast`` are dropped. Steps on a CPU treat
    subnormal numbers as zero.

    Under torchrun, or in any initialised process group, all ranks must call this with the same arguments. Each trains
    on its own batches; gradients are averaged over the images of all of them (torch's DistributedDataParallel: every
    parameter that requires a gradient must be used in every forward pass), all start from the first rank's weights and
    end with the same. Only the first rank validates, writes and shows progress. An error on one rank ends the run on
    all; so does a rank that does not answer for an hour, even while the first rank validates. Without a process group,
    one is made from torchrun's environment (gloo, with nccl if there are GPUs) and destroyed at the end.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes). Parameters that do not require a gradient are not
            changed. The model is trained in its own type; images are cast to it, and losses are computed in float32 or
            better. float16 is too narrow for the squared gradients of Adam and similar optimizers; bfloat16 and float32
            are not.
        loader: batches of images or (images, targets, ...), targets (B,) class indices or (B, classes) probabilities. A
            loader with ``set_epoch`` is told the number of each pass. On several ranks, a loader made by `data.loader`
            is divided among them (`ImageLoader.sharded`); any other must yield different images on each rank, and the
            same number of batches. Images that a `data.loader` skips (``max_unreadable``, in each pass of each rank)
            make a batch smaller: the gradient is the mean over the remaining images of all ranks. Steps and learning
            rates are not affected; a step without any image changes nothing.
        teacher: returns logits of the same shape; usually the dense model.
        epochs: passes over the loader, which then needs a length. Give ``epochs`` or ``steps``, or neither for one
            pass.
        steps: optimizer steps, over as many passes as needed.
        opt: name of an optimizer in timm.optim.
        lr: the highest learning rate, after the warm-up.
        min_lr: the learning rate at the end of the cosine; a hundredth of ``lr`` by default.
        warmup: steps of linear warm-up, included in the total; a twentieth of it by default.
        weight_decay: not applied to biases, norms and the parameters that the model lists in ``no_weight_decay``.
        clip_grad: the largest allowed norm of the whole gradient; None for no limit.
        temperature: the temperature T of the distillation loss.
        alpha: the teacher's weight in the loss, in [0, 1]; 0.5 by default with a teacher. A loader without targets
            needs 1.
        label_smoothing: in [0, 1).
        mixup: alpha of mixup (Zhang et al., 2018, arXiv:1710.09412), 0 for none. The teacher sees the mixed images.
            The last image of an odd batch stays whole.
        cutmix: alpha of cutmix (Yun et al., 2019, arXiv:1905.04899), 0 for none; with both, each batch draws one.
        ema: decay in [0, 1) of a moving average of weights and buffers, taken after each step; the model ends with the
            average. Step n decays by no more than 1 - n**(-2/3), so that short runs forget the initial weights. None
            for no average. After an error, the model has the trained weights, not their average.
        amp: "bfloat16" or "float16": forward passes of model and teacher under torch.autocast, with losses and
            weights in float32, which the model must have; validation is in full precision. With float16 the loss is
            scaled by torch.amp.GradScaler: a step whose gradient overflows counts but changes nothing but the scale.
        val_loader: batches to evaluate after each pass, on the average if there is ``ema``.
        resume: the checkpoint file. If it exists, training continues from it, and ends with the same bits as an
            uninterrupted run, provided that the model has its original weights and that teacher, batches, settings and
            number of ranks are the same; all ranks must see the file. On a GPU the bits are the same only if torch's
            kernels are deterministic (``torch.use_deterministic_algorithms``), because fused attention sums gradients
            in any order. The file is written every ``checkpoint_every`` steps and at the end, and holds the trained
            weights and their average.
        checkpoint_every: number of steps between checkpoints; None writes only at the end.
        hooks: objects that take part in each step, in this order, such as a trained method; see `LoopHook`. Checkpoints
            hold their state, and are refused if a hook or its settings differ. ``loss`` in the history includes their
            terms. They release the model before this function returns or raises.
        seed: the seed of order, augmentation, dropout and stochastic depth.
        device: where to train; the model's own by default. On several ranks "cuda" is the GPU of LOCAL_RANK.

    Raises:
        InvalidArgument: an argument or a batch is not as described, more images are unreadable than the loader allows,
            or the checkpoint is damaged or belongs to another run.
        Unsupported: the state of the optimizer or of a hook cannot be saved, the loader's data cannot be divided among
            ranks, or a hook refuses the model.
        NumericalError: the loss or the gradient is NaN or infinite (with a GradScaler, the gradient at a scale of 1);
            the weights are those of the last good step.
        Error: another rank raised an error that is not secateur's.
    """
    with joined() as ranks:
        with ranks.together():
            if isinstance(model, (DataParallel, DistributedDataParallel)):
                raise InvalidArgument(f"model: expected the model alone, got it wrapped in {type(model).__name__}")
            place = place_for(model, ranks.device(device))
            if ranks.size > 1 and place.type not in ("cpu", "cuda"):
                raise Unsupported(f"device: expected cpu or cuda on several ranks, got {place}")
            if teacher is not None:
                place_for(teacher, argument="teacher")
            refuse_wrapped(loader)
            refuse_single(loader)
            attached = Hooks(hooks)
            if isinstance(val_loader, Iterator):
                raise InvalidArgument("val_loader: expected batches that can be read after every pass, got an iterator")
            if ranks.size > 1 and isinstance(loader, ImageLoader):
                loader = loader.sharded(ranks.rank, ranks.size)
            total = _total_steps(loader, epochs, steps)
            lr = check.number("lr", lr, open_low=True)
            settings = Settings(
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
                mixup=check.number("mixup", mixup),
                cutmix=check.number("cutmix", cutmix),
                ema=None if ema is None else check.fraction("ema", ema, open_high=True),
                amp=_half(amp, model, place),
                ranks=ranks.size,
                seed=check.integer("seed", seed, 0),
            )
            if settings.warmup >= total:
                raise InvalidArgument(
                    f"warmup: expected fewer than the {total} steps of the run, got {settings.warmup}"
                )
            if teacher is model:
                raise InvalidArgument("teacher: expected another model than the one to train, got the same")
            if teacher is None and settings.alpha > 0:
                raise InvalidArgument(f"teacher: expected a model with alpha={settings.alpha:g}, got None")
            if settings.alpha < 1:
                refuse_unlabelled(loader)
            checkpoint_every = check.integer("checkpoint_every", checkpoint_every, optional=True)
            if checkpoint_every is not None and resume is None:
                raise InvalidArgument("checkpoint_every: expected a resume file to write, got no resume")
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise InvalidArgument("model: expected a parameter that requires a gradient, got none")
            path = None if resume is None else check.writable("resume", resume)
            # The other ranks are about to get the first rank's weights.
            origin = None if path is None or ranks.rank > 0 else resumption.origin(model, teacher, loader)
        written = path is not None and path.is_file()
        ranks.agree(
            model=_layout(model),
            resume=written,
            checkpoint_every=checkpoint_every,
            max_unreadable=getattr(loader, "max_unreadable", 0),
            **asdict(settings),
            hooks=attached.settings,
        )

        with (
            generators.kept(*_cuda_devices()),
            _heads_apart(model, settings),
            borrowed(model, place, training=True),
            attached.hold(model, ranks),
        ):
            with ranks.together():
                optimizer = _optimizer(model, settings, attached)
            run = Run(model, teacher, optimizer, settings, place, origin, ranks, attached)
            with ranks.together():
                resumed = run.load(path) if path is not None and written else 0
            ranks.agree(resume=resumed)
            try:
                with torch.enable_grad(), nullcontext() if teacher is None else borrowed(teacher, place):
                    run.train(loader, val_loader, path, checkpoint_every)
            finally:
                optimizer.zero_grad()
        return FinetuneResult(run.at.step, run.at.history, resumed)


def refuse_wrapped(loader: object, argument: str = "loader") -> None:
    """Refuse a wrapper around a loader that skips images: wrapped, it would not show the empty batches.

    Raises:
        InvalidArgument: the loader is not made by `data.loader` but has its ``max_unreadable``.
    """
    limit = getattr(loader, "max_unreadable", 0)
    if limit and not isinstance(loader, ImageLoader):
        raise InvalidArgument(
            f"{argument}: expected one of data.loader itself with max_unreadable={limit}, "
            f"got it wrapped in {type(loader).__name__}"
        )


def _half(amp: object, model: nn.Module, place: torch.device) -> str | None:
    """Return the type for autocast, checked against the model and the device."""
    if amp is None:
        return None
    if not isinstance(amp, str) or amp not in _HALF:
        raise InvalidArgument(f"amp: expected 'bfloat16', 'float16' or None, got {amp!r}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InvalidArgument(f"amp: expected a model in float32, got {name} in {parameter.dtype}")
    if not torch.amp.is_autocast_available(place.type):
        raise InvalidArgument(f"amp: expected a device that torch.autocast knows, got {place.type}")
    return amp


def _layout(model: nn.Module) -> str:
    """Return a digest of the parameters' names, shapes and types, and of which are trained."""
    lines = [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _total_steps(loader: Iterable[Any], epochs: int | None, steps: int | None) -> int:
    if epochs is not None and steps is not None:
        raise InvalidArgument(f"steps: expected either epochs or steps, got epochs={epochs} and steps={steps}")
    steps = check.integer("steps", steps, optional=True)
    epochs = check.integer("epochs", epochs, optional=True)
    if steps is not None:
        return steps
    length = resumption.length(loader)
    if length is None:
        raise InvalidArgument("steps: expected a number for a loader of unknown length, got None")
    if length < 1:
        raise InvalidArgument("loader: expected at least one batch, got none")
    return length * (1 if epochs is None else epochs)


def _optimizer(model: nn.Module, settings: Settings, hooks: Hooks) -> torch.optim.Optimizer:
    try:
        optimizer = create_optimizer_v2(model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
        if hooks.parameters:
            optimizer.add_param_group({"params": hooks.parameters, "weight_decay": 0.0})
        return optimizer
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InvalidArgument(f"opt: expected an optimizer of timm.optim, got {settings.opt!r} ({error})") from error


@contextmanager
def _heads_apart(model: nn.Module, settings: Settings) -> Iterator[None]:
    """Make a model with a distillation token return both heads if each has a loss of its own."""
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


def _cuda_devices() -> list[torch.device]:
    """Return all devices whose random generators a run may advance: those of a process that uses CUDA."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
