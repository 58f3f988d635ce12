"""The training loop: continues one run to its last step, alone or as one of several ranks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from .. import core
from ..data.forms import without_labels
from ..data.loader import ImageLoader
from ..data.model_input import model_input, split_batch
from ..errors import InvalidArgument, NumericalError
from ..files import container
from ..runtime import generators
from ..runtime.progress import progress
from . import checkpoint as resumption
from .average import Average, overwrite
from .checkpoint import Progress, Settings
from .evaluate import check_targets, evaluate, full_precision
from .hooks import Batch, Hooks
from .losses import distillation
from .mixing import Mixing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from ..runtime.ranks import Ranks

__all__ = ["Run"]

# Marks the end of a pass; None could be a (wrong) batch.
_END = object()


class Run:
    """One run: model, optimizer and position, which are saved together in a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        place: torch.device,
        origin: Mapping[str, Any] | None,
        ranks: Ranks,
        hooks: Hooks,
    ) -> None:
        self.at = Progress()
        self._model = model
        # Collected once, since walking through the modules takes longer than many GPU kernels.
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._every = [*self._trained, *hooks.parameters]
        self._forward = ranks.parallel(model)
        self._teacher = teacher
        self._optimizer = optimizer
        self._settings = settings
        self._place = place
        self._origin = origin
        self._ranks = ranks
        self._hooks = hooks
        self._generators: Any = None
        # The loader that may skip images, and the images it had skipped in the pass before the checkpoint.
        self._gaps: ImageLoader | None = None
        self._left_out: list[str] = []
        self._mixing = Mixing(settings.mixup, settings.cutmix) if settings.mixup or settings.cutmix else None
        whole = model
        if hooks.parameters:
            whole = nn.ModuleDict({"model": model, "hooks": nn.ParameterList(hooks.parameters)})
        self._average = None if settings.ema is None else Average(whole, settings.ema)
        self._scaler = torch.amp.GradScaler(place.type, enabled=settings.amp == "float16")
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
        """Continue the run to its last step; the model then holds the average if there is one."""
        at, steps = self.at, self._settings.steps
        self._gaps = loader if isinstance(loader, ImageLoader) and loader.max_unreadable else None
        with progress(steps, "finetune", unit="steps", silent=self._ranks.rank > 0) as advance:
            advance(at.step)
            begun = at.step
            while at.step < steps:
                batches = self._pass(loader)
                while at.step < steps and (batch := self._next(batches)) is not None:
                    with core.subnormals_flushed(self._place):
                        loss = self._step(batch)
                    advance(1, note="" if loss is None else f"loss {loss:.4f}")
                    if path is not None and every is not None and at.step % every == 0 and at.step < steps:
                        self.save(path)
                self._close_epoch(val_loader)
            if path is not None and begun < steps:
                self.save(path)
        if self._average is not None:
            self._average.take_over()
        self._ranks.share(resumption.state(self._model).values())
        torch.clear_autocast_cache()

    def _pass(self, loader: Iterable[Any]) -> Iterator[Any]:
        at, skip = self.at, self.at.batch
        _seed_generators(self._settings.seed, at.epoch, self._ranks.rank, self._place)
        if hasattr(loader, "set_epoch"):
            # secateur's own loader can skip batches already used without decoding them.
            if self._gaps is not None:
                self._gaps.set_epoch(at.epoch, skip, self._left_out)
                skip, self._left_out = 0, []
            elif skip and hasattr(loader, "description"):
                loader.set_epoch(at.epoch, skip)
                skip = 0
            else:
                loader.set_epoch(at.epoch)
        batches = iter(loader) if self._gaps is None else self._gaps.every_batch()
        for _ in range(skip):
            next(batches, None)
        if self._generators is not None:
            generators.put(self._generators, self._place)
            self._generators = None
        yield from batches

    def _next(self, batches: Iterator[Any]) -> Batch | None:
        """Return the next batch, or None at the end of the pass; errors in it are found before the ranks wait."""
        found: Batch | None = None
        with self._ranks.together(3) as totals:
            batch = next(batches, _END)
            if batch is not _END:
                found = self._prepare(batch)
                totals[:] = [1.0, float(len(found.images)), float(len(found.images) == 0)]
        if 0 < totals[0] < self._ranks.size:
            raise InvalidArgument(
                f"loader: expected as many batches on every rank, got {self.at.batch} in pass {self.at.epoch} on "
                f"{self._ranks.size - int(totals[0])} of {self._ranks.size} ranks and more on the others"
            )
        if found is not None:
            found.together = int(totals[1])
            found.uneven = 0 < totals[2] < self._ranks.size
        return found

    def _prepare(self, batch: Any) -> Batch:
        images, targets = split_batch(batch, empty=self._gaps is not None, model=self._model)
        if len(images) == 0:
            return Batch(images, None, None)
        images = images.to(self._place)
        model_input(self._model, images, self._place)
        if targets is None and self._settings.alpha < 1:
            raise InvalidArgument(
                "loader: expected (images, targets), or alpha=1 and a teacher for images alone, "
                f"got {without_labels(batch)} with alpha={self._settings.alpha:g}"
            )
        shares = None
        if self._mixing is not None:
            images, shares = self._mixing.images(images)
        return Batch(images, None if targets is None else targets.to(self._place), shares)

    def _step(self, batch: Batch) -> float | None:
        """Take one step and return its loss; None for a batch without images, which changes nothing."""
        at, settings = self.at, self._settings
        count = len(batch.images)
        # A caller's autocast caches casts until its block ends, but the weights have changed.
        torch.clear_autocast_cache()
        if batch.together == 0:
            self._schedule.step_update(at.step)
            at.step += 1
            at.batch += 1
            return None
        with self._ranks.together(1) as totals:
            loss = self._hooks.loss(batch, self._loss(batch)) if count else torch.zeros((), device=self._place)
            totals[0] = float(loss.detach()) * count
        value = totals[0] / batch.together
        self._finite("loss", value)
        if self._ranks.size > 1:
            # Gradients are averaged over ranks, whose batches may differ in size.
            loss = loss * (count * self._ranks.size / batch.together)
        self._optimizer.zero_grad()
        scaled = self._scaler.scale(loss)
        if count:
            scaled.backward()
        if batch.uneven:
            self._ranks.average(self._trained)
        self._ranks.average(self._hooks.parameters)
        self._scaler.unscale_(self._optimizer)
        self._hooks.after_backward()
        limit = float("inf") if settings.clip_grad is None else settings.clip_grad
        norm = nn.utils.clip_grad_norm_([p for p in self._every if p.grad is not None], limit)
        # Above 1, the scaler skips the step and halves the scale; at 1, the gradient itself is not finite.
        if self._scaler.get_scale() <= 1:
            self._finite("gradient", float(norm))
        self._schedule.step_update(at.step)
        narrow = [p for p in self._every if p.dtype == torch.float16 and p.grad is not None]
        before = [p.detach().clone() for p in narrow]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        # In float16, squared gradients and Adam's epsilon round to zero.
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
        at.loss += totals[0]
        at.images += batch.together
        self._hooks.after_step(at.step)
        if self._average is not None:
            self._average.update(at.step)
        return value

    def _loss(self, batch: Batch) -> Tensor:
        settings = self._settings
        with self._precision():
            # DistributedDataParallel would wait for a forward pass on all ranks, which an uneven batch does not have.
            forward = self._model if batch.uneven else self._forward
            output = forward(model_input(self._model, batch.images, self._place))
        # There are two heads only inside `_heads_apart`.
        heads = output if isinstance(output, tuple) and len(output) == 2 else (output, output)
        student, pupil = (full_precision(head) for head in heads)
        loss: Tensor = student.new_zeros(())
        if settings.alpha < 1 and batch.targets is not None:
            targets = check_targets(batch.targets, student, soft=True)
            if batch.shares is not None:
                targets = Mixing.targets(targets, batch.shares, student.shape[1])
            targets = targets.to(student.dtype) if targets.is_floating_point() else targets
            hard = functional.cross_entropy(student, targets, label_smoothing=settings.label_smoothing)
            loss = loss + (1 - settings.alpha) * hard
        if self._teacher is not None and settings.alpha > 0:
            # Not inference mode, because its tensors cannot be saved for the backward pass.
            with torch.no_grad(), self._precision():
                wanted = self._teacher(model_input(self._teacher, batch.images, self._place))
            if not isinstance(wanted, Tensor) or wanted.shape != pupil.shape:
                got = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
                raise InvalidArgument(f"teacher: expected logits of shape {tuple(pupil.shape)}, got {got}")
            loss = loss + settings.alpha * distillation(pupil, wanted.to(pupil.dtype), settings.temperature)
        return loss

    def _precision(self) -> AbstractContextManager[object]:
        amp = self._settings.amp
        return nullcontext() if amp is None else torch.autocast(self._place.type, dtype=getattr(torch, amp))

    def _finite(self, what: str, value: float) -> None:
        if not np.isfinite(value):
            raise NumericalError(
                f"{what}: expected a finite value, got {value} in step {self.at.step + 1}; "
                f"the weights are those after step {self.at.step}"
            )

    def _close_epoch(self, val_loader: Iterable[Any] | None) -> None:
        at = self.at
        if at.images == 0:
            # A pass that the last step ends may have no image, if others were trained before.
            if at.step < self._settings.steps or not at.history:
                raise InvalidArgument("loader: expected at least one image in every pass, got none")
            at.epoch, at.batch = at.epoch + 1, 0
            return
        entry: dict[str, float] = {
            "epoch": at.epoch,
            "step": at.step,
            "loss": at.loss / at.images,
            "lr": max(float(group["lr"]) for group in self._optimizer.param_groups),
            "images": at.images,
        }
        # Except for skipped images, the first rank has the totals and the others add zeros.
        with self._ranks.together(5) as totals:
            totals[4] = 0.0 if self._gaps is None else float(len(self._gaps.unreadable))
            if val_loader is not None and self._ranks.rank == 0:
                with nullcontext() if self._average is None else self._average.lent():
                    found = evaluate(self._model, val_loader)
                totals[:4] = [1.0, found.top1, found.top5, found.loss]
        if self._gaps is not None:
            entry["unreadable"] = int(totals[4])
        if totals[0]:
            entry |= dict(zip(("top1", "top5", "val_loss"), totals[1:4], strict=True))
        at.history.append(entry)
        at.epoch, at.batch, at.loss, at.images = at.epoch + 1, 0, 0.0, 0

    def save(self, path: Path) -> None:
        """Write the checkpoint; all ranks must call it."""
        rest = {
            "optimizer": self._optimizer.state_dict(),
            "generators": self._ranks.gather(generators.get(self._place)),
            "scaler": self._scaler.state_dict(),
            "average": {} if self._average is None else self._average.state(),
            **self._hooks.state(),
        }
        if self._gaps is not None:
            # A resumed pass does not read earlier batches again, but its limit still counts them.
            rest["unreadable"] = self._ranks.gather(self._gaps.unreadable)
        with self._ranks.together():
            if self._ranks.rank == 0:
                resumption.write(path, self._model, self._origin, self._fixed(), asdict(self.at), rest)

    def _fixed(self) -> dict[str, Any]:
        hooks = self._hooks.settings
        return asdict(self._settings) | ({} if hooks is None else {"hooks": hooks})

    def load(self, path: Path) -> int:
        """Load a checkpoint and return its step; nothing is changed unless all of it fits."""
        found, position, rest = resumption.read(path, self._model, self._origin, self._fixed())
        with container.understood("resume: expected a checkpoint of this run"):
            at, drawn = Progress(**position), rest["generators"][self._ranks.rank]
            left_out = [str(text) for text in rest["unreadable"][self._ranks.rank]] if "unreadable" in rest else []
            try:
                self._optimizer.load_state_dict(rest["optimizer"])
            except ValueError as error:  # raised before anything is loaded
                raise InvalidArgument(
                    f"resume: expected a checkpoint of the parameters that require a gradient, got others ({error})"
                ) from error
            self._hooks.load_state(rest)
            overwrite(resumption.state(self._model), found)
            if self._average is not None:
                overwrite(self._average.state(), rest["average"])
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(rest["scaler"])
            self.at, self._generators, self._left_out = at, drawn, left_out
        return self.at.step


def _seed_generators(seed: int, epoch: int, rank: int, place: torch.device) -> None:
    entropy = (seed, epoch, rank) if rank else (seed, epoch)
    value = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    generators.seed(value, place)
