"""What formats with weights of fewer bits share: the images that they are calibrated on, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import check
from ..data.loader import in_batches
from ..data.model_input import input_dtype, model_input, refuse_iterator, split_batch
from ..errors import Error, InvalidArgument, Unsupported
from .base import random_images, tolerance

__all__ = ["Bits", "calibration_images", "cost", "difference_of_integers"]

Bits = Literal["int8", "int4"]
# The error of outputs, relative to them, beyond which they are another model's: on photographs, and on random images,
# on which fewer bits cost trained models more.
_MOST_LOST, _MOST_LOST_AT_RANDOM = 0.5, 0.8


def calibration_images(
    model: nn.Module, options: Any, bits: Bits | None, *, among: str, calibrated: str | None
) -> list[Tensor]:
    """Return the loader's images, one by one; none if the weights keep their bits.

    Args:
        model: the model.
        options: with ``loader`` and ``max_images``.
        bits: those of the weights; None for all.
        among: the options that choose them, for error texts, such as "int8 or int4".
        calibrated: the option that needs images, if it was chosen.

    Raises:
        InvalidArgument: options that contradict each other, or a loader without images.
        Unsupported: the model is not in float32.
    """
    if calibrated is not None and options.loader is None:
        raise InvalidArgument(f"loader: expected batches of images to calibrate {calibrated} on, got None")
    if options.loader is not None and bits is None:
        raise InvalidArgument(f"loader: expected None without {among}, got one")
    if bits is None:
        return []
    if (dtype := input_dtype(model)) != torch.float32:
        found = str(dtype).removeprefix("torch.")
        raise Unsupported(f"dtype: expected float32 for {bits}, got {found}")
    wanted, images = check.integer("max_images", options.max_images), list[Tensor]()
    if options.loader is not None:
        refuse_iterator(options.loader)
        for batch in in_batches(cast(Any, options.loader), model, labels=False):
            images += model_input(model, split_batch(batch, labels=False, model=model)[0]).split(1)
            if len(images) >= wanted:
                break
        if not images:
            raise InvalidArgument("loader: expected images, got none")
    return images[:wanted]


@torch.inference_mode()
def difference_of_integers(
    exact: Callable[[Tensor], Any],
    run: Callable[[Tensor], Any],
    model: nn.Module,
    sizes: tuple[int, ...],
    engine: str,
    slack: float = 0.0,
) -> float:
    """Return the largest difference of a file from the model, on random images.

    Args:
        exact: computes what the file's integers stand for.
        run: computes what the engine makes of the file.
        model: the model.
        sizes: of batches.
        engine: its name.
        slack: by how much ``run`` may differ from ``exact``, relative to its largest output, where rounding to integers
            makes more of the last bits of their inputs.

    Raises:
        Error: the file computes something else than its integers say.
    """
    worst = 0.0
    for size in sizes:
        images = random_images(model, size)
        expected, found = torch.as_tensor(exact(images)), torch.as_tensor(run(images))
        off = float((found - expected).abs().max())
        if not off <= max(tolerance(expected), slack * float(expected.abs().max())):
            raise Error(
                f"export: expected {engine} to compute what the integers of its file say, got a difference of "
                f"{off:.3g} in a batch of {size}"
            )
        worst = max(worst, float((found - model(images)).abs().max()))
    return worst


@torch.inference_mode()
def cost(model: nn.Module, run: Callable[[Tensor], Any], images: list[Tensor], bits: Bits) -> dict[str, Any]:
    """Return what fewer bits cost on images: the relative error of outputs, and how many classes agree.

    Raises:
        Error: they cost most of the output, on two random images where there are no others.
    """
    details: dict[str, Any] = {"weights": bits, "images": len(images)}
    judged = images or list(random_images(model, 2).split(1))
    wanted = torch.cat([model(image) for image in judged])
    found = torch.cat([torch.as_tensor(run(image)) for image in judged])
    off, size = float((found - wanted).norm()), float(wanted.norm())
    error = off / size if off else 0.0
    if not off <= (_MOST_LOST if images else _MOST_LOST_AT_RANDOM) * size:
        which = f"{len(images)} images" if images else "random images"
        raise Error(f"export: expected {bits} to keep the outputs, got a relative error of {error:.2g} on {which}")
    if images:
        details["relative_error"] = error
        if wanted.ndim == 2 and wanted.shape[1] > 1:
            details["agreement"] = float((found.argmax(1) == wanted.argmax(1)).double().mean())
    return details
