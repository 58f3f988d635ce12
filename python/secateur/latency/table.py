"""How long a pruned model will take: a table of measured layers, interpolated, and the rounds that make it true."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import check
from ..anatomy import Anatomy
from ..anatomy.costs import Sizes
from ..anatomy.fingerprint import Fingerprint
from ..errors import InvalidArgument
from ..files import container, documents
from ..statistics.settings import Float
from .machine import Machine

__all__ = ["LatencyTable"]

# Format 2 knows uneven sizes and places that may be empty, format 3 engines, of which older ones had two.
_FORMAT = 3
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
    ``batch_size`` images of ``input_size`` (channels, height, width) in ``dtype``, run by the engine ``runtime`` of
    version ``runtime_version``.
    """

    model: Fingerprint
    input_size: tuple[int, int, int]
    batch_size: int
    dtype: str
    runtime: str
    runtime_version: str
    machine: Machine
    layers: tuple[Layer, ...]
    scale: float
    overhead: float

    @property
    def compiled(self) -> bool:
        """Was torch.compile the engine?"""
        return self.runtime == "torch.compile"

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
        return float(self.seconds(anatomy, sizes, {})[0])

    def seconds(self, anatomy: Anatomy, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        """Seconds of one batch at ``base``, with the groups of ``sizes`` at each of these in turn: (n,)."""
        wanted: dict[str, int | Sizes] = {**anatomy.sizes, **base, **sizes}
        found = np.zeros(len(next(iter(sizes.values()), (0,))))
        for layer in self.layers:
            # Most blocks of a choice have the same sizes: each is looked up once.
            times: dict[tuple[Any, ...], Float] = {}
            for place in layer.places or ({},):
                at = {axis: self._size(axis, place, wanted, layer.grid) for axis in layer.grid.axes}
                key = tuple(at[axis] if isinstance(at[axis], int) else axis for axis in at)
                if key not in times:
                    times[key] = layer.at(at)
                found = found + times[key] * (np.asarray(wanted.get(place.get(PRESENT, ""), 1)) > 0)
        return self.scale * found + self.overhead

    @staticmethod
    def _size(axis: str, place: Mapping[str, str], wanted: Mapping[str, int | Sizes], grid: Grid) -> int | Sizes:
        # A model that cannot lose width has no group of it, and one level in the table.
        return wanted.get(place.get(axis, axis), grid.axes[axis][-1])

    def require(self, anatomy: Anatomy, batch_size: int | None = None, runtime: str | None = None) -> None:
        """Refuse another model, batch size or engine.

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
        if runtime not in (None, self.runtime):
            raise InvalidArgument(f"latency_table: expected one of runtime {runtime!r}, got one of {self.runtime!r}")

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
            "runtime": self.runtime,
            "runtime_version": self.runtime_version,
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
            raise InvalidArgument(f"path: expected a secateur latency table, got {path}, which is not a file")
        try:
            outer = documents.read_json(path)
            if not isinstance(outer, dict) or outer.get("secateur") != "latency table":
                raise ValueError("another kind of file")
            if outer["format"] > _FORMAT:
                raise ValueError(f"format {outer['format']}, newer than {_FORMAT}: update secateur")
            values = outer["table"]
            if outer["sha256"] != _digest(values):
                raise ValueError("one that does not match its checksum")
            channels, height, width = values["input_size"]
            machine = Machine.from_dict(values["machine"])
            if "runtime" not in values:
                runtime, version = "torch.compile" if values["compiled"] else "torch", machine.pytorch
            else:
                runtime, version = values["runtime"], values["runtime_version"]
            return cls(
                model=Fingerprint.from_dict(values["model"]),
                input_size=(channels, height, width),
                batch_size=check.integer("batch_size", values["batch_size"]),
                dtype=str(values["dtype"]),
                runtime=str(runtime),
                runtime_version=str(version),
                machine=machine,
                layers=tuple(Layer.from_dict(each) for each in values["layers"]),
                scale=float(values["scale"]),
                overhead=float(values["overhead"]),
            )
        except UnicodeDecodeError as error:
            raise InvalidArgument(
                f"{path.name}: expected a secateur latency table, got a file that is not text"
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise InvalidArgument(f"{path.name}: expected a secateur latency table, got {error}") from error

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.batch_size, *self.input_size)))
        grids = [grid for layer in self.layers for grid in (layer.grid, layer.uneven) if grid is not None]
        count = sum(grid.seconds.size for grid in grids)
        version = "" if self.runtime_version == self.machine.pytorch else f" {self.runtime_version}"
        times = f"{self.model.architecture}: {count} layer times, {shape} {self.dtype}"
        return f"{times}, by {self.runtime}{version}, on {self.machine}"


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
