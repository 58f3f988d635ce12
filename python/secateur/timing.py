"""Measure a model's layers at the sizes that a cut can leave, and a planned cut against the dense model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from . import check
from .anatomy import Anatomy
from .bench import SHORTEST_SAMPLE_S, bench, in_turn, warm
from .cost import AttentionProduct
from .data import input_dtype
from .errors import InvalidArgument
from .evaluate import place_for
from .families import Family, family_of
from .identity import Fingerprint
from .latency import Grid, LatencyTable, Layer
from .machine import Machine
from .progress import Advance, progress
from .surgery import shape

__all__ = ["measure_latency", "measured_ratio"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the dense size, rounded to what plans round to.
_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
_MULTIPLES = {"qk": 8, "v": 8, "ffn": 32, "width": 32}


def measure_latency(
    model: nn.Module,
    *,
    batch_size: int = 1,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,  # noqa: A002  # torch's own word for it
    groups: Iterable[str] | None = None,
    grid: Mapping[str, Sequence[int]] | None = None,
    repeats: int = 7,
) -> LatencyTable:
    """Measure a table that predicts how long the model takes, cut to any sizes, on this machine as it is set now.

    Every layer is a copy of the model's own, cut as ``prune`` cuts it, with its norm and residual sum; blocks that are
    alike are measured once. Each is timed in turn with one dense attention layer, and its time is the median of the
    paired ratios times the reference's own median, so that a slow minute does not bend the table. Where a layer is
    quick, as many copies as the model has are run one behind the other: in the model, too, weights come from memory.
    The whole model, dense and cut in half, is timed the same way and says what layers do not. Nothing is changed.

    Args:
        model: a supported timm model.
        batch_size: images in a batch; 1 is the time that one image has to wait.
        dtype: "float32", "float16", "bfloat16" or "float64"; the model's own by default.
        device: where to run; the model's own by default.
        compile: measure what ``torch.compile`` makes of the layers; takes seconds for each.
        groups: kinds that plans will cut ("qk", "v", "ffn", "width"); all that the model can lose by default. The
            others are measured at the size they have, which takes less time.
        grid: sizes to measure by kind, per head for "qk" and "v"; an eighth, a quarter, a half, three quarters and all
            of the units by default, in multiples of 8 per head and 32 elsewhere. The size a layer has is added.
        repeats: pairs for each entry.

    Raises:
        InvalidArgument: an argument that does not fit, or a model without weights.
        Unsupported: the model is of no supported family.
    """
    batch_size = check.integer("batch_size", batch_size)
    repeats = check.integer("repeats", repeats)
    family = family_of(model)
    place = place_for(model, device)
    wanted = _dtype(model, dtype)
    anatomy = family.inspect(model)
    levels = _levels(anatomy, groups, grid)
    dense = copy.deepcopy(model).requires_grad_(False).to(place, wanted).eval()
    layers = _distinct(family, dense, anatomy, levels)
    half = _half(family, dense, anatomy, layers)
    with progress(sum(layer.count for layer in layers) + 2, "latency table", unit="layers") as advance:
        clock = _Clock(layers[0].dense(batch_size), repeats, compile, advance)
        measured = [layer.measure(clock, batch_size) for layer in layers]
        images = torch.randn(batch_size, *anatomy.input_size, generator=_generator()).to(place, wanted)
        whole = clock.ratio(dense, images)
        # A cut that halves everything: half of the levels, so that nothing is interpolated.
        less = whole if half is None else clock.ratio(half[0], images)
    unit = clock.seconds
    table = LatencyTable(
        model=Fingerprint.without_weights(anatomy),
        input_size=anatomy.input_size,
        batch_size=batch_size,
        dtype=str(wanted).removeprefix("torch."),
        compiled=compile,
        machine=Machine.here(place),
        layers=tuple(replace(each, grid=_scaled(each.grid, unit)) for each in measured),
        scale=1.0,
        overhead=0.0,
    )
    sums = [table.predict(anatomy, sizes) for sizes in ({}, {} if half is None else half[1])]
    scale = unit * (whole - less) / (sums[0] - sums[1]) if sums[1] < 0.95 * sums[0] else unit * whole / sums[0]
    # Noise in two single times must not turn the table over.
    scale = min(max(scale, 0.5), 2.0)
    return replace(table, scale=scale, overhead=unit * whole - scale * sums[0])


def measured_ratio(
    model: nn.Module, table: LatencyTable, sizes: Mapping[str, int], repeats: int = 15
) -> tuple[float, tuple[float, float]]:
    """Time of a copy of the model cut to ``sizes`` over the model's: median of paired runs, and quartiles.

    Batch size, type and backend are those of the table.
    """
    dense = copy.deepcopy(model).requires_grad_(False).to(_DTYPES[table.dtype])
    cut = copy.deepcopy(dense)
    shape(cut, family_of(model), sizes)
    found = bench(cut, dense, batch_size=table.batch_size, repeats=repeats, compile=table.compiled)
    assert found.speedup is not None
    assert found.speedup_quartiles is not None
    low, high = found.speedup_quartiles
    return 1 / found.speedup, (1 / high, 1 / low)


class _Clock:
    """Times modules, each in turn with one reference."""

    def __init__(self, reference: tuple[nn.Module, Tensor], repeats: int, compiled: bool, advance: Advance) -> None:
        self._reference, self._input = reference
        self._repeats, self._compiled, self._advance = repeats, compiled, advance
        self._seconds: list[float] = []

    def ratio(self, module: nn.Module, x: Tensor) -> float:
        """Median of the paired ratios of a module's time to the reference's."""
        runs: list[Callable[[Tensor], object]] = [module, self._reference]
        if self._compiled:
            # torch compiles one piece of code for a few shapes only, and then quietly no more.
            torch.compiler.reset()
            runs = [torch.compile(run, dynamic=False) for run in runs]
        inputs = [x, self._input]
        with torch.inference_mode():
            loops = [warm(run, images, 1, "model") for run, images in zip(runs, inputs, strict=True)]
            times = in_turn(runs, inputs, loops, self._repeats, _unheard)
        self._seconds += times[:, 1].tolist()
        self._advance(1)
        return float(np.median(times[:, 0] / times[:, 1]))

    def copies(self, module: nn.Module, x: Tensor, most: int) -> int:
        """How many of a layer to run behind each other: what fills a sample, but no more than the model has."""
        if self._compiled:
            return 1
        with torch.inference_mode():
            seconds = SHORTEST_SAMPLE_S / warm(module, x, 1, "model")
        return min(most, math.ceil(SHORTEST_SAMPLE_S / seconds))

    @property
    def seconds(self) -> float:
        """Median time of the reference."""
        return float(np.median(self._seconds))


@dataclass(frozen=True)
class _Source:
    """A kind of layer to measure: a block of the model, or with ``block`` None what the model is without blocks.

    ``name`` is the layer's in the model that has this block alone; ``axes`` the sizes to measure.
    """

    family: Family
    model: nn.Module
    block: int | None
    name: str
    places: tuple[Mapping[str, str], ...]
    axes: Mapping[str, tuple[int, ...]]
    input_size: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(len(levels) for levels in self.axes.values())

    def dense(self, batch_size: int) -> tuple[nn.Module, Tensor]:
        return self.cut({axis: levels[-1] for axis, levels in self.axes.items()}, batch_size)

    def cut(self, sizes: Mapping[str, int], batch_size: int) -> tuple[nn.Module, Tensor]:
        """A copy of the layer with these sizes, and an input of random numbers."""
        lone = self.family.alone(self.model, self.block)
        groups = {axis if axis == "width" else f"blocks.0.{axis}": size for axis, size in sizes.items()}
        shape(lone, self.family, {n: size for n, size in groups.items() if size < self.axes[n.rpartition(".")[2]][-1]})
        module = lone if self.block is None else self.family.layers(lone)[self.name]
        size = self.input_size if self.block is None else (*self.input_size, sizes["width"])
        like = next(lone.parameters())
        return module, torch.randn(batch_size, *size, generator=_generator()).to(like)

    def measure(self, clock: _Clock, batch_size: int) -> Layer:
        """Times in units of the clock's reference."""
        ratios = np.empty([len(levels) for levels in self.axes.values()])
        copies = clock.copies(*self.dense(batch_size), most=len(self.places) or 1)
        for corner in np.ndindex(*ratios.shape):
            sizes = {axis: levels[index] for (axis, levels), index in zip(self.axes.items(), corner, strict=True)}
            module, x = self.cut(sizes, batch_size)
            stack = module if copies == 1 else nn.Sequential(*(copy.deepcopy(module) for _ in range(copies)))
            ratios[corner] = clock.ratio(stack, x) / copies
        return Layer(self.places, Grid(self.axes, ratios).monotone())


