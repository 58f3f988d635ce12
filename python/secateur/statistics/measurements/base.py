"""The interface of measurements, their registry, and helpers that several of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...families.base import Family
from ...registry import Registry
from ..settings import Float

__all__ = ["MEASURED_IMAGES", "Measurement", "double", "hooked", "measurements", "register"]

MEASURED_IMAGES = 128


class Measurement(Protocol):
    """A measurement by more passes over the first images; its sums are called "group/name"."""

    @property
    def name(self) -> str:
        """The measurement's name."""

    def take(
        self, model: nn.Module, family: Family, anatomy: Anatomy, batches: Sequence[Tensor], rank: int, ranks: int
    ) -> dict[str, Float]:
        """Measure on a model in evaluation mode.

        Args:
            model: the model, on any device.
            family: the family of the model.
            anatomy: the description of the model.
            batches: images (B, C, H, W), in the model's type and on its device.
            rank: number of this process among several that divide the work; each has all images.
            ranks: number of processes.

        Returns:
            For each "group/what", sums over images and, last, the number of images; those of all ranks are added up.
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


def double(output: Tensor) -> Tensor:
    """Return a model's output in float64."""
    return output.double()
