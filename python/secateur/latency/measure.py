"""Measures a model's layers at the sizes that a cut can leave, and a planned cut against the dense model."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .. import check, core
from ..anatomy import Anatomy, LastBlock
from ..anatomy import Layer as AnatomyLayer
from ..anatomy.costs import Tokens
from ..anatomy.fingerprint import Fingerprint
from ..data.model_input import input_dtype
from ..errors import InvalidArgument
from ..families.base import Family
from ..families.registry import family_of
from ..runtime.devices import place_for
from ..runtime.progress import Advance, progress
from ..surgery.structure import Structure
from .bench import bench
from .levels import Levels, levels_for, merged_in, random_cuts
from .machine import Machine
from .runtimes.base import Runtime
from .runtimes.registry import chosen
from .steps import step_of
from .stopwatch import Times, in_turn, prepared, warm
from .table import LAST_BLOCK, MERGES, PRESENT, TOKENS, Grid, LatencyTable, Layer

__all__ = ["measure_latency", "measured_ratio"]

# A callable that runs a module on an engine, and its input.
_Run: TypeAlias = tuple[Callable[[Tensor], object], Tensor]
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# On a busy machine, runs are repeated until the relative error of the median is about _SURE: at most _MOST_REPEATS
# times, and within the seconds for a layer, or for the whole models, by which all layers are corrected.
_SURE, _MOST_REPEATS, _LAYER_S, _MODELS_S = 0.02, 4, 1.5, 30.0


@core.host_by_default()
def measure_latency(
    model: nn.Module,
    *,
    batch_size: int = 1,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,  # noqa: A002  # torch's own word for it
    runtime: str | None = None,
    groups: Iterable[str] | None = None,
    grid: Mapping[str, Sequence[int]] | None = None,
    repeats: int = 7,
    steps: bool = True,
) -> LatencyTable:
    """Measure a table that predicts how long the model takes on this machine when cut to any sizes.

    Every layer is a copy of one of the model's layers, cut as ``prune`` cuts it, with its norm and residual sum; equal
    blocks are measured once. Runs of each layer alternate with runs of one dense attention layer, the reference, and
    its time is the median of the paired ratios times the reference's median, so that a slow minute does not distort the
    table. If a layer is fast, as many copies as the model has are run one after the other, since in the model, too,
    weights come from memory. Sizes that are not multiples of 4 take longer than their neighbours, so they are measured
    separately, at fewer sizes. Finally the whole model is timed in alternation with four models whose blocks are cut at
    random, to correct what layers alone do not show. The model is not changed.

    Args:
        model: a supported timm model.
        batch_size: images per batch; 1 measures the latency of a single image.
        dtype: "float32", "float16", "bfloat16" or "float64"; the model's own by default.
        device: where to run; the model's own by default.
        compile: measure the layers compiled by ``torch.compile``, as with ``runtime="torch.compile"``.
        runtime: the engine that runs the layers: "torch" (the default), "torch.compile", or another registered one. All
            except the first prepare every layer at every size, which takes about a second each.
        groups: kinds that plans will cut ("qk", "v", "ffn", "width", "heads", "layer", "tokens"); by default all that
            can be cut, except tokens, which make two to three times as many entries. The others are measured only at
            their present size, which takes less time.
        grid: sizes to measure by kind, per head for "qk" and "v"; by default three to five sizes from an eighth or a
            quarter to all of the units, in multiples of 8 per head and 32 elsewhere. The present size of a layer is
            added. Layers with given sizes are not measured at uneven sizes in addition.
        repeats: pairs for each entry; up to four times as many if they differ much, as on a busy machine.
        steps: also find which multiples of kept counts this engine rewards, for ``plan(round_to="auto")``: of the kinds
            "qk" and "v" (together where they have one size) and "ffn", at the largest layer of each.

    Raises:
        InvalidArgument: an argument that does not fit, or a model without weights.
        Unsupported: the model is not of a supported family, or the engine does not run on this device or in this type.
    """
    batch_size = check.integer("batch_size", batch_size)
    repeats = check.integer("repeats", repeats)
    engine = chosen(runtime, compile)
    family = family_of(model)
    place = place_for(model, device)
    wanted = _dtype(model, dtype)
    anatomy = family.inspect(model)
    levels = levels_for(anatomy, groups, grid)
    dense = copy.deepcopy(model).requires_grad_(False).to(place, wanted).eval()
    layers = _distinct(family, dense, anatomy, levels)
    cuts = random_cuts(anatomy, levels)
    with progress(sum(layer.count for layer in layers) + 1 + steps, "latency table", unit="layers") as advance:
        clock = _Clock(layers[0].dense(batch_size), repeats, engine, advance)
        measured = [layer.measure(clock, batch_size) for layer in layers]
        found = _steps(layers, anatomy, levels, clock, batch_size) if steps else None
        advance(steps)
        images = torch.randn(batch_size, *anatomy.input_size, generator=_generator(), device="cpu").to(place, wanted)
        whole, ratios = clock.beside(dense, [_shaped(dense, sizes) for sizes in cuts], images)
    table = LatencyTable(
        model=Fingerprint.without_weights(anatomy),
        input_size=anatomy.input_size,
        batch_size=batch_size,
        dtype=str(wanted).removeprefix("torch."),
        runtime=engine.name,
        runtime_version=engine.version,
        machine=Machine.here(place),
        layers=tuple(each.times(clock.seconds) for each in measured),
        scale=1.0,
        overhead=0.0,
        steps=found,
    )
    return _calibrated(table, anatomy, whole, list(zip(cuts, ratios, strict=True)))


def _steps(
    sources: Sequence[_Source], anatomy: Anatomy, levels: Levels, clock: _Clock, batch_size: int
) -> dict[str, int]:
    """Return the step of each kind of neurons that plans will cut, at its largest layer."""
    largest: dict[str, tuple[_Source, tuple[str, ...]]] = {}
    for source in sources:
        if source.layer is None or source.merges:
            continue
        for kinds in levels.together(source.layer):
            for kind in (each for each in kinds if each in levels.named):
                if kind not in largest or source.axes[kind][-1] > largest[kind][0].axes[kind][-1]:
                    largest[kind] = source, kinds
    known: dict[tuple[int, tuple[str, ...]], int] = {}
    found = {}
    for kind, (source, kinds) in largest.items():
        key = id(source), kinds
        if key not in known:
            assert source.layer is not None
            multiple = math.lcm(*(anatomy.group(source.layer.groups[each]).multiple for each in kinds))
            known[key] = source.step(kinds, multiple, clock, batch_size)
        found[kind] = known[key]
    return found


def _calibrated(
    table: LatencyTable, anatomy: Anatomy, whole: float, cuts: Sequence[tuple[Mapping[str, int], float]]
) -> LatencyTable:
    """Make the dense model's time exact and the time saved by cuts right on average, by least squares."""
    total = table.predict(anatomy)
    saved = np.array([1 - table.predict(anatomy, sizes) / total for sizes, _ in cuts])
    found = np.array([1 - ratio for _, ratio in cuts])
    enough = bool(cuts) and float(saved.max()) > 0.05
    # Limit the factor, so that noise cannot reverse the table.
    slope = float(np.clip(saved @ found / (saved @ saved), 0.5, 2.0)) if enough else 1.0
    return replace(table, scale=slope * whole / total, overhead=(1 - slope) * whole)


