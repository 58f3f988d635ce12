"""Checks whether a choice of sizes meets a target, and how much of the budget is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..anatomy import Anatomy
from ..anatomy.costs import Cost, Size, Sizes
from ..statistics.settings import Float
from .target import Target


@dataclass(frozen=True)
class Count:
    """A cost that is counted: MACs or parameters."""

    name: str
    dense: float
    total: Callable[[Mapping[str, Size]], Size]

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        """Return costs, (n,): ``base``, with the groups of ``sizes`` at each of n sizes in turn."""
        found = self.total({**base, **{name: np.asarray(each) for name, each in sizes.items()}})
        return np.asarray(found, np.float64)


class Budget:
    """The limits that a choice of sizes has to keep."""

    def __init__(self, anatomy: Anatomy, target: Target, latency: Cost | None) -> None:
        costs: list[Cost] = []
        if target.macs is not None:
            costs.append(Count("macs", anatomy.macs, anatomy.macs_at))
        if target.params is not None:
            costs.append(Count("params", anatomy.params, anatomy.params_at))
        if latency is not None:
            costs.append(latency)
        self._limits = [(cost, getattr(target, cost.name) * cost.dense) for cost in costs]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Return whether these sizes keep all limits."""
        return all(cost.total(sizes) <= limit for cost, limit in self._limits)

    def room(self, sizes: Mapping[str, int]) -> Float:
        """Return what is left of each limit, as a fraction of it: (limits,)."""
        return np.array([1 - cost.total(sizes) / limit for cost, limit in self._limits])

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        """Return costs as fractions of their limits, (limits, n): as `Count.along` for each limit."""
        return np.stack([cost.along(base, sizes) / limit for cost, limit in self._limits])

    def prices(self) -> list[Float]:
        """Return the weights of the limits to try: each limit alone, and all equally."""
        count = len(self._limits)
        return [*np.eye(count), *([np.ones(count)] if count > 1 else [])]

    def reach(self, sizes: Mapping[str, int]) -> str:
        """Describe as text which fractions these sizes reach."""
        return ", ".join(
            f"{cost.name} >= {math.ceil(cost.total(sizes) / cost.dense * 1e4) / 1e4:g}" for cost, _ in self._limits
        )


@dataclass(frozen=True)
class Allocation:
    """Sizes by group and, where losses are known, their total loss and ``bound``, below which no choice can go."""

    sizes: dict[str, int]
    loss: float = math.nan
    bound: float = math.nan
