"""The input of a model: its data configuration, and batches in the form it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.layers import PatchEmbed
from torch import nn
from torch.utils.data import Dataset

from ..errors import InvalidArgument
from . import forms

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


# What the model itself must tell of its input, else the caller.
TOLD = ("input_size", "mean", "std")
_GRAPHS = (
    "torch.fx.graph_module.GraphModule",
    "torch.jit._script.ScriptModule",
    "torch.export.unflatten.UnflattenedModule",
)


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside what torch.compile, parallel training or averaging put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and getattr(model, "pretrained_cfg", None) is None:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_graph(model: nn.Module) -> bool:
    """Return whether the model is the graph of another one (torch.export, torch.fx, torch.jit)."""
    return any(f"{base.__module__}.{base.__qualname__}" in _GRAPHS for base in type(bare(model)).__mro__)


def data_config(model: nn.Module, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return timm's data configuration of the model, with the input size that the model was really built for.

    timm derives ``input_size`` from ``pretrained_cfg``, which keeps the published size when a model is built with other
    ``img_size`` or ``in_chans`` arguments. Here the patch embedding decides; ``mean`` and ``std`` have one entry for
    each input channel (their average if the configuration has another number of channels). ``given`` replaces
    ``input_size``, ``mean`` and ``std``, for a graph that no longer tells them (torch.export, torch.fx, torch.jit).

    Raises:
        InvalidArgument: the model is a graph that tells no input size, mean or std, and they are not given.
    """
    model, given = bare(model), dict(given or {})
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if is_graph(model) and not getattr(model, "pretrained_cfg", None):
        config = _of_graph(model, given)
    else:
        config = dict(resolve_model_data_config(model))
        channels, height, width = config["input_size"]
        if size is not None:
            height, width = size
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None:
            channels = first.in_channels
        config["input_size"] = (channels, height, width)
    config.update(given)
    config["input_size"] = channels, _, _ = tuple(int(side) for side in config["input_size"])
    for key in ("mean", "std"):
        values = tuple(float(value) for value in config[key])
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def graph_input(model: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of the first input of an exported or traced graph, with -1 where it is free; None if unknown."""
    graph = getattr(bare(model), "graph", None)
    if not isinstance(graph, torch.fx.Graph):
        return None
    # Weights that were lifted are placeholders too, but not of four dimensions only: the last one is the input.
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder" and "val" in node.meta]
    shapes = [tuple(value.shape) for value in values if isinstance(value, torch.Tensor) and value.ndim == 4]
    return tuple(side if isinstance(side, int) else -1 for side in shapes[-1]) if shapes else None


def _of_graph(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    shape = graph_input(model)
    told = {} if shape is None or -1 in shape[1:] else {"input_size": shape[1:]}
    missing = [name for name in TOLD if name not in given and name not in told]
    if missing:
        raise InvalidArgument(
            f"{missing[0]}: expected {', '.join(f'{name}=' for name in missing)} of the model that the graph was made "
            f"of, which {type(model).__name__} does not tell, got none"
        )
    return dict(resolve_data_config({"input_size": tuple(given.get("input_size") or told["input_size"])}))


def split_batch(
    batch: Any, *, empty: bool = False, labels: bool = True, model: nn.Module | None = None
) -> tuple[Tensor, Tensor | None]:
    """Split a loader's item into images (B, C, H, W) and targets.

    A batch is a tensor or array of images; ``(images, targets, ...)``; a mapping (also transformers' and datasets'),
    named tuple or dataclass with the images by the name ``pixel_values``, ``image`` or ``images`` and targets by
    ``labels``, ``label`` or ``targets`` (further names: `data.forms`); or a list of single pictures, pairs (picture,
    class) or mappings of one each. PIL images are prepared by timm's evaluation transform for ``model``. Without
    ``labels``, anything may follow the images.

    Raises:
        InvalidArgument: the batch is something else, could be meant in several ways, or is empty (unless ``empty``
            allows it).
    """
    images, targets = forms.split(batch, _preparing(model), labels=labels)
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or (len(images) == 0 and not empty):
        got = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise InvalidArgument(f"loader: expected batches of images (B, C, H, W) or (images, targets), got {got}")
    if targets is not None and (not isinstance(targets, torch.Tensor) or targets.shape[:1] != images.shape[:1]):
        got = (
            f"targets of shape {tuple(targets.shape)}" if isinstance(targets, torch.Tensor) else type(targets).__name__
        )
        raise InvalidArgument(f"loader: expected one target for each of {len(images)} images, got {got}")
    return images, targets


def _preparing(model: nn.Module | None) -> forms.Prepare:
    """Return what prepares pictures for the model; its transform is made at the first, once for a batch."""

    @cache
    def made() -> tuple[Any, str]:
        if model is None:
            raise InvalidArgument(
                "loader: expected batches of images (B, C, H, W) or (images, targets), got a PIL image"
            )
        config = data_config(model)
        return create_transform(**config, is_training=False), mode_of(config)

    def prepare(image: Image.Image) -> Tensor:
        transform, mode = made()
        prepared: Tensor = transform(forms.opened(image).convert(mode))
        return prepared

    return prepare


def mode_of(config: Mapping[str, Any]) -> str:
    """Return PIL's mode of images with the model's channels.

    Raises:
        InvalidArgument: neither 1 nor 3 channels.
    """
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise InvalidArgument(f"model: expected 1 or 3 input channels (grey or RGB images), got {channels}")
    return "L" if channels == 1 else "RGB"


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
    embed = getattr(bare(model), "patch_embed", None)
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
    # A data set of single images need not say how it is iterated.
    if isinstance(loader, Iterator) or not isinstance(loader, (Iterable, Dataset)):
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
