"""Images for a model: folders, tars, Hugging Face data sets and scikit-learn's digits, as the model expects them.

timm's readers find the images and timm's transforms prepare them. This package adds what measurements need: an order
that depends only on the seed, exact image counts, no image twice, and augmentation that depends only on (seed, epoch,
image), so that neither the number of worker processes nor an interruption changes a training run. Streamed data sets
are shuffled by their reader, and augmented by position instead of image.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from timm.data import create_transform
from torch import nn

from .. import check
from ..errors import InvalidArgument, Unsupported
from .batches import Batches, ByPosition, Images, Stream
from .model_input import data_config
from .order import Order
from .sources import HUB_PREFIXES, Digits, default_split, files, hub

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor

__all__ = ["ImageLoader", "loader"]

# Digits fill their 8 x 8 frame, are not symmetric and have no colours: large crops, no mirroring, no colour jitter.
_DIGITS_TRAIN = {"scale": (0.7, 1.0), "ratio": (0.85, 1.18), "hflip": 0.0, "color_jitter": None}


class ImageLoader(Iterable["tuple[Tensor, Tensor]"]):
    """Batches of (images (B, C, H, W) float32, targets (B,) int64) in an order fixed by seed and epoch.

    Iterating again repeats the same batches until `set_epoch` is called. ``images`` is the number of images in one pass
    (None for a streamed data set of unknown length), ``description`` names the source. ``unreadable`` names the images
    that the last pass skipped, with the reason; ``images`` counts them.
    """

    def __init__(
        self,
        batches: Batches | Stream,
        images: int | None,
        batch_size: int,
        description: str,
        max_unreadable: int = 0,
        in_step: bool = False,
    ) -> None:
        self._batches = batches
        self.images = images
        self.batch_size = batch_size
        self.description = description
        self.unreadable: list[str] = []
        self.max_unreadable = max_unreadable
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
            batches, batches.images, self.batch_size, self.description, self.max_unreadable, whole_batches
        )


def loader(
    source: str | os.PathLike[str],
    model: nn.Module,
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
            (8 x 8 pixels, 10 classes).
        model: its data configuration determines size, channels, normalisation, interpolation and crop (see
            `data_config`).
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
            or ``crop_pct``.

    Raises:
        InvalidArgument: the source does not exist, holds no images or no such split, or needs a package that is not
            installed; an image cannot be read (while iterating); a number is out of range.
    """
    name = str(source)
    batch_size = check.integer("batch_size", batch_size)
    max_images = check.integer("max_images", max_images, optional=True)
    workers = check.integer("workers", workers, 0)
    seed = check.integer("seed", seed, 0)
    max_unreadable = check.integer("max_unreadable", max_unreadable, 0)
    config = data_config(model)
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise InvalidArgument(f"model: expected 1 or 3 input channels (grey or RGB images), got {channels}")
    mode = "L" if channels == 1 else "RGB"
    if name == "digits":
        config["crop_pct"] = 1.0
        config.update(_DIGITS_TRAIN if train else {})
    prepare = _transform(config, train, transform)

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
    return ImageLoader(Batches(dataset_, order, workers), order.images, batch_size, description, max_unreadable)


def _transform(config: dict[str, Any], train: bool, extra: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    known = inspect.signature(create_transform).parameters
    for key in extra:
        if key not in known or key in ("input_size", "is_training", "use_prefetcher"):
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
