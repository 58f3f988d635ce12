"""The interface of measurements, their registry, and helpers that several of them share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...families.base import Family, classifies
from ...registry import Registry
from ..settings import Float
from ..statistics import Statistics

__all__ = [
    "MEASURED_IMAGES",
    "Measurement",
    "Work",
    "divergence",
    "hooked",
    "measurements",
    "register",
]

MEASURED_IMAGES = 128


@dataclass(frozen=True, eq=False)
class Work:
    """What a measurement works on.

    ``model`` is in evaluation mode, on any device; ``batches`` holds the first images (B, C, H, W), in the model's type
    and on its device; ``statistics`` holds the sums over all images. Process ``rank`` of ``ranks`` does its share of
    the work, and each has all images. What ``done`` names is there already, from a run that was interrupted.
    """

    model: nn.Module
    family: Family
    anatomy: Anatomy
    batches: Sequence[Tensor]
    statistics: Statistics
    rank: int = 0
    ranks: int = 1
    done: Collection[str] = ()


class Measurement(Protocol):
    """A measurement by more passes over the first images; its sums are called "group/name" or "group/name@what"."""

    @property
    def name(self) -> str:
        """The measurement's name."""

    def take(self, work: Work) -> Iterator[Mapping[str, Float]]:
        """Measure in equally many rounds on all ranks; what a round yields is kept if a later one is interrupted.

        Yields:
            For each sum's name, sums over images and, last, the number of images; those of all ranks are added up.
        """


measurements: Registry[Measurement] = Registry(
    "measurement", "secateur.statistics.measurements", "secateur.measurements", members=("take",)
)
register = measurements.register


@contextmanager
def hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divergence(model: nn.Module, wanted: Tensor, found: Tensor) -> Tensor:
    """Return the divergence of each image's output, (B,): of class probabilities, or of features as share of variance.

    The variance is that of all images in the batch.
    """
    if classifies(model):
        first, second = wanted.log_softmax(-1), found.log_softmax(-1)
        each = (first.exp() * (first - second)).sum(-1)
        return each.reshape(len(wanted), -1).mean(1)
    spread = (wanted - wanted.flatten(0, -2).mean(0)).square().mean() if wanted.ndim > 1 else wanted.square().mean()
    return (wanted - found).square().reshape(len(wanted), -1).mean(1) / spread
