"""The order of images: it depends only on the seed and the epoch, and is divided among the ranks of a job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Order", "mix"]


class Order:
    """Batches of (epoch, image index), a function of seed and epoch; with several ``ranks``, the share of ``rank``.

    A share is either a part of every batch of ``ranks * batch_size``, or every ``ranks``-th batch.
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
            # The seed selects the images; seed and epoch determine their order.
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
        # A last batch that is too small for all ranks is dropped: no rank can train on an empty one.
        return whole + (rest >= self._ranks)

    @property
    def images(self) -> int:
        """The number of images of this rank in one pass."""
        if self._whole_batches:
            last = -(-self._images // self._batch_size) - 1
            missing = (last + 1) * self._batch_size - self._images if last % self._ranks == self._rank else 0
            return len(self) * self._batch_size - missing
        whole, rest = divmod(self._images, self._batch_size * self._ranks)
        last = -(-(rest - self._rank) // self._ranks) if rest >= self._ranks else 0
        return whole * self._batch_size + last

    def sharded(self, rank: int, ranks: int, whole_batches: bool) -> Order:
        """Return the share of one rank, at the same epoch."""
        order = Order(self._available, self._batch_size, self._images, self._seed, rank, ranks, whole_batches)
        order.epoch = self.epoch
        return order


def _permutation(count: int, *entropy: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(*entropy)), device="cpu")


def mix(*entropy: int) -> int:
    """Combine several numbers to one seed of 63 bits."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
