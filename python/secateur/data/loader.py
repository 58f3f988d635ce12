"""Images for a model: folders, tars, Hugging Face data sets and scikit-learn's digits, as the model expects them.

timm's readers find the images and timm's transforms prepare them. This package adds what measurements need: an order
that depends only on the seed, exact image counts, no image twice, and augmentation that depends only on (seed, epoch,
image), so that neither the number of worker processes nor an interruption changes a training run. Streamed data sets
are shuffled by their reader, and augmented by position instead of image.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.data import create_transform
from torch import nn
from torch.utils.data import Dataset

from .. import check
from ..errors import InvalidArgument, Unsupported
from ..runtime.devices import runnable
from .batches import Batches, ByPosition, Images, Stream
from .examples import Examples, Grouped, is_stream, is_transformed, of_hub, one_by_one, split_of
from .model_input import TOLD, data_config, is_graph, mode_of
from .order import Order
from .sources import HUB_PREFIXES, Digits, default_split, files, hub

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor

__all__ = ["ImageLoader", "in_batches", "loader", "refuse_single", "refuse_unlabelled"]

# Images in a batch of single ones, where the size changes nothing.
_BATCH = 64

# Digits fill their 8 x 8 frame, are not symmetric and have no colours: large crops, no mirroring, no colour jitter.
_DIGITS_TRAIN = {"scale": (0.7, 1.0), "ratio": (0.85, 1.18), "hflip": 0.0, "color_jitter": None}


class ImageLoader(Iterable["tuple[Tensor, Tensor]"]):
    """Batches of (images (B, C, H, W) float32, targets (B,) int64) in an order fixed by seed and epoch.

    Iterating again repeats the same batches until `set_epoch` is called. ``images`` is the number of images in one pass
    (None for a streamed data set of unknown length), ``description`` names the source. ``unreadable`` names the images
    that the last pass skipped, with the reason; ``images`` counts them. ``unlabelled`` describes a source without
    classes, whose targets are all -1; it is empty for others.
    """

    def __init__(
        self,
        batches: Batches | Stream,
        images: int | None,
        batch_size: int,
        description: str,
        max_unreadable: int = 0,
        in_step: bool = False,
        unlabelled: str = "",
    ) -> None:
        self._batches = batches
        self.images = images
        self.batch_size = batch_size
        self.description = description
        self.unreadable: list[str] = []
        self.max_unreadable = max_unreadable
        self.unlabelled = unlabelled
        self._in_step = in_step
        self._before: list[str] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self._every_batch():
            # The ranks of a job count batches, including empty ones.
            if len(images) > 0 or self._in_step:
                yield images, targets

    def every_batch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over exactly ``len`` batches: a batch of only unreadable images is empty instead of skipped.

        It is for code that counts batches, such as `finetune`. An empty batch has images (0, 0, 0, 0) and targets (0,).
        """
        yield from self._every_batch()

    def _every_batch(self) -> Iterator[tuple[Tensor, Tensor]]:
        left_out, self._before = self._before, []
        self.unreadable = left_out
        for images, targets, unreadable in self._batches:
            for text in unreadable:
                if len(left_out) >= self.max_unreadable:
                    limit = self.max_unreadable
                    expected = f"at most {limit} unreadable images" if limit else "a readable image"
                    raise InvalidArgument(f"source: expected {expected}, got {text}")
                left_out.append(text)
                warnings.warn(f"left out an image that cannot be read: {text}", stacklevel=3)
            yield images, targets

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        if self.images is None:
            raise TypeError(f"the length of {self.description} is unknown")
        return len(self._batches) if isinstance(self._batches, Batches) else -(-self.images // self.batch_size)

    def __repr__(self) -> str:
        return f"ImageLoader({self.description}, images={self.images}, batch_size={self.batch_size})"

    def set_epoch(self, epoch: int, start: int = 0, unreadable: Iterable[str] = ()) -> None:
        """Set the epoch, which determines order and augmentation; the next pass skips its first ``start`` batches.

        ``unreadable`` names the images that were unreadable in those batches; they are counted and listed again,
        without a warning.
        """
        self._batches.set_epoch(epoch, start)
        self._before = list(unreadable)

    def sharded(self, rank: int, ranks: int, *, whole_batches: bool = False) -> ImageLoader:
        """Return a loader for one rank's share; all ranks' batches together have ``ranks * batch_size`` images.

        In each pass every image goes to exactly one rank, as evenly as the last batch allows; a last batch of fewer
        images than ranks is dropped. ``images`` is the number of images on this rank. ``finetune`` calls this itself.

        With ``whole_batches`` a rank reads every ``ranks``-th of this loader's own batches, starting at ``rank``, and
        nothing is dropped, so that batches are the same for any number of ranks. A batch of only unreadable images is
        empty, not skipped. ``calibrate`` calls this itself. ``max_unreadable`` applies to each rank.

        Raises:
            InvalidArgument: ``rank`` is not below ``ranks``.
            Unsupported: a streamed data set, whose length and order are the reader's own.
        """
        rank, ranks = check.integer("rank", rank, 0), check.integer("ranks", ranks)
        if rank >= ranks:
            raise InvalidArgument(f"rank: expected less than the {ranks} ranks, got {rank}")
        if isinstance(self._batches, Stream):
            raise Unsupported(f"loader: expected a data set that can be shared out, got the stream {self.description}")
        batches = self._batches.sharded(rank, ranks, whole_batches)
        return ImageLoader(
            batches,
            batches.images,
            self.batch_size,
            self.description,
            self.max_unreadable,
            whole_batches,
            self.unlabelled,
        )


def loader(
    source: str | os.PathLike[str] | Sequence[Any] | Dataset[Any] | Any,
    model: nn.Module | torch.export.ExportedProgram,
    *,
    split: str | None = None,
    batch_size: int = 64,
    max_images: int | None = None,
    shuffle: bool = False,
    workers: int = 0,
    train: bool = False,
    seed: int = 0,
    max_unreadable: int = 0,
    **transform: Any,
) -> ImageLoader:
    """Read images in the form that the model expects.

    Args:
        source: a folder with one sub-folder of images per class; a ``.tar`` of such folders; ``hfds:NAME`` or, read as
            a stream, ``hfids:NAME`` for a Hugging Face data set; ``digits`` for scikit-learn's 1,797 handwritten digits
            (8 x 8 pixels, 10 classes). Or pictures in memory: a ``datasets.Dataset`` (or a ``DatasetDict``, with
            ``split``) with a column of images and, for labels, one of class indices; a list or ``torch`` data set of
            PIL images, alone, in pairs (image, class index) or in mappings such as ``{"image": …, "label": …}``. Images
            without a class have the target -1, which ``evaluate`` and ``finetune`` refuse.
        model: its data configuration determines size, channels, normalisation, interpolation and crop (see
            `data_config`). Compiled and parallel models are looked into. The graph of a model (torch.export, torch.fx,
            torch.jit) does not tell ``mean`` and ``std``, nor always ``input_size``: pass these.
        split: sub-folder or split name. By default, if a folder holds both a training and a validation folder,
            ``train`` decides which of them is read; digits are split into ``train`` and ``test``, half each, stratified
            and always in the same way; a Hugging Face data set has ``train`` and ``validation``.
        batch_size: the last batch may be smaller; nothing is dropped.
        max_images: exactly this many images, or all if there are fewer: the first ones, or with ``shuffle`` a random
            choice that depends on ``seed``.
        shuffle: draw the order from seed and epoch. Image folders are otherwise sorted by class.
        workers: processes that decode while the model runs; with 0 the model waits for every batch. The number does not
            change the images.
        train: use timm's random training transforms (which differ by epoch) instead of the evaluation transforms.
        seed: the seed of order and augmentation.
        max_unreadable: skip up to this many images of a pass that cannot be read or decoded, with a warning for each;
            one more is an error. ``ImageLoader.unreadable`` names them. A batch that lacks some is smaller. Not for
            ``hfids:``.
        **transform: further arguments of `timm.data.create_transform`, such as ``scale``, ``hflip``, ``auto_augment``
            or ``crop_pct``; ``input_size``, (channels, height, width), only for a model that does not tell it.

    Raises:
        InvalidArgument: the model does not tell what it expects of images, and it is not given; the source does not
            exist, holds no images or no such split, or needs a package that is not installed; which column of it is the
            image or the class cannot be told; an image cannot be read (while iterating); a number is out of range.
    """
    batch_size = check.integer("batch_size", batch_size)
    max_images = check.integer("max_images", max_images, optional=True)
    workers = check.integer("workers", workers, 0)
    seed = check.integer("seed", seed, 0)
    max_unreadable = check.integer("max_unreadable", max_unreadable, 0)
    model = runnable(model)
    given = {key: transform.pop(key) for key in TOLD if key in transform}
    if "input_size" in given and not is_graph(model):
        raise InvalidArgument(f"input_size: expected none for a model that tells it, got {given['input_size']}")
    config = data_config(model, given)
    mode = mode_of(config)
    name = "" if _in_memory(source) else str(source)
    if name == "digits":
        config["crop_pct"] = 1.0
        config.update(_DIGITS_TRAIN if train else {})
    prepare = _transform(config, train, transform)

    reader: Any
    if _in_memory(source):
        reader = Examples(split_of(source, split, train=train))
        description = reader.description
    else:
        split = default_split(name, train=train) if split is None else split
        prefix, separator, dataset = name.partition(":")
        if separator and prefix in HUB_PREFIXES:
            description = f"{name} ({split})"
            found = hub(prefix, dataset, str(split), mode, seed, shuffle, max_images)
            if prefix == "hfids":
                if max_unreadable:
                    raise InvalidArgument(f"max_unreadable: expected 0 for a streamed data set, got {max_unreadable}")
                found.transform = ByPosition(prepare, seed if train else None)
                return _streamed(found, batch_size, max_images, workers, description)
            reader = found.reader
        elif name == "digits":
            reader = Digits(str(split))
            description = f"digits ({split})"
        else:
            reader, description = files(name, split)

    dataset_ = Images(reader, prepare, mode, seed if train else None)
    order = Order(len(reader), batch_size, max_images, seed if shuffle else None)
    unlabelled = getattr(reader, "unlabelled", "")
    return ImageLoader(
        Batches(dataset_, order, workers),
        order.images,
        batch_size,
        description,
        max_unreadable,
        unlabelled=unlabelled,
    )


def in_batches(batches: Iterable[Any], model: nn.Module, *, labels: bool = True) -> Iterable[Any]:
    """Return ``batches`` itself, or batches of a data set or list of single pictures, prepared as by `loader`.

    Raises:
        InvalidArgument: a data set of several splits, or of single images that are tensors already.
    """
    if of_hub(batches).endswith("Dict"):
        splits = ", ".join(map(repr, batches))
        raise InvalidArgument(f"loader: expected one split, got a {type(batches).__name__} of {splits}")
    if is_stream(batches) or (of_hub(batches) and is_transformed(batches)):
        return Grouped(batches, _BATCH)
    try:
        if not one_by_one(batches):
            return batches
        found = Examples(batches, labels=labels)
    except InvalidArgument as error:
        raise InvalidArgument(str(error).replace("source:", "loader:", 1)) from error
    config = data_config(model)
    images = Images(found, _transform(config, False, {}), mode_of(config), None)
    order = Order(len(found), _BATCH, None, None)
    return ImageLoader(Batches(images, order, 0), order.images, _BATCH, found.description, unlabelled=found.unlabelled)


def refuse_single(batches: object) -> None:
    """Refuse a data set or list of single pictures, where the size of batches and their order matter.

    Raises:
        InvalidArgument: it is one; the text says what to pass.
    """
    if one_by_one(batches):
        raise InvalidArgument(
            f"loader: expected batches, got a {type(batches).__name__} of single images; pass secateur.data.loader("
            "dataset, model, batch_size=…, shuffle=True, train=True)"
        )


def refuse_unlabelled(batches: object) -> None:
    """Refuse a loader of a source without classes, before its first batch.

    Raises:
        InvalidArgument: it is one; the text says what the source holds.
    """
    if isinstance(batches, ImageLoader) and batches.unlabelled:
        raise InvalidArgument(f"loader: expected (images, targets), got {batches.unlabelled}")


def _in_memory(source: object) -> bool:
    if of_hub(source) == "IterableDataset" or of_hub(source) == "IterableDatasetDict":
        raise InvalidArgument(
            f"source: expected a data set with indices, got a {type(source).__name__} (pass 'hfids:NAME', or the data "
            "set itself to calibrate or evaluate)"
        )
    return bool(of_hub(source)) or isinstance(source, (list, tuple, Dataset))


def _transform(config: dict[str, Any], train: bool, extra: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    known = inspect.signature(create_transform).parameters
    for key in extra:
        if key not in known or key in ("is_training", "use_prefetcher"):
            raise InvalidArgument(f"transform: expected arguments of timm's create_transform, got {key!r}")
    prepare: Callable[[Image.Image], Tensor] = create_transform(**{**config, **extra}, is_training=train)
    return prepare


def _streamed(
    dataset: Any,
    batch_size: int,
    max_images: int | None,
    workers: int,
    description: str,
) -> ImageLoader:
    if workers > 1:
        raise InvalidArgument(f"workers: expected at most 1 for a streamed data set, got {workers}")
    known = [count for count in (max_images, getattr(dataset.reader, "num_samples", None)) if count]
    images = min(known, default=None)
    return ImageLoader(Stream(dataset, batch_size, images, workers), images, batch_size, description)
