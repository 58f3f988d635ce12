"""Latency as a cost: what a latency table predicts for one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..anatomy import Anatomy
from ..anatomy.costs import Sizes
from ..statistics.settings import Float
from .table import LatencyTable


@dataclass(frozen=True)
class Latency:
    """A table's prediction for one model, as a cost.

    ``slope`` and ``offset`` correct ratios to the dense model by measurements: slope · predicted + offset.
    """

    table: LatencyTable
    anatomy: Anatomy
    slope: float = 1.0
    offset: float = 0.0
    name: str = field(default="latency", init=False)

    @cached_property
    def dense(self) -> float:
        """Predicted seconds of the model to be pruned; not corrected, since corrections apply to ratios to it."""
        return float(self.table.seconds(self.anatomy, {}, {}, self.anatomy.last_block)[0])

    def ratio(self, sizes: Mapping[str, int]) -> float:
        """Return the predicted fraction of the dense model's time, corrected."""
        return self.total(sizes) / self.dense

    def total(self, sizes: Mapping[str, int]) -> float:
        """Return the predicted seconds, corrected."""
        return float(self.along(sizes, {})[0])

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        """Return corrected seconds, (n,): ``base``, with the groups of ``sizes`` at each of n sizes in turn."""
        result: Float = self.slope * self.table.seconds(self.anatomy, base, sizes) + self.offset * self.dense
        return result
