"""Meets a target for latency: choose sizes by a table, measure them, correct the table, and choose again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import core
from ..anatomy import Anatomy, Group
from ..anatomy.costs import Cost
from ..budgets.allocate import allocate, check_target
from ..budgets.budget import Allocation
from ..budgets.limits import AUTO
from ..budgets.target import Target
from ..calibration.schedules import kept_tokens, schedules
from ..errors import InvalidArgument
from ..latency.machine import Machine
from ..latency.measure import measure_latency, measured_ratio
from ..latency.predict import Latency
from ..latency.runtimes.registry import RUNTIMES
from ..latency.table import LatencyTable
from ..runtime.devices import device_of
from ..statistics.settings import Float

ROUNDS = 3


# The least measured / target that is accepted, and the aim: the middle, since the clock errs in both directions.
_LOW, _AIM = 0.95, 0.98


@dataclass(frozen=True)
class LatencyReport:
    """How a target for latency was met, as fractions of the dense model's time for one batch.

    ``predicted`` is the table's prediction for the plan, after ``rounds`` − 1 corrections; ``measured`` is the median
    of paired runs, with its quartiles, or None if nothing was measured because the table is another machine's.
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
        """Whether the engine was torch.compile."""
        return self.runtime == "torch.compile"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            **vars(self),
            "compiled": self.compiled,
            "quartiles": None if self.quartiles is None else list(self.quartiles),
            "machine": self.machine.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyReport:
        """Build a report from its JSON values."""
        low_high = values["quartiles"]
        quartiles = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        machine = Machine.from_dict(values["machine"])
        # Files from before engines existed have "compiled" only.
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
    """Choose sizes by the table, measure them, correct the table by the result, and choose again.

    Ends when measured / target lies in [0.95, 1], when no new sizes are chosen, or after three rounds. Returns the
    slowest sizes that met the target, or else, with a warning, the fastest.

    Args:
        target: fraction of the dense model's time.
        table: latency table of this model.
        anatomy: description of the model that is to be pruned.
        choose: returns sizes whose cost is at most a given fraction of the dense cost.
        measure: returns the ratio to the dense model's time at given sizes, and its quartiles; None to rely on the
            table.

    Raises:
        InvalidArgument: the target cannot be met, by the table or as measured; the text says what can be.
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
        # Where nothing changes, the ratio is known without measuring.
        same = sizes == anatomy.sizes and anatomy.last_block == anatomy.default_last_block
        measured, quartiles = (1.0, (1.0, 1.0)) if same else measure(sizes)
        tried.append((measured, sizes, replace(report, measured=measured, quartiles=quartiles)))
        if _LOW * target <= measured <= target:
            break
        cost = _corrected(cost, [(each, found) for found, each, _ in tried])
    kept = [each for each in tried if each[0] <= target]
    if kept:
        return max(kept, key=lambda each: each[0])[1:]
    measured, sizes, report = min(tried, key=lambda each: each[0])
    warnings.warn(
        f"target: expected latency = {target:g}, got {measured:.3f} measured after {len(tried)} rounds", stacklevel=8
    )
    return sizes, report


def _corrected(cost: Latency, measured: Sequence[tuple[Mapping[str, int], float]]) -> Latency:
    """Correct the prediction by the measurements: by a factor at first, then by the line through the last two."""
    table = replace(cost, slope=1.0, offset=0.0)
    points = [(table.ratio(sizes), ratio) for sizes, ratio in measured[-2:]]
    predicted, found = points[-1]
    if len(points) == 2 and abs(predicted - points[0][0]) > 0.01:
        slope = (found - points[0][1]) / (predicted - points[0][0])
        # A line through two points that are close together may be nothing but noise.
        if 1 / 3 < slope < 3:
            return replace(cost, slope=slope, offset=found - slope * predicted)
    return replace(cost, slope=found / predicted, offset=0.0)


def _chosen(choose: Callable[[Cost, float], dict[str, int]], cost: Cost, target: float, *, aim: bool) -> dict[str, int]:
    if aim and target < 1:
        try:
            return choose(cost, _AIM * target)
        except InvalidArgument:
            # The aim is out of reach; trying the target itself tells whether that is too.
            pass
    return choose(cost, target)


def table_for(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target,
    limits: Mapping[str, Any],
    given: LatencyTable | None,
    batch_size: int | None,
    runtime: str | None,
) -> LatencyTable:
    """Return the given table, or measure one now; refuse a target that the table says cannot be met."""
    # What cannot be met by any sizes cannot be met by multiples.
    free = check_target(anatomy, target, **any_multiple(limits))
    if given is None:
        kinds = dict.fromkeys(group.kind for group in free)
        table = measure_latency(
            model, batch_size=batch_size or 1, runtime=runtime, groups=kinds, steps=limits["round_to"] == AUTO
        )
    else:
        table = given
        table.require(anatomy, batch_size, runtime)
    limits = with_steps(limits, table)
    # Before hours of work, check with the smallest sizes that the table has every size and the target is within reach.
    merging = [kept_tokens(anatomy, merged) for merged in schedules(anatomy)] if any(g.of_tokens for g in free) else []
    check_target(anatomy, target, **limits, merging=merging, latency=Latency(table, anatomy))
    return table


def with_steps(limits: Mapping[str, Any], table: LatencyTable | None, anatomy: Anatomy | None = None) -> dict[str, Any]:
    """Return limits with the table's steps where ``round_to`` is "auto"; without a table yet, they stay as they are.

    Raises:
        InvalidArgument: the table has no steps, or is of another model than that of ``anatomy``.
    """
    if limits["round_to"] != AUTO or table is None:
        return dict(limits)
    if anatomy is not None:
        table.require(anatomy)
    if table.steps is None:
        raise InvalidArgument(
            'latency_table: expected one that knows steps for round_to="auto", got one without; '
            "measure it again with measure_latency"
        )
    return {**limits, "round_to": dict(table.steps)}


def any_multiple(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return limits that allow every size where the steps of "auto" are not measured yet."""
    return {**limits, "round_to": 1 if limits["round_to"] == AUTO else limits["round_to"]}


