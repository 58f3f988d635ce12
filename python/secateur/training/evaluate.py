"""Measures the accuracy and loss of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional

from .. import check
from ..data.forms import without_labels
from ..data.loader import in_batches, refuse_unlabelled
from ..data.model_input import images_in, is_graph, model_input, split_batch
from ..errors import InvalidArgument, NumericalError, first_line
from ..runtime.devices import borrowed, runnable
from ..runtime.progress import progress

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Evaluation", "check_targets", "evaluate", "full_precision"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in percent, mean cross entropy in nats, and the number of images.

    ``top5`` counts the five highest logits, or all of them if the model has fewer classes.
    """

    top1: float
    top5: float
    loss: float
    images: int

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f}, {self.images:,} images"


def evaluate(
    model: nn.Module | torch.export.ExportedProgram,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    max_images: int | None = None,
) -> Evaluation:
    """Measure a classifier in evaluation mode; its mode and device are restored afterwards.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes), in any floating-point type; also a compiled one, or an
            exported program or its module, whose mode does not change.
        loader: an iterable of (images, targets), targets (B,) class indices, or of the other forms that `split_batch`
            takes; or a data set of single pictures with classes. The images are cast to the model's type.
        device: where to run; the model's own by default.
        max_images: stop after exactly this many images.

    Raises:
        InvalidArgument: not a model with weights, no such device, or a loader that yields nothing, images of another
            shape, no targets, or targets that are not classes of the model.
        NumericalError: a logit is NaN or infinite.
    """
    max_images = check.integer("max_images", max_images, optional=True)
    model = runnable(model)
    images_seen, top1, top5, loss = 0, 0, 0, 0.0
    loader = in_batches(loader, model)
    refuse_unlabelled(loader)
    total = images_in(loader, max_images)
    with borrowed(model, device) as place, progress(total, "evaluate") as advance, torch.inference_mode():
        for batch in loader:
            images, targets = split_batch(batch, model=model)
            if targets is None:
                raise InvalidArgument(f"loader: expected (images, targets), got {without_labels(batch)}")
            left = len(images) if max_images is None else max_images - images_seen
            images, targets = model_input(model, images[:left], place), targets[:left].to(place)
            logits = full_precision(_run(model, images))
            targets = check_targets(targets, logits, soft=False)
            if not torch.isfinite(logits).all():
                first = images_seen + int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
                raise NumericalError(f"model: expected finite logits, got nan or inf for image {first}")
            count = len(images)
            hits = [round(float(percent) * count / 100) for percent in accuracy(logits, targets, topk=(1, 5))]
            top1, top5 = top1 + hits[0], top5 + hits[1]
            loss += float(functional.cross_entropy(logits.double(), targets, reduction="sum"))
            images_seen += count
            advance(count)
            if images_seen == max_images:
                break
    if images_seen == 0:
        raise InvalidArgument("loader: expected at least one batch, got none")
    return Evaluation(100 * top1 / images_seen, 100 * top5 / images_seen, loss / images_seen, images_seen)


def _run(model: nn.Module, images: Tensor) -> object:
    try:
        return model(images)
    except (RuntimeError, AssertionError, TypeError) as error:
        if not is_graph(model):
            raise
        reason = first_line(error)
        raise InvalidArgument(
            f"loader: expected batches of the shape that the graph was made for, got {tuple(images.shape)} ({reason}); "
            "export with a dynamic batch size, or pass batches of one size"
        ) from error


def check_targets(targets: Tensor, logits: Tensor, *, soft: bool) -> Tensor:
    """Return class indices (B,) for the logits (B, classes) as int64; with ``soft``, also accept probabilities.

    Raises:
        InvalidArgument: the targets are neither.
    """
    if logits.ndim != 2:
        raise InvalidArgument(f"model: expected logits (B, classes), got an output of shape {tuple(logits.shape)}")
    if soft and targets.is_floating_point() and targets.shape == logits.shape:
        return targets
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise InvalidArgument(
            f"loader: expected targets (B,) of class indices, got {tuple(targets.shape)} {targets.dtype}"
        )
    targets = targets.long()  # uint64 values that do not fit become negative
    low, high = (int(value) for value in targets.aminmax())
    if low < 0 or high >= logits.shape[1]:
        got = low if low < 0 else high
        raise InvalidArgument(f"loader: expected class indices from 0 to {logits.shape[1] - 1}, got {got}")
    return targets


def full_precision(logits: object) -> Tensor:
    """Return a model's output as float32, or float64 if it is: a loss in half precision underflows.

    Raises:
        InvalidArgument: it is not a tensor.
    """
    if not isinstance(logits, Tensor):
        raise InvalidArgument(f"model: expected logits (B, classes), got a {type(logits).__name__}")
    return logits if logits.dtype == torch.float64 else logits.float()
