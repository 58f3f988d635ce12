"""Images for a model: folders, tars, Hugging Face data sets and scikit-learn's digits, as the model wants them.

timm's readers find the images and timm's transforms prepare them; this module adds what a measurement needs on top:
an order that depends on the seed alone, exact image counts, no image twice, and augmentation that is a function of
(seed, epoch, image), so that neither the number of worker processes nor an interruption changes a training run.
Streamed data sets are shuffled by their reader, and augmented by position in place of image.
"""

from __future__ import annotations

import importlib.util
import inspect
import tarfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from timm.data import create_dataset, create_transform
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from .. import check, core
from ..errors import InvalidArgument, Unsupported
from ..runtime import generators
from .model_input import data_config

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator

    from PIL import Image
    from torch import Tensor

__all__ = ["ImageLoader", "default_split", "loader"]

_TRAIN_FOLDERS = ("train", "training")
_EVAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test")
_HUB_PREFIXES = ("hfds", "hfids")
# Digits fill their 8 x 8 frame and are not symmetric: the full frame is kept, no mirror images, no colours to jitter.
_DIGITS_TRAIN = {"scale": (0.7, 1.0), "ratio": (0.85, 1.18), "hflip": 0.0, "color_jitter": None}


class ImageLoader(Iterable["tuple[Tensor, Tensor]"]):
    """Batches of (images (B, C, H, W) float32, targets (B,) int64) in an order fixed by seed and epoch.

    Iterating again repeats the same batches until `set_epoch` says otherwise. ``images`` is the number of images in
    one pass (None for a streamed data set of unknown length), ``description`` names the source. ``unreadable`` names
    the images that the last pass left out, and why; ``images`` counts them.
    """

    def __init__(
        self,
        batches: _Batches | _Stream,
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
            # The ranks of a job count batches.
            if len(images) > 0 or self._in_step:
                yield images, targets

    def every_batch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over as many batches as ``len`` says: one of unreadable images alone is empty, not left out.

        For what counts batches, as `finetune` does. An empty batch is images (0, 0, 0, 0) and targets (0,).
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
        return len(self._batches) if isinstance(self._batches, _Batches) else -(-self.images // self.batch_size)

    def __repr__(self) -> str:
        return f"ImageLoader({self.description}, images={self.images}, batch_size={self.batch_size})"

    def set_epoch(self, epoch: int, start: int = 0, unreadable: Iterable[str] = ()) -> None:
        """Choose the order and augmentation of the next passes; the very next pass leaves out ``start`` batches.

        It begins with ``unreadable``, the images that were left out of these batches before, which are counted and
        named again without a warning.
        """
        self._batches.set_epoch(epoch, start)
        self._before = list(unreadable)

    def sharded(self, rank: int, ranks: int, *, whole_batches: bool = False) -> ImageLoader:
        """Return a loader of one rank's share; the batches of all ranks together are those of ``ranks * batch_size``.

        Each pass gives every image to exactly one rank, as evenly as the last batch allows, except that a last batch
        of fewer images than ranks is left out. ``images`` is the number of this rank. ``finetune`` does this itself.

        With ``whole_batches`` a rank has every ``ranks``-th of this loader's own batches from number ``rank`` on, and
        nothing is left out: what is computed of a batch is the same on any number of ranks; a batch of unreadable
        images alone is empty, not left out. ``calibrate`` does this. ``max_unreadable`` counts for each rank.

        Raises:
            InvalidArgument: ``rank`` is not below ``ranks``.
            Unsupported: a streamed data set, whose length and order are the reader's own.
        """
        rank, ranks = check.integer("rank", rank, 0), check.integer("ranks", ranks)
        if rank >= ranks:
            raise InvalidArgument(f"rank: expected less than the {ranks} ranks, got {rank}")
        if isinstance(self._batches, _Stream):
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
    """Read images the way the model expects them.

    Args:
        source: A folder with one sub-folder of images per class; a ``.tar`` of such folders; ``hfds:NAME`` or, read as
            a stream, ``hfids:NAME`` for a Hugging Face data set; ``digits`` for scikit-learn's 1,797 handwritten
            digits (8 x 8 pixels, 10 classes).
        model: gives size, channels, normalisation, interpolation and crop (see `data_config`).
        split: sub-folder or split name. By default a folder that holds both a training and a validation folder is
            read from the one or the other by ``train``; digits are split in ``train`` and ``test``, half each,
            stratified and always the same; a Hugging Face data set has ``train`` and ``validation``.
        batch_size: the last batch may be smaller; nothing is dropped.
        max_images: exactly so many images, or all when there are fewer: the first ones, with ``shuffle`` a choice
            fixed by ``seed``.
        shuffle: draw the order from seed and epoch. Image folders are otherwise sorted by class.
        workers: processes that decode while the model computes; with 0 it waits for every batch. The images do not
            depend on it.
        train: use timm's random training transforms (which differ by epoch) in place of the evaluation transforms.
        seed: of order and augmentation.
        max_unreadable: leave out as many images that cannot be read or decoded in a pass, with a warning each, before
            that is an error; ``ImageLoader.unreadable`` names them. A batch is smaller by those it lacks. Not for
            ``hfids:``.
        **transform: further arguments of `timm.data.create_transform`, such as ``scale``, ``hflip``, ``auto_augment``
            or ``crop_pct``.

    Raises:
        InvalidArgument: the source is not there, holds no image or no such split, or needs a package that is not
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
    if separator and prefix in _HUB_PREFIXES:
        description = f"{name} ({split})"
        found = _hub(prefix, dataset, str(split), mode, seed, shuffle, max_images)
        if prefix == "hfids":
            if max_unreadable:
                raise InvalidArgument(f"max_unreadable: expected 0 for a streamed data set, got {max_unreadable}")
            found.transform = _ByPosition(prepare, seed if train else None)
            return _streamed(found, batch_size, max_images, workers, description)
        reader = found.reader
    elif name == "digits":
        reader = _Digits(str(split))
        description = f"digits ({split})"
    else:
        reader, description = _files(name, split)

    dataset_ = _Images(reader, prepare, mode, seed if train else None)
    order = _Order(len(reader), batch_size, max_images, seed if shuffle else None)
    return ImageLoader(_Batches(dataset_, order, workers), order.images, batch_size, description, max_unreadable)


def default_split(source: str | os.PathLike[str], *, train: bool) -> str | None:
    """Return the split that `loader` reads of a source unless told: the one for training, or the one for evaluation.

    None stands for the whole source: a tar, or a folder that does not hold both a training and a validation folder.
    """
    name = str(source)
    if name == "digits":
        return "train" if train else "test"
    if name.partition(":")[0] in _HUB_PREFIXES:
        return "train" if train else "validation"
    # Both must be there: a lone folder "train" may well be a class of vehicles.
    found = [
        next((folder for folder in folders if (Path(name) / folder).is_dir()), None)
        for folders in (_TRAIN_FOLDERS, _EVAL_FOLDERS)
    ]
    return None if None in found else found[0 if train else 1]


def _transform(config: dict[str, Any], train: bool, extra: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    known = inspect.signature(create_transform).parameters
    for key in extra:
        if key not in known or key in ("input_size", "is_training", "use_prefetcher"):
            raise InvalidArgument(f"transform: expected arguments of timm's create_transform, got {key!r}")
    prepare: Callable[[Image.Image], Tensor] = create_transform(**{**config, **extra}, is_training=train)
    return prepare


class _Reader(Protocol):
    """What timm's readers are: a sequence of (open file or image, class index)."""

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...

    def __len__(self) -> int: ...


class _Digits:
    """scikit-learn's digits with a reader's face."""

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise InvalidArgument(f"split: expected 'train' or 'test' for digits, got {split!r}")
        if importlib.util.find_spec("sklearn") is None:
            raise InvalidArgument(
                "source: expected scikit-learn to be installed for 'digits' (pip install scikit-learn), got no sklearn"
            )
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        halves = train_test_split(pixels, labels, test_size=0.5, stratify=labels, random_state=0)
        pixels, labels = (halves[0], halves[2]) if split == "train" else (halves[1], halves[3])
        self.split = split
        # Grey levels 0 ... 16 in the data set.
        self._pixels = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._labels = labels

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        from PIL import Image

        return Image.fromarray(self._pixels[index]), int(self._labels[index])

    def __len__(self) -> int:
        return len(self._labels)


def _files(name: str, split: str | None) -> tuple[_Reader, str]:
    path = Path(name)
    arguments: dict[str, Any] = {}
    if path.is_dir():
        if split is not None and not (path / split).is_dir():
            raise InvalidArgument(f"split: expected a sub-folder of {name!r}, got {split!r}")
        path = path / (split or "")
    elif path.is_file() and path.suffix == ".tar":
        if split is not None:
            raise InvalidArgument(f"split: expected none for a tar, got {split!r}")
        # timm would keep the index of a large tar as a pickle beside it.
        arguments = {"cache_tarinfo": False}
    else:
        raise InvalidArgument(
            "source: expected an image folder, a .tar, 'hfds:NAME', 'hfids:NAME' or 'digits', "
            f"got {name!r}" + ("" if path.exists() else ", which does not exist")
        )
    try:
        reader = create_dataset("", root=str(path), search_split=False, **arguments).reader
    except (RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        raise InvalidArgument(f"source: expected images in {str(path)!r}, got none ({error})") from error
    if arguments:
        weakref.finalize(reader, _close, reader.tar_state)
    return reader, str(path)


def _close(tar: Any) -> None:
    """Close what timm's reader opened, which it leaves to the garbage collector."""
    for state in (*tar.children.values(), tar):
        if state.tf is not None:
            state.tf.close()


def _hub(prefix: str, name: str, split: str, mode: str, seed: int, shuffle: bool, max_images: int | None) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise InvalidArgument(
            f"source: expected the package 'datasets' for '{prefix}:{name}' (pip install datasets), got none installed"
        )
    arguments: dict[str, Any] = {"split": split, "input_img_mode": mode}
    if prefix == "hfids":
        # A stream is shuffled by the reader itself; with one batch per image it makes exactly one pass.
        arguments.update(is_training=shuffle, seed=seed, batch_size=1)
    try:
        try:
            return create_dataset(f"{prefix}/{name}", **arguments)
        except ValueError as error:
            if prefix == "hfds" or "num_samples" not in str(error) or max_images is None or shuffle:
                raise
            return create_dataset(f"{prefix}/{name}", num_samples=max_images, **arguments)
    except Exception as error:  # whatever the hub, the disk or the network raise, it is this source that failed
        if "num_samples" in str(error):
            raise InvalidArgument(
                f"max_images: expected a number, and no shuffle, for a stream of unknown length, got {max_images}, "
                f"shuffle={shuffle} for {name!r} ({split})"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidArgument(
            f"source: expected a Hugging Face data set with a split {split!r}, got {name!r} ({reason})"
        ) from error


class _Order:
    """Batches of (epoch, image index), a function of seed and epoch; of ``ranks`` shares the one of ``rank``.

    A share is a part of every batch of ``ranks * batch_size``, or every ``ranks``-th batch.
    """

    def __init__(
        self,
        available: int,
        batch_size: int,
        max_images: int | None,
        seed: int | None,
        rank: int = 0,
        ranks: int = 1,
        whole_batches: bool = False,
    ) -> None:
        self._images = available if max_images is None else min(max_images, available)
        self._available = available
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._ranks = ranks
        self._whole_batches = whole_batches
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        indices = torch.arange(self._images, device="cpu")
        if self._seed is not None:
            # Which images is the seed's choice, in which order the epoch's as well.
            indices = _permutation(self._available, self._seed)[: self._images]
            if self.epoch > 0:
                indices = indices[_permutation(self._images, self._seed, self.epoch)]
        first, self.start = self.start, 0
        if self._whole_batches:
            for batch in indices.split(self._batch_size)[self._rank :: self._ranks][first:]:
                yield [(self.epoch, index) for index in batch.tolist()]
            return
        together = self._batch_size * self._ranks
        for batch in range(first, len(self)):
            shared = indices[batch * together : (batch + 1) * together]
            yield [(self.epoch, index) for index in shared[self._rank :: self._ranks].tolist()]

    def __len__(self) -> int:
        if self._whole_batches:
            return len(range(self._rank, -(-self._images // self._batch_size), self._ranks))
        whole, rest = divmod(self._images, self._batch_size * self._ranks)
        # No rank can train on an empty batch.
        return whole + (rest >= self._ranks)

    @property
    def images(self) -> int:
        """Of this rank, in one pass."""
        if self._whole_batches:
            last = -(-self._images // self._batch_size) - 1
            missing = (last + 1) * self._batch_size - self._images if last % self._ranks == self._rank else 0
            return len(self) * self._batch_size - missing
        whole, rest = divmod(self._images, self._batch_size * self._ranks)
        last = -(-(rest - self._rank) // self._ranks) if rest >= self._ranks else 0
        return whole * self._batch_size + last

    def sharded(self, rank: int, ranks: int, whole_batches: bool) -> _Order:
        """Return the share of a rank, at the same epoch."""
        order = _Order(self._available, self._batch_size, self._images, self._seed, rank, ranks, whole_batches)
        order.epoch = self.epoch
        return order


def _permutation(count: int, *entropy: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_mix(*entropy)), device="cpu")


def _mix(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Images(Dataset["tuple[Tensor, int] | str"]):
    """Decoded, transformed images by (epoch, index)."""

    def __init__(
        self, reader: _Reader, transform: Callable[[Image.Image], Tensor], mode: str, seed: int | None
    ) -> None:
        self._reader = reader
        self._transform = transform
        self._mode = mode
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        """Return the image and its class; of one that cannot be read its name and why."""
        epoch, index = key
        try:
            image, target = self._open(index)
        except Exception as error:  # Pillow's decoders raise what they like
            # timm would put the next image in its place, which counts that one twice. Returned, not raised: a worker
            # process wraps what it raises in its own traceback.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"{self._name(index)!r} ({reason})"
        if self._seed is None:
            return self._transform(image), target
        with _seeded(_mix(self._seed, epoch, index)):
            return self._transform(image), target

    def _open(self, index: int) -> tuple[Image.Image, int]:
        from PIL import Image

        found, target = self._reader[index]
        if isinstance(found, Image.Image):
            return found.convert(self._mode), target
        with found as file, Image.open(file) as image:
            return image.convert(self._mode), int(-1 if target is None else target)

    def _name(self, index: int) -> str:
        name = getattr(self._reader, "filename", None)
        return str(name(index)) if name is not None else f"image {index}"


@contextmanager
def _seeded(seed: int) -> Generator[None, None, None]:
    """Seed the generators that transforms draw from, and put them back: the caller's dropout is not ours to move."""
    with generators.kept():
        generators.seed(seed)
        yield


def _collate(samples: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    """Return images and targets, and what is said of samples that are none."""
    readable = [sample for sample in samples if not isinstance(sample, str)]
    unreadable = [sample for sample in samples if isinstance(sample, str)]
    if not readable:
        return torch.empty(0, 0, 0, 0), torch.empty(0, dtype=torch.int64), unreadable
    images, targets = default_collate(readable)
    return images, targets, unreadable


def _on_host(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a loader whatever the device by default, which torch's own take for that of their generator."""
    with core.host_by_default():
        batches = iter(loader)
    while True:
        with core.host_by_default():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


class _Batches:
    """A map-style source through torch's loader."""

    def __init__(self, dataset: _Images, order: _Order, workers: int) -> None:
        self._dataset = dataset
        self._workers = workers
        self._order = order
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # of the workers' seeds, else drawn from the caller's
        )

    def __iter__(self) -> Iterator[Any]:
        return _on_host(self._loader)

    def __len__(self) -> int:
        return len(self._order)

    def set_epoch(self, epoch: int, start: int) -> None:
        self._order.epoch = epoch
        self._order.start = start

    @property
    def images(self) -> int:
        return self._order.images

    def sharded(self, rank: int, ranks: int, whole_batches: bool) -> _Batches:
        return _Batches(self._dataset, self._order.sharded(rank, ranks, whole_batches), self._workers)


class _ByPosition:
    """A transform that is a function of seed, epoch and position in the stream."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], seed: int | None) -> None:
        self._transform = transform
        self._seed = seed
        self.epoch = 0
        self.position = 0

    def __call__(self, image: Image.Image) -> Tensor:
        self.position += 1
        if self._seed is None:
            return self._transform(image)
        with _seeded(_mix(self._seed, self.epoch, self.position)):
            return self._transform(image)


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
    return ImageLoader(_Stream(dataset, batch_size, images, workers), images, batch_size, description)


class _Stream:
    """A streamed source: the reader's own order, cut after the last image."""

    def __init__(self, dataset: Any, batch_size: int, images: int | None, workers: int) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._images = images
        self._workers = workers
        self._start = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self._start = self._start, 0
        left = self._images
        self._dataset.transform.position = 0
        batches: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_size=self._batch_size,
            num_workers=self._workers,
            collate_fn=_collate,
            generator=torch.Generator(),
        )
        for position, (images, targets, unreadable) in enumerate(_on_host(batches)):
            count = len(images) if left is None else min(len(images), left)
            if position >= skip:
                yield images[:count], targets[:count], unreadable
            if left is not None:
                left -= count
                if left <= 0:
                    return

    def set_epoch(self, epoch: int, start: int) -> None:
        self._start = start
        self._dataset.transform.epoch = epoch
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
