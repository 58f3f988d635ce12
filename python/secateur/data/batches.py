"""Makes batches from a source: decodes and transforms images, reports unreadable ones, cuts streams to length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from .. import core
from ..errors import first_line
from ..runtime import generators
from .order import Order, mix

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from PIL import Image
    from torch import Tensor

    from .sources import Reader

__all__ = ["Batches", "ByPosition", "Images", "Stream"]


class Images(Dataset["tuple[Tensor, int] | str"]):
    """Decoded, transformed images by (epoch, index)."""

    def __init__(self, reader: Reader, transform: Callable[[Image.Image], Tensor], mode: str, seed: int | None) -> None:
        self._reader = reader
        self._transform = transform
        self._mode = mode
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        """Return the image and its class, or a text with its name and the reason if it cannot be read."""
        epoch, index = key
        try:
            image, target = self._open(index)
        except Exception as error:  # Pillow's decoders raise any exception
            # timm would take the next image instead, and so count it twice. The text is returned, not raised,
            # because a worker process wraps exceptions in its own traceback.
            reason = first_line(error)
            return f"{self._name(index)!r} ({reason})"
        if self._seed is None:
            return self._transform(image), target
        with _seeded(mix(self._seed, epoch, index)):
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


class Batches:
    """Batches from a map-style source, by torch's loader."""

    def __init__(self, dataset: Images, order: Order, workers: int) -> None:
        self._dataset = dataset
        self._workers = workers
        self._order = order
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # for the workers' seeds, else drawn from the caller's generator
        )

    def __iter__(self) -> Iterator[Any]:
        return _on_host(self._loader)

    def __len__(self) -> int:
        return len(self._order)

    def set_epoch(self, epoch: int, start: int) -> None:
        """Set the epoch of all passes, and the batches that the next one skips."""
        self._order.epoch = epoch
        self._order.start = start

    @property
    def images(self) -> int:
        """The number of images in one pass."""
        return self._order.images

    def sharded(self, rank: int, ranks: int, whole_batches: bool) -> Batches:
        """Return the share of one rank; see `ImageLoader.sharded`."""
        return Batches(self._dataset, self._order.sharded(rank, ranks, whole_batches), self._workers)


class ByPosition:
    """A transform whose randomness depends only on seed, epoch and position in the stream."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], seed: int | None) -> None:
        self._transform = transform
        self._seed = seed
        self.epoch = 0
        self.position = 0

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform the next image of the stream, (C, H, W)."""
        self.position += 1
        if self._seed is None:
            return self._transform(image)
        with _seeded(mix(self._seed, self.epoch, self.position)):
            return self._transform(image)


class Stream:
    """A streamed source: in the reader's own order, cut after the last image."""

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
        """Set the epoch of all passes, and the batches that the next one skips."""
        self._start = start
        self._dataset.transform.epoch = epoch
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _collate(samples: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    """Return images and targets of the readable samples, and the texts about unreadable ones."""
    readable = [sample for sample in samples if not isinstance(sample, str)]
    unreadable = [sample for sample in samples if isinstance(sample, str)]
    if not readable:
        return torch.empty(0, 0, 0, 0), torch.empty(0, dtype=torch.int64), unreadable
    images, targets = default_collate(readable)
    return images, targets, unreadable


def _on_host(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a loader under any default device, since torch would create its generator there."""
    with core.host_by_default():
        batches = iter(loader)
    while True:
        with core.host_by_default():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _seeded(seed: int) -> Generator[None, None, None]:
    """Seed the generators that transforms draw from while the block runs; the caller's dropout must not change."""
    with generators.kept():
        generators.seed(seed)
        yield