def measured_ratio(
    model: nn.Module, table: LatencyTable, sizes: Mapping[str, int], repeats: int = 15
) -> tuple[float, tuple[float, float]]:
    """Return the time of a copy of the model cut to ``sizes`` over the model's: median of paired runs, quartiles.

    Batch size, type and engine are taken from the table.
    """
    dense = copy.deepcopy(model).requires_grad_(False).to(_DTYPES[table.dtype])
    cut = _shaped(dense, sizes)
    found = bench(cut, dense, batch_size=table.batch_size, repeats=repeats, runtime=table.runtime)
    assert found.speedup is not None
    assert found.speedup_quartiles is not None
    low, high = found.speedup_quartiles
    return 1 / found.speedup, (1 / high, 1 / low)


def _shaped(dense: nn.Module, sizes: Mapping[str, int]) -> nn.Module:
    cut = copy.deepcopy(dense)
    Structure(sizes, last_block=family_of(dense).inspect(dense).default_last_block).apply(cut)
    return cut


class _Clock:
    """Times modules on an engine, each in alternation with one reference."""

    def __init__(self, reference: tuple[nn.Module, Tensor], repeats: int, runtime: Runtime, advance: Advance) -> None:
        self._repeats, self._runtime, self._advance = repeats, runtime, advance
        self._seconds: list[float] = []
        self._reference = self.prepared(*reference)
        # An engine that compiles or exports would do so with every copy of a layer.
        self._copied = self._reference[0] is reference[0]

    def ratio(self, module: nn.Module, x: Tensor) -> float:
        """Return the median of the paired ratios of a module's time to the reference's."""
        times = self._in_turn([self.prepared(module, x), self._reference], _LAYER_S)
        self._seconds += times[:, 1].tolist()
        self._advance(1)
        return float(np.median(times[:, 0] / times[:, 1]))

    def beside(self, model: nn.Module, others: Sequence[nn.Module], images: Tensor) -> tuple[float, list[float]]:
        """Return the seconds per batch of a model, and the median paired ratios of the other models' times to it."""
        times = self._in_turn([self.prepared(each, images) for each in (*others, model)], _MODELS_S)
        self._advance(1)
        return float(np.median(times[:, -1])), np.median(times[:, :-1] / times[:, -1:], axis=0).tolist()

    def side_by_side(self, timed: Sequence[_Run]) -> Times:
        """Return the seconds of all in turn, (repeats, modules)."""
        return self._in_turn(timed, _LAYER_S)

    def prepared(self, module: nn.Module, x: Tensor) -> _Run:
        with torch.inference_mode():
            return prepared(self._runtime, module.eval(), x, "model"), x

    def _in_turn(self, timed: Sequence[_Run], longest: float) -> Times:
        """Time all in turn; the last is the reference. Repeat more only until ``longest`` seconds have passed."""
        runs, inputs = [run for run, _ in timed], [x for _, x in timed]
        with torch.inference_mode():
            loops = [warm(run, x, 1) for run, x in timed]
            start = time.perf_counter()
            times = in_turn(runs, inputs, loops, self._repeats, _unheard)
            most = _MOST_REPEATS * self._repeats
            while _unsure(times) and len(times) < most and time.perf_counter() - start < longest:
                times = np.concatenate([times, in_turn(runs, inputs, loops, self._repeats, _unheard)])
        return times

    def copies(self, module: nn.Module, x: Tensor, most: int) -> int:
        """Return how many copies of a layer to run one after the other: enough for a sample, but at most ``most``."""
        if not self._copied:
            return 1
        run, _ = self.prepared(module, x)
        with torch.inference_mode():
            return min(most, warm(run, x, 1))

    @property
    def seconds(self) -> float:
        """The median time of the reference."""
        return float(np.median(self._seconds))