def _distinct(
    family: Family, dense: nn.Module, anatomy: Anatomy, levels: Mapping[str, tuple[int, ...]]
) -> list[_Source]:
    """Every kind of layer once, the attention of the first block first; what stands around the blocks last."""
    modules = family.layers(dense)
    queries = {each.module: each.queries for each in anatomy.products if isinstance(each, AttentionProduct)}
    around = {anatomy.group(site.qk).block: site for site in anatomy.attention}
    found: dict[tuple[object, ...], _Source] = {}
    for name, groups in (
        *((site.name, {"qk": site.qk, "v": site.v}) for site in anatomy.attention),
        *((site.name, {"ffn": site.ffn}) for site in anatomy.ffn),
    ):
        block = anatomy.group(next(iter(groups.values()))).block
        attention = around[block]
        sizes = {axis: anatomy.sizes[group] for axis, group in groups.items()}
        key = (repr(modules[name]), attention.heads, *sizes.items())
        if key in found:
            found[key] = replace(found[key], places=(*found[key].places, groups))
            continue
        axes = {"width": levels["width"], **{axis: levels[group] for axis, group in groups.items()}}
        # Alone, a block is the first.
        lone = name.replace(f".{block}.", ".0.", 1)
        found[key] = _Source(family, dense, block, lone, (groups,), axes, (queries[attention.name],))
    rest = _Source(family, dense, None, "", (), {"width": levels["width"]}, anatomy.input_size)
    return [*found.values(), rest]


