"""The input of a model: its data configuration, and batches in the form it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from torch import nn

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's data configuration of the model, with the input size that the model was really built for.

    timm derives ``input_size`` from ``pretrained_cfg``, which keeps the published size when a model is built with other
    ``img_size`` or ``in_chans`` arguments. Here the patch embedding decides; ``mean`` and ``std`` have one entry for
    each input channel (their average if the configuration has another number of channels).
    """
    config: dict[str, Any] = dict(resolve_model_data_config(model))
    channels, height, width = config["input_size"]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        height, width = size
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None:
        channels = first.in_channels
    config["input_size"] = (int(channels), int(height), int(width))
    for key in ("mean", "std"):
        values = tuple(float(value) for value in config[key])
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def split_batch(batch: Any, *, empty: bool = False, labels: bool = True) -> tuple[Tensor, Tensor | None]:
    """Split a loader's item, ``images`` or ``(images, targets, ...)``, into images (B, C, H, W) and targets.

    Without ``labels``, anything may follow the images.

    Raises:
        InvalidArgument: the batch is something else, or is empty (unless ``empty`` allows it).
    """
    items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    images = items[0] if items else None
    targets = items[1] if labels and len(items) > 1 else None
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or (len(images) == 0 and not empty):
        got = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise InvalidArgument(f"loader: expected batches of images (B, C, H, W) or (images, targets), got {got}")
    if targets is not None and (not isinstance(targets, torch.Tensor) or targets.shape[:1] != images.shape[:1]):
        got = (
            f"targets of shape {tuple(targets.shape)}" if isinstance(targets, torch.Tensor) else type(targets).__name__
        )
        raise InvalidArgument(f"loader: expected one target for each of {len(images)} images, got {got}")
    return images, targets


def input_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating-point parameter; float32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def model_input(model: nn.Module, images: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Return images (B, C, H, W) in the model's type, on ``device`` or else the device of its parameters.

    Channels and size are checked if the model declares them. A model of dynamic size takes sides that are multiples of
    its patch size; for a model without parameters, images are not converted.

    Raises:
        InvalidArgument: the images are integers, or have a shape that the model does not take.
    """
    if not images.is_floating_point():
        raise InvalidArgument(f"loader: expected floating-point images, got {images.dtype}")
    shape = tuple(images.shape)
    channels, sides, limits, fits = "C", "H, W", "", images.ndim == 4
    embed = getattr(model, "patch_embed", None)
    # timm's own class declares what it takes; others, such as a hybrid's, raise their own errors.
    if isinstance(embed, PatchEmbed):
        channels = str(embed.proj.in_channels)
        fits = fits and shape[1] == embed.proj.in_channels
        if embed.img_size is not None and embed.strict_img_size:
            sides = ", ".join(str(side) for side in embed.img_size)
            fits = fits and shape[2:] == tuple(embed.img_size)
        elif embed.img_size is not None and not embed.dynamic_img_pad:
            limits = " with sides in multiples of {} x {}".format(*embed.patch_size)
            fits = fits and all(side % step == 0 for side, step in zip(shape[2:], embed.patch_size, strict=True))
    if not fits:
        raise InvalidArgument(f"loader: expected images (B, {channels}, {sides}){limits}, got {shape}")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return images if device is None else images.to(device)
    return images.to(parameter.device if device is None else device, parameter.dtype)


def refuse_iterator(loader: object) -> None:
    """Refuse batches that can be read only once.

    Raises:
        InvalidArgument: the loader is an iterator, or nothing that can be read.
    """
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise InvalidArgument(
            f"loader: expected batches that can be read several times, got {type(loader).__name__}"
            f"{', an iterator' if isinstance(loader, Iterator) else ''}"
        )


def images_in(loader: Iterable[Any], max_images: int | None = None) -> int | None:
    """Return the number of images in one pass over a loader, at most ``max_images``; None if it is unknown."""
    known = getattr(loader, "images", None)
    dataset = getattr(loader, "dataset", None)
    if known is None and isinstance(dataset, Sized):
        try:
            known = len(dataset)
        except TypeError:  # __len__ exists but the length is unknown
            known = None
    return min((count for count in (known, max_images) if count is not None), default=None)
