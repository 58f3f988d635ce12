"""A table of measured layer times, which predicts the latency of a pruned model by interpolation."""

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
from ..anatomy import KINDS, Anatomy, LastBlock
from ..anatomy.costs import Sizes
from ..anatomy.fingerprint import Fingerprint
from ..errors import InvalidArgument
from ..files import container, documents
from ..statistics.settings import Float
from ..surgery.structure import check_last_block
from .machine import Machine

__all__ = ["LatencyTable"]

# Format 2 added uneven sizes and places that may be empty; format 3 added engines, of which older formats had two;
# format 4 added tokens and the two forms of the last block; format 5 added steps.
_FORMAT = 5
# Keys in a place of a layer: the group that says whether the layer is present; the layer of the model whose number of
# tokens it gets; the form of the last block that it is part of; and the group of tokens of which it merges some.
PRESENT, TOKENS, LAST_BLOCK, MERGES = "present", "tokens", "last_block", "merges"
# Rows that start at multiples of this many numbers are read fastest.
ALIGNED = 4


@dataclass(frozen=True)
class Grid:
    """Seconds of a layer at given sizes: each axis lists its sizes in ascending order and is an axis of ``seconds``."""

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
        """Return the grid without decreases from noise: midway between running maxima and running minima."""
        up, down = self.seconds, self.seconds
        for axis in range(self.seconds.ndim):
            up = np.maximum.accumulate(up, axis)
            down = np.flip(np.minimum.accumulate(np.flip(down, axis), axis), axis)
        return replace(self, seconds=(up + down) / 2)

    def at(self, sizes: Mapping[str, int | Sizes], *, beyond: bool = False) -> Float:
        """Interpolate seconds linearly in each size; below the least size, extrapolate from the least two.

        With ``beyond``, also extrapolate above the greatest size from the greatest two; along an axis with a single
        level, the time is constant.

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
        # Below the least size the line may cross zero, but no time is negative.
        return np.maximum(total, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the grid as JSON values."""
        # Pairs, because the axes are in the order of the seconds, and JSON objects have no order.
        return {"axes": [[name, list(levels)] for name, levels in self.axes.items()], "seconds": self.seconds.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """Build a grid from its JSON values."""
        axes = {name: tuple(levels) for name, levels in values["axes"]}
        return cls(axes, np.asarray(values["seconds"], np.float64))


@dataclass(frozen=True)
class Layer:
    """One kind of layer: its times, and for every place in the model the groups of its axes except the width.

    A place may also name, as "present", the group that is 0 if the layer has been removed; as "tokens", the layer that
    says how many tokens there are; as "last_block", the form of the last block in which the layer is run; and as
    "merges", the group of tokens, for a step that is run where some are merged. ``places`` is empty for the model
    without its blocks. ``uneven`` has the same axes with levels that are not multiples of 4, if these were measured:
    such a layer takes longer than interpolation between even sizes tells.
    """

    places: tuple[Mapping[str, str], ...]
    grid: Grid
    uneven: Grid | None = None

    def at(self, sizes: Mapping[str, int | Sizes]) -> Float:
        """Return seconds from the even or the uneven grid, or between the two by the share of sizes that are uneven.

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
        """The axes along which uneven sizes were measured."""
        if self.uneven is None:
            return ()
        return tuple(axis for axis, levels in self.uneven.axes.items() if levels != self.grid.axes[axis])

    def times(self, seconds: float) -> Layer:
        """Return the layer with times in another unit."""
        grid = replace(self.grid, seconds=self.grid.seconds * seconds)
        uneven = self.uneven and replace(self.uneven, seconds=self.uneven.seconds * seconds)
        return replace(self, grid=grid, uneven=uneven)

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as JSON values."""
        uneven = None if self.uneven is None else self.uneven.to_dict()
        return {"places": [dict(place) for place in self.places], **self.grid.to_dict(), "uneven": uneven}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layer:
        """Build a layer from its JSON values."""
        uneven = values.get("uneven")
        return cls(tuple(values["places"]), Grid.from_dict(values), None if uneven is None else Grid.from_dict(uneven))


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model's layers at many sizes, measured on one machine; ``predict`` adds them up.

    ``layers`` holds attention by (width, qk, v), and heads if they were asked for, and FFN by (width, ffn), with their
    norms and residual sums and once for equal blocks; the last block's layers once more where ``prune`` makes it
    compute prefix tokens only; and the parts before and after the blocks by (width). If tokens were asked for, they are
    one more axis, and the merging of tokens is a layer. The model takes ``scale`` times their sum plus ``overhead``
    seconds, as fitted on the dense model and some randomly cut ones. All times are for one batch of ``batch_size``
    images of ``input_size`` (channels, height, width) in ``dtype``, run by the engine ``runtime`` of version
    ``runtime_version``. ``steps`` maps kinds of neurons to the step that their kept counts should be multiples of on
    this engine, per head for queries, keys and values; None if they were not measured.
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
    steps: Mapping[str, int] | None = None

    @property
    def compiled(self) -> bool:
        """Whether the engine was torch.compile."""
        return self.runtime == "torch.compile"

    @cached_property
    def knows_tokens(self) -> bool:
        """Whether times depend on how many tokens are merged."""
        return any(TOKENS in place for layer in self.layers for place in layer.places)

    @cached_property
    def _forms(self) -> frozenset[str]:
        """The forms of the last block that were measured; none if it has one alone, or in an old file."""
        return frozenset(place[LAST_BLOCK] for layer in self.layers for place in layer.places if LAST_BLOCK in place)

    def predict(
        self, anatomy: Anatomy, sizes: Mapping[str, int] | None = None, last_block: LastBlock | None = None
    ) -> float:
        """Predict the seconds of one batch with the given sizes of named groups; by default, of the model as it is.

        The last block is as asked for; or else, with sizes, as ``prune`` makes it unless told otherwise.

        Raises:
            InvalidArgument: the table belongs to another model, there is no such group, or the table does not cover a
                size.
        """
        self.require(anatomy)
        if last_block is not None:
            check_last_block(last_block)
        for name in sizes or {}:
            anatomy.group(name)
        if sizes is None:
            last_block = last_block or anatomy.last_block
        return float(self.seconds(anatomy, sizes or {}, {}, last_block)[0])

    def seconds(
        self,
        anatomy: Anatomy,
        base: Mapping[str, int],
        sizes: Mapping[str, Sizes],
        last_block: LastBlock | None = None,
    ) -> Float:
        """Return seconds of one batch, (n,): ``base``, with the groups of ``sizes`` at each of n sizes in turn.

        The last block is as asked for, or else as ``prune`` makes it unless told otherwise. Tables of before format 4
        know it whole alone.

        Raises:
            InvalidArgument: the table does not cover a size or a form of the last block.
        """
        wanted: dict[str, int | Sizes] = {**anatomy.sizes, **base, **sizes}
        form = last_block or anatomy.default_last_block
        if self._forms and form not in self._forms:
            raise InvalidArgument(
                f"latency_table: expected one that knows a last block that is {form}, "
                f"got one of {', '.join(self._forms)}"
            )
        self._require_tokens(anatomy, wanted)
        found = np.zeros(len(next(iter(sizes.values()), (0,))))
        for layer in self.layers:
            # Most blocks have the same sizes, so look up each combination only once.
            times: dict[tuple[Any, ...], Float] = {}
            for place in layer.places or ({},):
                if place.get(LAST_BLOCK, form) != form:
                    continue
                at = {axis: self._size(axis, place, wanted, layer.grid, anatomy) for axis in layer.grid.axes}
                key = tuple(at[axis] if isinstance(at[axis], int) else (axis, place.get(axis)) for axis in at)
                if key not in times:
                    times[key] = layer.at(at)
                runs = np.asarray(wanted.get(place.get(PRESENT, ""), 1)) > 0
                if MERGES in place:
                    runs = runs & (np.asarray(wanted[place[MERGES]]) < anatomy.tokens[place[MERGES]].merges[-1].units)
                found = found + times[key] * runs
        return self.scale * found + self.overhead

    def _require_tokens(self, anatomy: Anatomy, wanted: Mapping[str, int | Sizes]) -> None:
        merged = [name for name in anatomy.tokens if np.any(np.asarray(wanted[name]) < anatomy.sizes[name])]
        if merged and not self.knows_tokens:
            raise InvalidArgument(
                f"latency_table: expected one that knows tokens, measured with groups of which one is 'tokens', "
                f"to merge some in {merged[0]}"
            )

    @staticmethod
    def _size(
        axis: str, place: Mapping[str, str], wanted: Mapping[str, int | Sizes], grid: Grid, anatomy: Anatomy
    ) -> int | Sizes:
        if axis == TOKENS:
            count = anatomy.tokens_of[place[TOKENS]]
            found: Any = count if isinstance(count, int) else count.at(lambda name: np.asarray(wanted[name]))
            return found if np.ndim(found) else int(found)
        # A model whose width cannot be cut has no group for it, and one level in the table.
        return wanted.get(place.get(axis, axis), grid.axes[axis][-1])

    def require(self, anatomy: Anatomy, batch_size: int | None = None, runtime: str | None = None) -> None:
        """Refuse a table for another model, batch size or engine.

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
        """Write the table as JSON with a checksum, completely or not at all.

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
            "steps": None if self.steps is None else dict(self.steps),
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
                steps=_steps(values.get("steps")),
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
        steps = "; steps " + ", ".join(f"{kind} {step}" for kind, step in self.steps.items()) if self.steps else ""
        return f"{times}, by {self.runtime}{version}, on {self.machine}{steps}"


def _steps(values: Any) -> dict[str, int] | None:
    """Read steps, in the order of the kinds; formats before 5 have none."""
    if values is None:
        return None
    unknown = [kind for kind in values if kind not in KINDS]
    if unknown:
        raise ValueError(f"steps of {unknown[0]!r}, which is no kind")
    return {kind: check.integer(f"steps[{kind!r}]", values[kind]) for kind in KINDS if kind in values}


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