@dataclass(frozen=True)
class _Source:
    """One kind of layer to measure or, without ``layer``, the model without its blocks.

    ``axes`` are the sizes to measure by kind of group or name of the residual stream; ``uneven`` are the sizes that are
    not multiples of 4, or empty; ``input_size`` is the input's shape for one image without the channels of a stream.
    ``last_block`` is the form of the last block that the layer is part of. If it ``merges``, what is measured is the
    merging of tokens after the layer.
    """

    family: Family
    model: nn.Module
    block: int | None
    layer: AnatomyLayer | None
    places: tuple[Mapping[str, str], ...]
    axes: Mapping[str, tuple[int, ...]]
    uneven: Mapping[str, tuple[int, ...]]
    input_size: tuple[int, ...]
    last_block: LastBlock = "whole"
    merges: bool = False

    @property
    def count(self) -> int:
        return sum(math.prod(len(each) for each in axes.values()) for axes in (self.axes, self.uneven) if axes)

    def dense(self, batch_size: int) -> tuple[nn.Module, Tensor]:
        return self.cut({axis: levels[-1] for axis, levels in self.axes.items()}, batch_size)

    def cut(self, sizes: Mapping[str, int], batch_size: int) -> tuple[nn.Module, Tensor]:
        """Return a copy of the layer with these sizes, and a random input."""
        lone = self.family.alone(self.model, self.block)
        layer = None if self.layer is None else _counterpart(self.family.inspect(lone), self.layer)
        names = {} if layer is None else layer.groups
        smaller = {axis: size for axis, size in sizes.items() if axis != TOKENS and size < self.axes[axis][-1]}
        Structure({names.get(axis, axis): size for axis, size in smaller.items()}).apply(lone)
        module = lone
        if self.merges:
            module = self.family.merging(lone, 0)
        elif layer is not None:
            module = self.family.layers(lone, self.last_block)[layer.name]
        size = self.input_size
        if layer is not None:
            size = (sizes.get(TOKENS, self.input_size[0]), sizes[layer.stream])
        like = next(lone.parameters())
        return module, torch.randn(batch_size, *size, generator=_generator(), device="cpu").to(like)

    def measure(self, clock: _Clock, batch_size: int) -> Layer:
        """Return times in units of the clock's reference."""
        copies = clock.copies(*self.dense(batch_size), most=1 if self.merges else len(self.places) or 1)

        def grid(axes: Mapping[str, tuple[int, ...]]) -> Grid:
            ratios = np.empty([len(levels) for levels in axes.values()])
            for corner in np.ndindex(*ratios.shape):
                sizes = {axis: levels[index] for (axis, levels), index in zip(axes.items(), corner, strict=True)}
                module, x = self.cut(sizes, batch_size)
                stack = module if copies == 1 else nn.Sequential(*(copy.deepcopy(module) for _ in range(copies)))
                ratios[corner] = clock.ratio(stack, x) / copies
            return Grid(axes, ratios).monotone()

        return Layer(self.places, grid(self.axes), grid(self.uneven) if self.uneven else None)

    def step(self, axes: Sequence[str], multiple: int, clock: _Clock, batch_size: int) -> int:
        """Return the step of sizes that the engine rewards along these axes, which keep one size."""
        dense = {axis: levels[-1] for axis, levels in self.axes.items()}
        runs: dict[int, _Run] = {}

        def seconds(sizes: Sequence[int]) -> Times:
            for size in sizes:
                if size not in runs:
                    runs[size] = clock.prepared(*self.cut({**dense, **dict.fromkeys(axes, size)}, batch_size))
            return clock.side_by_side([runs[size] for size in sizes])

        return step_of(dense[axes[0]], seconds, multiple)


