"""Which images are held back, and the order of the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

__all__ = ["HeldBack", "batched", "shuffled"]

T = TypeVar("T")


class HeldBack:
    """One image in ``every`` is held back, spread evenly, since loaders often yield one class after the other."""

    def __init__(self, share: float) -> None:
        self.every = max(2, round(1 / share))

    def holds(self, number: int) -> bool:
        """Return whether the image with this number, counted from 0, is held back."""
        return number % self.every == self.every - 1

    def count(self, images: int) -> int:
        """Return how many of the first images are held back."""
        return images // self.every


def shuffled(items: Iterable[T], size: int, generator: torch.Generator) -> Iterator[T]:
    """Yield all items, each drawn from among the next ``size`` that have not been yielded."""
    source = iter(items)
    waiting = list(islice(source, size))
    while waiting:
        place = int(torch.randint(len(waiting), (), generator=generator))
        found = waiting[place]
        following = next(source, None)
        if following is None:
            waiting[place] = waiting[-1]
            waiting.pop()
        else:
            waiting[place] = following
        yield found


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