def _half(
    family: Family, dense: nn.Module, anatomy: Anatomy, layers: Sequence[_Source]
) -> tuple[nn.Module, dict[str, int]] | None:
    """The model with every group inside blocks at the middle of its levels; None where nothing can be cut."""
    sizes = {
        name: source.axes[axis][(len(source.axes[axis]) - 1) // 2]
        for source in layers
        for place in source.places
        for axis, name in place.items()
    }
    if all(anatomy.sizes[name] == size for name, size in sizes.items()):
        return None
    cut = copy.deepcopy(dense)
    shape(cut, family, sizes)
    return cut, sizes


def _levels(
    anatomy: Anatomy, groups: Iterable[str] | None, grid: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    """Sizes to measure by group name, the present size last; "width" also where it cannot be cut."""
    kinds = list(dict.fromkeys(group.kind for group in anatomy.groups))
    if isinstance(groups, str) or not isinstance(groups, (Iterable, type(None))):
        raise InvalidArgument(f"groups: expected a sequence of kinds, got {groups!r}")
    named = kinds if groups is None else list(groups)
    grid = {} if grid is None else grid
    if not isinstance(grid, Mapping):
        raise InvalidArgument(f"grid: expected a dict of sizes by kind, got {grid!r}")
    for argument, names in (("groups", named), ("grid", grid)):
        for name in names:
            if name not in kinds:
                raise InvalidArgument(f"{argument}: expected kinds of {', '.join(kinds)}, got {name!r}")
    given = {
        kind: sorted({check.integer(f"grid[{kind!r}]", size) for size in _sizes(kind, sizes)})
        for kind, sizes in grid.items()
    }
    levels: dict[str, tuple[int, ...]] = {"width": (_width(anatomy),)}
    for group in anatomy.groups:
        sizes: Sequence[int] = ()
        if group.kind in named:
            multiple = math.lcm(group.multiple, _MULTIPLES.get(group.kind, 1))
            spread = [max(1, round(part * group.size / multiple)) * multiple for part in _FRACTIONS]
            sizes = given.get(group.kind, spread)
        levels[group.name] = _up_to(sizes, group.size)
    return levels


def _sizes(kind: str, sizes: object) -> Sequence[object]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise InvalidArgument(f"grid[{kind!r}]: expected a sequence of sizes, got {sizes!r}")
    return sizes


def _up_to(sizes: Iterable[int], size: int) -> tuple[int, ...]:
    return tuple(sorted({each for each in sizes if each < size} | {size}))


def _width(anatomy: Anatomy) -> int:
    site = anatomy.attention[0]
    return anatomy.shapes[f"{site.qkv}.weight"][1]


def _dtype(model: nn.Module, given: str | torch.dtype | None) -> torch.dtype:
    name = str(input_dtype(model) if given is None else given).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype: expected one of {', '.join(_DTYPES)}, got {given!r}")
    return _DTYPES[name]


def _scaled(grid: Grid, seconds: float) -> Grid:
    return replace(grid, seconds=grid.seconds * seconds)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _unheard(_count: int, /, note: str = "") -> None:
    del note
