"""A target for latency: choose sizes by a table, measure them, correct the table, and choose again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import core
from ..anatomy import Anatomy, Group
from ..anatomy.costs import Cost
from ..budgets.allocate import allocate, check_target
from ..budgets.budget import Allocation
from ..budgets.target import Target
from ..errors import InvalidArgument
from ..latency.machine import Machine
from ..latency.measure import measure_latency, measured_ratio
from ..latency.predict import Latency
from ..latency.runtimes.registry import RUNTIMES
from ..latency.table import LatencyTable
from ..runtime.devices import device_of
from ..statistics.settings import Float

ROUNDS = 3


# Measured / target that will do, and what is aimed at: the middle, since the clock errs to both sides.
_LOW, _AIM = 0.95, 0.98


@dataclass(frozen=True)
class LatencyReport:
    """What became of a target for latency: fractions of the dense model's time of one batch.

    ``predicted`` is the table's word for the plan, after ``rounds`` − 1 corrections; ``measured`` the median of paired
    runs, with its quartiles, or None where nothing was measured: on another machine than the table's.
    """

    target: float
    predicted: float
    measured: float | None
    quartiles: tuple[float, float] | None
    rounds: int
    batch_size: int
    dtype: str
    runtime: str
    runtime_version: str
    machine: Machine

    @property
    def compiled(self) -> bool:
        """Was torch.compile the engine?"""
        return self.runtime == "torch.compile"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **vars(self),
            "compiled": self.compiled,
            "quartiles": None if self.quartiles is None else list(self.quartiles),
            "machine": self.machine.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyReport:
        """Back from JSON values."""
        low_high = values["quartiles"]
        quartiles = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        machine = Machine.from_dict(values["machine"])
        # Files from before there were engines say "compiled" alone.
        former = {"runtime": "torch.compile" if values["compiled"] else "torch", "runtime_version": machine.pytorch}
        given = {name: value for name, value in values.items() if name != "compiled"}
        return cls(**{**former, **given, "quartiles": quartiles, "machine": machine})

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"measured {self.measured:.3f}"
        batch = f"batch {self.batch_size}, {self.dtype}, {self.runtime}"
        return f"latency {self.predicted:.3f} of the dense model's predicted, {measured} ({batch})"


def meet(
    target: float,
    table: LatencyTable,
    anatomy: Anatomy,
    choose: Callable[[Cost, float], dict[str, int]],
    measure: Callable[[Mapping[str, int]], tuple[float, tuple[float, float]]] | None,
) -> tuple[dict[str, int], LatencyReport]:
    """Choose sizes by the table, measure them, correct the table by what was found, and choose again.

    Ends when measured / target lies in [0.95, 1], when nothing new is chosen, or after three rounds; then the slowest
    of what kept the target is returned, or else, with a warning, the fastest.

    Args:
        target: fraction of the dense model's time.
        table: of this model.
        anatomy: of the model that is planned for.
        choose: gives sizes whose cost is at most a fraction of the dense one.
        measure: gives the ratio to the dense model's time at some sizes, and its quartiles; None to go by the table.

    Raises:
        InvalidArgument: the target cannot be met, by the table or by what was measured; the text says what can.
    """
    cost = Latency(table, anatomy)
    tried: list[tuple[float, dict[str, int], LatencyReport]] = []
    for number in range(1, ROUNDS + 1):
        sizes = _chosen(choose, cost, target, aim=measure is not None)
        predicted = cost.ratio(sizes)
        report = LatencyReport(
            target=target,
            predicted=predicted,
            measured=None,
            quartiles=None,
            rounds=number,
            batch_size=table.batch_size,
            dtype=table.dtype,
            runtime=table.runtime,
            runtime_version=table.runtime_version,
            machine=table.machine,
        )
        if measure is None:
            return sizes, report
        if any(sizes == before for _, before, _ in tried):
            break
        # Nothing is cut: no clock is needed to know the ratio.
        measured, quartiles = (1.0, (1.0, 1.0)) if sizes == anatomy.sizes else measure(sizes)
        tried.append((measured, sizes, replace(report, measured=measured, quartiles=quartiles)))
        if _LOW * target <= measured <= target:
            break
        cost = _corrected(cost, [(each, found) for found, each, _ in tried])
    kept = [each for each in tried if each[0] <= target]
    if kept:
        return max(kept, key=lambda each: each[0])[1:]
    measured, sizes, report = min(tried, key=lambda each: each[0])
    warnings.warn(
        f"target: expected latency = {target:g}, got {measured:.3f} measured after {len(tried)} rounds", stacklevel=6
    )
    return sizes, report


def _corrected(cost: Latency, measured: Sequence[tuple[Mapping[str, int], float]]) -> Latency:
    """Bend the prediction to what was measured: by a factor at first, then by the line through the last two."""
    table = replace(cost, slope=1.0, offset=0.0)
    points = [(table.ratio(sizes), ratio) for sizes, ratio in measured[-2:]]
    predicted, found = points[-1]
    if len(points) == 2 and abs(predicted - points[0][0]) > 0.01:
        slope = (found - points[0][1]) / (predicted - points[0][0])
        # A line through two points that lie near each other may be noise alone.
        if 1 / 3 < slope < 3:
            return replace(cost, slope=slope, offset=found - slope * predicted)
    return replace(cost, slope=found / predicted, offset=0.0)


def _chosen(choose: Callable[[Cost, float], dict[str, int]], cost: Cost, target: float, *, aim: bool) -> dict[str, int]:
    if aim and target < 1:
        try:
            return choose(cost, _AIM * target)
        except InvalidArgument:
            # Within the margin of what can be reached, or out of reach: the target itself tells which.
            pass
    return choose(cost, target)


def table_for(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target,
    limits: Mapping[str, Any],
    given: LatencyTable | str | Path | None,
    batch_size: int | None,
    runtime: str | None,
) -> LatencyTable:
    """The table that was given, or one measured now; a target that it says cannot be met is refused."""
    free = check_target(anatomy, target, **limits)
    if given is None:
        kinds = dict.fromkeys(group.kind for group in free)
        table = measure_latency(model, batch_size=batch_size or 1, runtime=runtime, groups=kinds)
    else:
        table = given if isinstance(given, LatencyTable) else _loaded(given)
        table.require(anatomy, batch_size, runtime)
    # The smallest of everything: is every size in the table, and the target within reach? Before hours of work.
    allocate(anatomy, target, **limits, latency=Latency(table, anatomy), losses=lambda g: np.linspace(1, 0, g.size + 1))
    return table


def _loaded(path: str | Path) -> LatencyTable:
    try:
        return LatencyTable.load(path)
    except InvalidArgument as error:
        raise InvalidArgument(f"latency_table: {str(error).removeprefix('path: ')}") from error


def _other_engine(table: LatencyTable) -> str | None:
    """What this machine has instead of the table's engine; None if it is the same."""
    try:
        version = RUNTIMES.named(table.runtime).version
    except InvalidArgument as error:
        return f"no engine {table.runtime!r} ({error})"
    if version != table.runtime_version:
        return f"{table.runtime} {version!r} where it was {table.runtime_version!r}"
    return None


def sizes_on_the_clock(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target,
    limits: Mapping[str, Any],
    losses: Callable[[Group], Float] | None,
    table: LatencyTable,
) -> tuple[Allocation, LatencyReport]:
    """Sizes that meet a target for latency, measured where the table is this machine's and its engine's."""
    assert target.latency is not None
    difference = table.machine.difference(Machine.here(device_of(model))) or _other_engine(table)
    if difference is not None:
        warnings.warn(
            f"latency_table: expected one of this machine, got one of {table.machine}; this has {difference}. "
            "The plan is made for that machine by its table, and not measured.",
            stacklevel=5,
        )

    def choose(cost: Cost, fraction: float) -> dict[str, int]:
        with core.torch_threads():
            return allocate(anatomy, replace(target, latency=fraction), **limits, losses=losses, latency=cost).sizes

    def measure(sizes: Mapping[str, int]) -> tuple[float, tuple[float, float]]:
        return measured_ratio(model, table, sizes)

    sizes, report = meet(target.latency, table, anatomy, choose, measure if difference is None else None)
    return Allocation(sizes), report
