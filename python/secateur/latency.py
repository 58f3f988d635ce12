"""How long a pruned model will take: a table of measured layers, interpolated, and the rounds that make it true."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import check, container
from .anatomy import Anatomy
from .cost import Cost, Sizes
from .errors import InvalidArgument
from .identity import Fingerprint
from .machine import Machine
from .statistics import Float

__all__ = ["Latency", "LatencyTable"]

ROUNDS = 3
# Measured / target that will do, and what is aimed at: the middle, since the clock errs to both sides.
_LOW, _AIM = 0.95, 0.98
# Format 2 knows uneven sizes and places that may be empty; of format 1 it lacks nothing but these.
_FORMAT = 2
# In a place of a layer, the group that says whether the layer is there.
PRESENT = "present"
# Rows that start at multiples of so many numbers are read whole; all others take longer.
ALIGNED = 4


@dataclass(frozen=True)
class Grid:
    """Seconds of a layer at sizes of which each axis lists some, rising: ``seconds`` has one axis for each of them."""

    axes: Mapping[str, tuple[int, ...]]
    seconds: Float

    def __post_init__(self) -> None:
        shape = tuple(len(levels) for levels in self.axes.values())
        rising = all((np.diff(levels) > 0).all() and min(levels) >= 1 for levels in self.axes.values() if levels)
        if self.seconds.shape != shape or not self.seconds.size or not rising or not np.isfinite(self.seconds).all():
            raise InvalidArgument(
                f"grid: expected finite seconds at rising sizes, got {self.seconds.shape} at {dict(self.axes)}"
            )

    def monotone(self) -> Grid:
        """The same without what noise lets fall as a size grows: midway between the running maxima and minima."""
        up, down = self.seconds, self.seconds
        for axis in range(self.seconds.ndim):
            up = np.maximum.accumulate(up, axis)
            down = np.flip(np.minimum.accumulate(np.flip(down, axis), axis), axis)
        return replace(self, seconds=(up + down) / 2)

    def at(self, sizes: Mapping[str, int | Sizes], *, beyond: bool = False) -> Float:
        """Seconds, linear in each size between the two next to it, and below the least as between the least two.

        With ``beyond``, above the greatest as between the greatest two, and the same everywhere along a single level.

        Raises:
            InvalidArgument: a size that the grid does not cover; the text names it.
        """
        weighted: list[tuple[Float, tuple[Any, ...]]] = [(np.ones(()), ())]
        for name, levels in self.axes.items():
            wanted = np.asarray(sizes[name])
            outside = (wanted > levels[-1]) | ((wanted != levels[0]) & (len(levels) == 1))
            if outside.any() and not beyond:
                covered = f"1…{levels[-1]}" if len(levels) > 1 else f"{levels[0]} alone"
                raise InvalidArgument(
                    f"latency_table: expected sizes that it covers, {name} of {covered}, got {wanted.max()}"
                )
            if len(levels) == 1:
                weighted = [(weight, (*corner, 0)) for weight, corner in weighted]
                continue
            lower = np.clip(np.searchsorted(levels, wanted, "right") - 1, 0, len(levels) - 2)
            ends = np.asarray(levels)[lower], np.asarray(levels)[lower + 1]
            part = (wanted - ends[0]) / (ends[1] - ends[0])
            weighted = [
                (weight * share, (*corner, index))
                for weight, corner in weighted
                for share, index in ((1 - part, lower), (part, lower + 1))
            ]
        total = sum((weight * self.seconds[corner] for weight, corner in weighted), np.zeros(()))
        # Below the least size the line may cross zero, and no layer takes less than no time.
        return np.maximum(total, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        # Pairs: the order of the axes is that of the seconds, and JSON objects have none.
        return {"axes": [[name, list(levels)] for name, levels in self.axes.items()], "seconds": self.seconds.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """Back from JSON values."""
        axes = {name: tuple(levels) for name, levels in values["axes"]}
        return cls(axes, np.asarray(values["seconds"], np.float64))


@dataclass(frozen=True)
class Layer:
    """One kind of layer: the group of each axis but the width at every place it stands in, and its times.

    A place may also name, as "present", the group that is 0 where the layer is not there. ``places`` is empty for what
    the model is without its blocks. ``uneven`` has the same axes with levels that are no multiples of 4, where these
    were measured: such a layer takes longer than what lies between its even neighbours.
    """

    places: tuple[Mapping[str, str], ...]
    grid: Grid
    uneven: Grid | None = None

    def at(self, sizes: Mapping[str, int | Sizes]) -> Float:
        """Seconds: of the grid, of the uneven one, or between the two by the share of the sizes that are uneven.

        Raises:
            InvalidArgument: a size that the grid does not cover; the text names it.
        """
        even = self.grid.at(sizes)
        if self.uneven is None:
            return even
        uneven = [np.asarray(sizes[axis]) % ALIGNED != 0 for axis in self.uneven_axes]
        share = sum((flags.astype(float) for flags in uneven), np.zeros(())) / max(1, len(uneven))
        return even if not np.any(share) else even + share * (self.uneven.at(sizes, beyond=True) - even)

    @cached_property
    def uneven_axes(self) -> tuple[str, ...]:
        """Axes along which uneven sizes were measured."""
        if self.uneven is None:
            return ()
        return tuple(axis for axis, levels in self.uneven.axes.items() if levels != self.grid.axes[axis])

    def times(self, seconds: float) -> Layer:
        """The same in another unit."""
        grid = replace(self.grid, seconds=self.grid.seconds * seconds)
        uneven = self.uneven and replace(self.uneven, seconds=self.uneven.seconds * seconds)
        return replace(self, grid=grid, uneven=uneven)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        uneven = None if self.uneven is None else self.uneven.to_dict()
        return {"places": [dict(place) for place in self.places], **self.grid.to_dict(), "uneven": uneven}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layer:
        """Back from JSON values."""
        uneven = values.get("uneven")
        return cls(tuple(values["places"]), Grid.from_dict(values), None if uneven is None else Grid.from_dict(uneven))


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model's layers at many sizes, measured on one machine; ``predict`` adds them up.

    ``layers`` holds attention by (width, qk, v), and heads where they were asked for, and FFN by (width, ffn), with
    their norms and residual sums, once for blocks that are alike, and what stands before and after the blocks by
    (width). The model takes ``scale`` times their sum and ``overhead`` seconds, as found on the dense model and on some
    that are cut at random. All is for one batch of
    ``batch_size`` images of ``input_size`` (channels, height, width) in ``dtype``, by eager torch or, if ``compiled``,
    by torch.compile.
    """

    model: Fingerprint
    input_size: tuple[int, int, int]
    batch_size: int
    dtype: str
    compiled: bool
    machine: Machine
    layers: tuple[Layer, ...]
    scale: float
    overhead: float

    def predict(self, anatomy: Anatomy, sizes: Mapping[str, int] | None = None) -> float:
        """Seconds of one batch when each named group has the given size; of the model as it is without ``sizes``.

        Raises:
            InvalidArgument: the table is another model's, or a group that there is not, or a size that the table does
                not cover.
        """
        self.require(anatomy)
        sizes = sizes or {}
        for name in sizes:
            anatomy.group(name)
        return Latency(self, anatomy).total(sizes)

    def require(self, anatomy: Anatomy, batch_size: int | None = None) -> None:
        """Refuse another model or batch size.

        Raises:
            InvalidArgument: the table is not for these; the text names the first difference.
        """
        self.model.require(Fingerprint.without_weights(anatomy), "latency_table", strict=False)
        if self.input_size != anatomy.input_size:
            raise InvalidArgument(
                f"latency_table: expected input size {anatomy.input_size}, got a table of {self.input_size}"
            )
        if batch_size not in (None, self.batch_size):
            raise InvalidArgument(
                f"latency_table: expected one measured at batch_size {batch_size}, got one at {self.batch_size}"
            )

    def save(self, path: str | Path) -> None:
        """Write the table as JSON with a checksum, whole or not at all.

        Raises:
            InvalidArgument: the folder does not exist.
        """
        values = {
            "model": self.model.to_dict(),
            "input_size": list(self.input_size),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "compiled": self.compiled,
            "machine": self.machine.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "scale": self.scale,
            "overhead": self.overhead,
        }
        outer = {"secateur": "latency table", "format": _FORMAT, "sha256": _digest(values), "table": values}
        with container.replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(outer, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table that ``save`` wrote.

        Raises:
            InvalidArgument: no such file, another kind of file, a newer format, or a checksum that does not match.
        """
        path = Path(path)
        if not path.is_file():
            raise InvalidArgument(f"path: expected a secateur latency table, got {path}, which is no file")
        try:
            outer = container.read_json(path)
            if not isinstance(outer, dict) or outer.get("secateur") != "latency table":
                raise ValueError("another kind of file")
            if outer["format"] > _FORMAT:
                raise ValueError(f"format {outer['format']}, newer than {_FORMAT}: update secateur")
            values = outer["table"]
            if outer["sha256"] != _digest(values):
                raise ValueError("one that does not match its checksum")
            channels, height, width = values["input_size"]
            return cls(
                model=Fingerprint.from_dict(values["model"]),
                input_size=(channels, height, width),
                batch_size=check.integer("batch_size", values["batch_size"]),
                dtype=str(values["dtype"]),
                compiled=bool(values["compiled"]),
                machine=Machine.from_dict(values["machine"]),
                layers=tuple(Layer.from_dict(each) for each in values["layers"]),
                scale=float(values["scale"]),
                overhead=float(values["overhead"]),
            )
        except UnicodeDecodeError as error:
            raise InvalidArgument(
                f"{path.name}: expected a secateur latency table, got a file that is no text"
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise InvalidArgument(f"{path.name}: expected a secateur latency table, got {error}") from error

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.batch_size, *self.input_size)))
        grids = [grid for layer in self.layers for grid in (layer.grid, layer.uneven) if grid is not None]
        count = sum(grid.seconds.size for grid in grids)
        backend = "torch.compile" if self.compiled else "eager"
        return f"{self.model.architecture}: {count} layer times, {shape} {self.dtype}, {backend}, on {self.machine}"


@dataclass(frozen=True)
class Latency:
    """A table's prediction for one model, as a cost.

    ``slope`` and ``offset`` correct ratios to the dense model by what was measured: slope · predicted + offset.
    """

    table: LatencyTable
    anatomy: Anatomy
    slope: float = 1.0
    offset: float = 0.0
    name: str = field(default="latency", init=False)

    @cached_property
    def dense(self) -> float:
        """Predicted seconds of the model that is planned for; not corrected, since that corrects ratios to it."""
        return float(self._seconds({}, {})[0])

    def ratio(self, sizes: Mapping[str, int]) -> float:
        """Predicted share of the dense model's time, corrected."""
        return self.total(sizes) / self.dense

    def total(self, sizes: Mapping[str, int]) -> float:
        """Predicted seconds, corrected."""
        return float(self.along(sizes, {})[0])

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        """Predicted seconds at ``base`` but with the groups of ``sizes`` at each of these in turn, corrected: (n,)."""
        result: Float = self.slope * self._seconds(base, sizes) + self.offset * self.dense
        return result

    def _seconds(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        wanted: dict[str, int | Sizes] = {**self.anatomy.sizes, **base, **sizes}
        found = np.zeros(len(next(iter(sizes.values()), (0,))))
        for layer in self.table.layers:
            # Most blocks of a choice have the same sizes: each is looked up once.
            times: dict[tuple[Any, ...], Float] = {}
            for place in layer.places or ({},):
                at = {axis: self._size(axis, place, wanted, layer.grid) for axis in layer.grid.axes}
                key = tuple(at[axis] if isinstance(at[axis], int) else axis for axis in at)
                if key not in times:
                    times[key] = layer.at(at)
                found = found + times[key] * (np.asarray(wanted.get(place.get(PRESENT, ""), 1)) > 0)
        return self.table.scale * found + self.table.overhead

    @staticmethod
    def _size(axis: str, place: Mapping[str, str], wanted: Mapping[str, int | Sizes], grid: Grid) -> int | Sizes:
        # A model that cannot lose width has no group of it, and one level in the table.
        return wanted.get(place.get(axis, axis), grid.axes[axis][-1])


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
    compiled: bool
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **vars(self),
            "quartiles": None if self.quartiles is None else list(self.quartiles),
            "machine": self.machine.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyReport:
        """Back from JSON values."""
        low_high = values["quartiles"]
        quartiles = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        return cls(**{**values, "quartiles": quartiles, "machine": Machine.from_dict(values["machine"])})

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"measured {self.measured:.3f}"
        batch = f"batch {self.batch_size}, {'compiled, ' if self.compiled else ''}{self.dtype}"
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
            target, predicted, None, None, number, table.batch_size, table.dtype, table.compiled, table.machine
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


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
