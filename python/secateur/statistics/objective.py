"""What gradients are taken of: the model's own answers, the labels' cross-entropy, or a loss of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.forms import lists_images, named, without_labels
from ..data.loader import refuse_unlabelled
from ..data.model_input import split_batch
from ..errors import Error, InvalidArgument, first_line
from ..families.base import classifies
from .outputs import double

__all__ = ["Loss", "Objective", "Share", "own_answers"]

Loss: TypeAlias = Callable[[Any, Any], Tensor] | Literal["labels"] | None
_HALF = "bfloat16"
_OWN = "own answers"


def own_answers(model: nn.Module, outputs: Any) -> Tensor:
    """Return the cross-entropy of the model's own predictions, or half the squared features, summed over images."""
    logits = double(outputs)
    if classifies(model):
        own = logits.detach().argmax(-1)
        return functional.cross_entropy(logits.flatten(0, -2), own.flatten(), reduction="sum")
    return logits.square().sum() / 2


@dataclass(frozen=True, eq=False)
class Share:
    """Images ``start`` to ``stop`` of a loader's batch of ``size`` images."""

    batch: Any
    size: int
    start: int
    stop: int

    def part(self, start: int, stop: int) -> Share:
        """Return a part of this share, counted from its first image."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def on(self, device: torch.device) -> Any:
        """Return these images with all that belongs to them, in the loader's own form, tensors on the device."""
        with torch.inference_mode(False):
            return _part_of(self.batch, self.size, slice(self.start, self.stop), device)

    def targets(self, model: nn.Module, device: torch.device) -> Tensor:
        """Return the targets of these images.

        Raises:
            InvalidArgument: there are none.
        """
        _, targets = split_batch(self.batch, model=model)
        if targets is None:
            raise InvalidArgument(
                f"loader: expected (images, targets) for loss='labels', got {without_labels(self.batch)}"
            )
        with torch.inference_mode(False):
            found: Tensor = _moved(targets[self.start : self.stop], device)
        return found


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss, and the type for autocast.

    Of a function, statistics keep only the name: two of one name are not told apart.

    ``loss`` is None for `own_answers`, "labels" for the cross-entropy with the loader's targets, or a function of the
    model's outputs and the loader's batch that returns a mean over the batch. ``amp`` is "bfloat16" or None.
    """

    loss: Loss = None
    amp: str | None = None

    @classmethod
    def named(cls, name: str) -> Objective | None:
        """Return the objective that statistics record, None for no gradients.

        Raises:
            InvalidArgument: it is a function, of which only the name is recorded.
        """
        if not name:
            return None
        loss, _, amp = name.partition(", ")
        if loss not in (_OWN, "labels"):
            raise InvalidArgument(
                f"stats: expected gradients of the model's own answers or of 'labels', which can be taken again, got "
                f"those of {loss}"
            )
        return cls("labels" if loss == "labels" else None, amp or None)

    def check(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Refuse arguments that do not fit, before any work.

        Raises:
            InvalidArgument: neither a function nor a known name; labels that the loader says it lacks; an unknown type,
                or one that the model is not in float32 for.
        """
        if self.loss is not None and self.loss != "labels" and not callable(self.loss):
            raise InvalidArgument(f"loss: expected a function of (outputs, batch), 'labels' or None, got {self.loss!r}")
        if self.loss == "labels":
            refuse_unlabelled(loader)
        if self.amp is None:
            return
        if self.amp != _HALF:
            raise InvalidArgument(f"amp: expected {_HALF!r} or None, got {self.amp!r}")
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise InvalidArgument(f"amp: expected a model in float32, got {name} in {parameter.dtype}")

    @property
    def name(self) -> str:
        """What statistics record: sums of different losses must not be added up."""
        if callable(self.loss):
            named_ = self.loss if hasattr(self.loss, "__qualname__") else type(self.loss)
            found = f"{named_.__module__}.{named_.__qualname__}"
        else:
            found = self.loss or _OWN
        return found if self.amp is None else f"{found}, {self.amp}"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context of forward passes."""
        return nullcontext() if self.amp is None else torch.autocast(device.type, dtype=getattr(torch, self.amp))

    def of(self, model: nn.Module, outputs: Any, share: Share, device: torch.device) -> Tensor:
        """Return the loss summed over the images of a share, with a gradient.

        Raises:
            InvalidArgument: labels are missing, or what the caller's function returns is no loss.
        """
        if self.loss is None:
            return own_answers(model, outputs)
        if not callable(self.loss):
            return _by_labels(outputs, share.targets(model, device))
        batch = share.on(device)
        try:
            with self.autocast(device):
                loss = self.loss(outputs, batch)
        except Error:
            raise
        except Exception as error:  # code of others can raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InvalidArgument(f"loss: expected a function of (outputs, batch), got {reason}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidArgument(f"loss: expected a scalar tensor, the mean over the batch, got {got}")
        if not loss.requires_grad:
            raise InvalidArgument("loss: expected a scalar with a gradient, got one without")
        # Losses are means over a batch; sums over images do not depend on how they were batched.
        return loss.reshape(()) * (share.stop - share.start)


def _by_labels(outputs: Any, targets: Tensor) -> Tensor:
    logits = double(outputs)
    if logits.ndim != 2 or not _classes_fit(logits, targets):
        raise InvalidArgument(
            f"loss: expected outputs (B, classes) and targets below the number of classes for 'labels', got "
            f"{tuple(logits.shape)} and targets {tuple(targets.shape)}"
        )
    return functional.cross_entropy(logits, targets if targets.is_floating_point() else targets.long(), reduction="sum")


def _classes_fit(logits: Tensor, targets: Tensor) -> bool:
    """Return whether targets are class indices, or shares of each class."""
    if targets.is_floating_point():
        return targets.shape == logits.shape
    inside = (targets >= 0) & (targets < logits.shape[1])
    return targets.shape == logits.shape[:1] and bool(inside.all())


def _part_of(batch: Any, size: int, part: slice, device: torch.device) -> Any:
    """Take some images of a batch with all that belongs to them."""
    if lists_images(batch) and len(batch) == size:
        return type(batch)(_moved(each, device) for each in batch[part])
    return _columns(batch, size, part, device, outermost=True)


def _columns(value: Any, size: int, part: slice, device: torch.device, *, outermost: bool = False) -> Any:
    """Take a part of everything that has one entry for each image."""

    def within(each: Any) -> Any:
        return _columns(each, size, part, device)

    if isinstance(value, (Tensor, np.ndarray)):
        return _moved(value[part] if value.ndim > 0 and len(value) == size else value, device)
    if isinstance(value, Mapping):
        return {name: within(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: within(getattr(value, each.name)) for each in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(within, value))
    if not isinstance(value, (tuple, list)):
        by_name = named(value)
        return value if by_name is None else within(by_name)
    # What belongs to each image is listed; a tuple within a batch holds columns, if they are as long.
    holds_columns = isinstance(value, tuple) and all(isinstance(e, Tensor) and e.shape[:1] == (size,) for e in value)
    if len(value) == size and not outermost and not holds_columns:
        return type(value)(_moved(each, device) for each in value[part])
    return type(value)(map(within, value))


def _moved(value: Any, device: torch.device) -> Any:
    """Return all tensors on the device; autograd can save none that was made in inference mode."""
    if isinstance(value, Tensor):
        moved = value.to(device)
        return moved.clone() if moved.is_inference() else moved
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(each, device) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(each, device) for each in value)
    return value
