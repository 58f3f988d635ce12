"""What a measurement offers, where it is found by name, and what several of them do."""

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
    """More passes over the first images; ``name`` is what its sums are called, "group/name"."""

    @property
    def name(self) -> str:
        """What it is called."""

    def take(
        self, model: nn.Module, family: Family, anatomy: Anatomy, batches: Sequence[Tensor], rank: int, ranks: int
    ) -> dict[str, Float]:
        """Measure; the model is in evaluation mode.

        Args:
            model: on any device.
            family: of the model.
            anatomy: its description.
            batches: images (B, C, H, W), as the model takes them.
            rank: of several processes that share out the work, each with all images.
            ranks: how many they are.

        Returns:
            By "group/what" sums over images and, last, their number; those of all ranks are added up.
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
    """What a model outputs, in float64."""
    return output.double()
