"""The forms in which loaders hold a batch: tensors, tuples, mappings by name, lists of single images."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGES",
    "LABELS",
    "example",
    "is_example",
    "is_single_tensor",
    "lists_images",
    "named",
    "opened",
    "split",
    "without_labels",
]

Prepare: TypeAlias = "Callable[[Image.Image], Tensor]"

# Names in use: transformers, datasets, torchvision, MONAI, webdataset, DALI.
IMAGES = (
    "pixel_values",
    "image",
    "images",
    "img",
    "imgs",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "inputs",
    "input",
    "data",
    "x",
)
LABELS = ("labels", "label", "targets", "target", "cls", "y")
_EXPECTED = "loader: expected batches of images (B, C, H, W) or (images, targets)"


def split(batch: Any, prepare: Prepare, *, labels: bool = True) -> tuple[Any, Any]:
    """Return images and targets of a batch, each a tensor or, where it is not understood, as it is.

    Args:
        batch: images; ``(images, targets, ...)``; a mapping, dataclass or named tuple that holds them by name; or a
            list of single images, of pairs (image, class) or of such mappings.
        prepare: makes a tensor (C, H, W) of a picture.
        labels: whether targets are wanted; else they are not looked at.

    Raises:
        InvalidArgument: a mapping without known names or with several that could be meant, or pictures that do not fit
            together.
    """
    by_name = named(batch)
    if by_name is not None:
        return _of_mapping(by_name, prepare, labels)
    if not isinstance(batch, (tuple, list)):
        return _images(batch, prepare), None
    if not batch:
        return None, None
    held = [named(each) for each in batch]
    if all(each is not None and (_found(each, IMAGES) or len(batch) == 1) for each in held):
        return _of_mappings([each for each in held if each is not None], prepare, labels)
    if all(_is_pair(each) for each in batch):
        return _columns([each[0] for each in batch], [each[1] for each in batch] if labels else None, prepare)
    if lists_images(batch):
        return _images(batch, prepare), None
    first, second = batch[0], batch[1] if labels and len(batch) > 1 else None
    images_by_name, labels_by_name = named(first), named(second)
    if images_by_name is not None:
        own = _found(images_by_name, LABELS)
        if labels and second is not None and own:
            raise InvalidArgument(f"loader: expected targets in one place, got {own[0]!r} and a second item")
        first = images_by_name[_image_name(images_by_name)]
    if labels_by_name is not None:
        name = _label_name(labels_by_name)
        second = None if name is None else labels_by_name[name]
    images = _images(first, prepare)
    return images, _targets(second, images, squeeze=labels_by_name is not None)


def lists_images(batch: Any) -> bool:
    """Return whether a batch is a list of single images, of pairs (image, class) or of mappings of one each."""
    if not isinstance(batch, (tuple, list)) or not batch or named(batch) is not None:
        return False
    held = [named(each) for each in batch]
    if all(each is not None and _found(each, IMAGES) for each in held):
        return True
    if all(_is_pair(each) for each in batch) or _are_pictures(batch):
        return True
    # Not a tuple, which may be one image and its mask.
    return isinstance(batch, list) and all(_is_single(each) for each in batch)


def named(batch: Any) -> Mapping[str, Any] | None:
    """Return what a batch holds by name; None if it is no mapping, dataclass or named tuple of known names."""
    if isinstance(batch, Tensor) or _is_picture(batch):
        return None
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        found = dict(zip(batch._fields, batch, strict=True))
        return found if _found(found, IMAGES) else None
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if hasattr(batch, "keys") and hasattr(batch, "__getitem__"):
        return {name: batch[name] for name in batch.keys()}  # noqa: SIM118  # not every such class iterates over them
    return None


def without_labels(batch: Any) -> str:
    """Describe a batch in which no targets were found."""
    by_name = named(batch)
    if by_name is None and isinstance(batch, (tuple, list)) and batch:
        by_name = named(batch[0])
    if by_name is None:
        return "images alone"
    return f"no {LABELS[0]!r}, {LABELS[1]!r} or {LABELS[2]!r} among {_listed(by_name)}"


def is_example(item: Any) -> bool:
    """Return whether an item is one picture, alone, in a pair (picture, class) or in a mapping."""
    by_name = named(item)
    if by_name is not None:
        found = _found(by_name, IMAGES)
        return any(_is_picture(by_name[name]) for name in found)
    return _is_picture(item) or (isinstance(item, (tuple, list)) and len(item) == 2 and _is_picture(item[0]))


def is_single_tensor(item: Any) -> bool:
    """Return whether an item is one image as a tensor (C, H, W), with a class or by name."""
    by_name = named(item)
    if by_name is not None:
        found = _found(by_name, IMAGES)
        return len(found) == 1 and not _is_picture(by_name[found[0]]) and _is_single(by_name[found[0]])
    return _is_pair(item) and not _is_picture(item[0])


def example(item: Any, labels: bool = True) -> tuple[Any, Any]:
    """Return the picture and the class of an example, None if it has none or ``labels`` is false."""
    by_name = named(item)
    if by_name is not None:
        name = _label_name(by_name) if labels else None
        return by_name[_image_name(by_name)], None if name is None else by_name[name]
    return (item, None) if _is_picture(item) else (item[0], item[1] if labels else None)


def opened(value: Any) -> Image.Image:
    """Return a picture, of bytes or a path if it is encoded, as data sets hold it undecoded."""
    from PIL import Image

    if not isinstance(value, Mapping):
        picture: Image.Image = value
        return picture
    data = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
    return Image.open(io.BytesIO(data))


def _of_mapping(batch: Mapping[str, Any], prepare: Prepare, labels: bool) -> tuple[Any, Any]:
    value = batch[_image_name(batch)]
    name = _label_name(batch) if labels else None
    target = None if name is None else batch[name]
    if _is_single(value):
        if not _is_picture(value) and not _is_scalar(target):
            # One image, or a batch of grey ones: only its label could tell.
            return value, None
        return _columns([value], None if target is None else [target], prepare)
    images = _images(value, prepare)
    return images, _targets(target, images, squeeze=True)


def _of_mappings(batch: Sequence[Mapping[str, Any]], prepare: Prepare, labels: bool) -> tuple[Any, Any]:
    if len(batch) == 1:
        return _of_mapping(batch[0], prepare, labels)
    name = _image_name(batch[0])
    if not all(name in each and _is_single(each[name]) for each in batch):
        raise InvalidArgument(f"{_EXPECTED}, got a list of {len(batch)} mappings that are not one image {name!r} each")
    label = _label_name(batch[0]) if labels else None
    if label is None:
        return _columns([each[name] for each in batch], None, prepare)
    return _columns([each[name] for each in batch], [each.get(label) for each in batch], prepare)


def _columns(images: list[Any], targets: list[Any] | None, prepare: Prepare) -> tuple[Any, Any]:
    found = _images(images, prepare)
    return found, None if targets is None else _targets(targets, found)


def _image_name(batch: Mapping[str, Any]) -> str:
    found = _found(batch, IMAGES)
    if len(found) > 1:
        # What a processor made stands beside the picture that it was made from.
        ready = [name for name in found if isinstance(batch[name], Tensor) and batch[name].is_floating_point()]
        rest = [name for name in found if name not in ready]
        if len(ready) == 1 and all(_is_picture(batch[name]) or _are_pictures(batch[name]) for name in rest):
            found = ready
    if len(found) != 1:
        expected = f"loader: expected images by one name, such as {IMAGES[0]!r} or {IMAGES[1]!r}"
        raise InvalidArgument(f"{expected}, got {_listed(batch)}")
    return found[0]


def _label_name(batch: Mapping[str, Any]) -> str | None:
    found = [name for name in _found(batch, LABELS) if batch[name] is not None]
    if len(found) > 1 and not all(_same(batch[found[0]], batch[name]) for name in found[1:]):
        raise InvalidArgument(
            f"loader: expected targets by one name, such as {LABELS[0]!r}, got {' and '.join(map(repr, found))}"
        )
    return found[0] if found else None


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    return isinstance(first, (int, list)) and type(first) is type(second) and bool(first == second)


def _found(batch: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if name in batch]


def _listed(batch: Mapping[str, Any]) -> str:
    names = [repr(name) for name in batch]
    return f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "an empty mapping"


def _images(value: Any, prepare: Prepare) -> Any:
    if _is_picture(value):
        return prepare(value)[None]
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number):
        return torch.from_numpy(value)
    if not isinstance(value, (tuple, list)) or not value:
        return value
    if _are_pictures(value):
        value = [prepare(each) for each in value]
    elif not all(isinstance(each, Tensor) and each.ndim == 3 for each in value):
        return value
    if len({(tuple(each.shape), each.dtype) for each in value}) != 1:
        found = sorted({str(tuple(each.shape)) for each in value})
        found = found if len(found) > 1 else sorted({str(each.dtype) for each in value})
        raise InvalidArgument(f"loader: expected images of one shape and type in a batch, got {', '.join(found[:3])}")
    return torch.stack(list(value))


def _targets(value: Any, images: Any, *, squeeze: bool = False) -> Any:
    """Return targets as a tensor, one for each image, where they are numbers; else as they are."""
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number):
        value = torch.from_numpy(value)
    if isinstance(value, (tuple, list)) and value and not isinstance(value[0], Tensor):
        whole = all(isinstance(each, (int, np.integer)) and not isinstance(each, bool) for each in value)
        return torch.tensor([int(each) for each in value]) if whole else value
    if isinstance(value, (tuple, list)) and value and all(isinstance(each, Tensor) for each in value):
        shapes = {tuple(each.shape) for each in value}
        value = torch.stack(list(value)) if len(shapes) == 1 else value
    if _is_scalar(value) and isinstance(images, Tensor) and len(images) == 1:
        return torch.as_tensor(value).reshape(1)
    # DALI's class indices are (B, 1).
    if squeeze and isinstance(value, Tensor) and not value.is_floating_point():
        return value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value
    return value


def _is_picture(value: Any) -> bool:
    """Return whether it is a PIL image, or an encoded one as `datasets` holds it, without importing PIL."""
    if isinstance(value, Mapping):
        return set(value) == {"bytes", "path"}
    return any(f"{base.__module__}.{base.__qualname__}" == "PIL.Image.Image" for base in type(value).__mro__)


def _are_pictures(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(_is_picture(each) for each in value)


def _is_single(value: Any) -> bool:
    return _is_picture(value) or (isinstance(value, Tensor) and value.ndim == 3)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point()
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and _is_single(value[0]) and _is_scalar(value[1])