def loaded(table: LatencyTable | str | Path | None) -> LatencyTable | None:
    """Return a table from its file, if it is one.

    Raises:
        InvalidArgument: it is no such file.
    """
    if table is None or isinstance(table, LatencyTable):
        return table
    try:
        return LatencyTable.load(table)
    except InvalidArgument as error:
        raise InvalidArgument(f"latency_table: {str(error).removeprefix('path: ')}") from error


def _other_engine(table: LatencyTable) -> str | None:
    """Describe what this machine has instead of the table's engine; None if it is the same."""
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
    merging: Sequence[tuple[Mapping[str, int], float]],
    table: LatencyTable,
) -> tuple[Allocation, LatencyReport]:
    """Choose sizes that meet a target for latency; measure them if the table is of this machine and engine."""
    assert target.latency is not None
    difference = table.machine.difference(Machine.here(device_of(model))) or _other_engine(table)
    if difference is not None:
        warnings.warn(
            f"latency_table: expected one of this machine, got one of {table.machine}; this has {difference}. "
            "The plan is made for that machine by its table, without measuring.",
            stacklevel=7,
        )

    def choose(cost: Cost, fraction: float) -> dict[str, int]:
        wanted = replace(target, latency=fraction)
        with core.torch_threads():
            return allocate(anatomy, wanted, **limits, losses=losses, merging=merging, latency=cost).sizes

    def measure(sizes: Mapping[str, int]) -> tuple[float, tuple[float, float]]:
        return measured_ratio(model, table, sizes)

    sizes, report = meet(target.latency, table, anatomy, choose, measure if difference is None else None)
    # Without the loss and its bound, which is that of another fraction and of a corrected table.
    return Allocation(sizes), report