def _distinct(family: Family, dense: nn.Module, anatomy: Anatomy, levels: Levels) -> list[_Source]:
    """Return every kind of layer once: the first block's attention first, the parts around the blocks last."""
    forms = list(dict.fromkeys((anatomy.last_block, anatomy.default_last_block)))
    modules = {form: family.layers(dense, form) for form in forms}
    # A stream whose channels cannot be cut has no group.
    widths = {layer.stream: anatomy.shapes[f"{layer.writer}.weight"][0] for layer in anatomy.layers.values()}
    found: dict[tuple[object, ...], _Source] = {}
    last = len(family.blocks(dense)) - 1
    for layer in (*anatomy.attention, *anatomy.ffn):
        block = anatomy.group(layer.name).block
        sizes = {axis: anatomy.sizes[group] for axis, group in layer.groups.items()}
        for form in forms if block == last else forms[:1]:
            pooled = form == "pooled" and block == last
            place = {**layer.groups, PRESENT: layer.name}
            if anatomy.pooled_products is not None and block == last:
                place[LAST_BLOCK] = form
            # A pooled block's FFN gets prefix tokens alone.
            alone = pooled and layer in anatomy.ffn
            there = family.prefix_tokens(dense) if alone else anatomy.tokens_of[layer.name]
            fewer = there if levels.merging and isinstance(there, Tokens) else None
            number = anatomy.counted(there)
            if fewer is not None:
                place[TOKENS] = layer.name
            key = (repr(modules[form][layer.name]), layer.stream, number, fewer is None, *sizes.items())
            if key in found:
                found[key] = replace(found[key], places=(*found[key].places, place))
                continue
            axes, uneven = levels.of({layer.stream: layer.stream, **layer.groups}, widths, fewer, few=pooled)
            found[key] = _Source(
                family, dense, block, layer, (place,), axes, uneven, (number,), "pooled" if pooled else "whole"
            )
    sources = list(found.values())
    if levels.merging and merged_in(anatomy):
        sources.append(_merging(family, dense, anatomy, levels, widths))
    axes, uneven = levels.of(dict(zip(widths, widths, strict=True)), widths)
    return [*sources, _Source(family, dense, None, None, (), axes, uneven, anatomy.input_size)]


def _merging(family: Family, dense: nn.Module, anatomy: Anatomy, levels: Levels, widths: Mapping[str, int]) -> _Source:
    """Return the merging of tokens in any block, at different numbers of tokens before it."""
    places = []
    for name in merged_in(anatomy):
        layer = anatomy.layers[anatomy.tokens[name].merges[-1].layer]
        places.append({PRESENT: layer.name, TOKENS: layer.name, MERGES: name})
    (first,) = (each for each in anatomy.attention if each.name == places[0][PRESENT])
    before = next(iter(anatomy.tokens.values()))
    axes, _ = levels.of({first.stream: first.stream}, widths, before)
    block = anatomy.group(first.name).block
    return _Source(family, dense, block, first, tuple(places), axes, {}, (axes[TOKENS][-1],), merges=True)


def _counterpart(alone: Anatomy, layer: AnatomyLayer) -> AnatomyLayer:
    """Return the same layer in a model that consists only of its block."""
    (found,) = (each for each in alone.layers.values() if each.kind == layer.kind)
    return found


def _unsure(times: Times) -> bool:
    """Return whether other programs disturb the timing so much that the median of the ratios is still uncertain."""
    low, middle, high = np.quantile(times / times[:, -1:], (0.25, 0.5, 0.75), axis=0)
    # About one standard error of the median.
    return bool(((high - low) / middle).max() > _SURE * math.sqrt(len(times)))


def _dtype(model: nn.Module, given: str | torch.dtype | None) -> torch.dtype:
    name = str(input_dtype(model) if given is None else given).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype: expected one of {', '.join(_DTYPES)}, got {given!r}")
    return _DTYPES[name]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _unheard(_count: int, /, note: str = "") -> None:
    del note
