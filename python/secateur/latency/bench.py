"""Measures the inference speed of a model, alone or in alternation with another one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import check
from ..data.model_input import bare, data_config, graph_input, input_dtype, is_graph
from ..errors import InvalidArgument
from ..runtime.devices import borrowed, place_for, runnable
from ..runtime.progress import progress
from .runtimes.registry import chosen
from .stopwatch import in_turn, prepared, quartiles, torch_threads_set, warm

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Benchmark", "bench"]


@dataclass(frozen=True)
class Benchmark:
    """Medians over the repeats, with their first and third quartiles.

    ``milliseconds`` is the time of one batch, ``images_per_second`` the batch size divided by that time. ``speedup`` is
    the median ratio reference / model of paired runs, more than 1 if the model is faster. Fields about the reference
    are None without one.
    """

    images_per_second: float
    milliseconds: float
    quartiles: tuple[float, float]
    reference_images_per_second: float | None
    reference_milliseconds: float | None
    reference_quartiles: tuple[float, float] | None
    speedup: float | None
    speedup_quartiles: tuple[float, float] | None
    batch_size: int
    input_size: tuple[int, int, int]
    repeats: int
    threads: int
    device: str
    runtime: str = "torch"
    reference_runtime: str | None = None

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in (self.batch_size, *self.input_size))
        low, high = self.quartiles
        line = f"{self.images_per_second:,.1f} images/s ({self.milliseconds:.2f} ms [{low:.2f}, {high:.2f}])"
        if self.speedup is not None and self.speedup_quartiles is not None:
            low, high = self.speedup_quartiles
            line += f", reference {self.reference_images_per_second:,.1f} images/s"
            if self.reference_runtime not in (None, self.runtime):
                line += f" by {self.reference_runtime}"
            line += f", {self.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        return f"{line}  {shape} on {self.device} by {self.runtime}, {self.threads} threads, {self.repeats} repeats"


def bench(
    model: nn.Module | torch.export.ExportedProgram,
    reference: nn.Module | torch.export.ExportedProgram | None = None,
    *,
    batch_size: int = 32,
    input_size: int | Sequence[int] | None = None,
    repeats: int = 15,
    warmup: int = 3,
    threads: int | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,  # noqa: A002  # torch's own word for it
    runtime: str | None = None,
    reference_runtime: str | None = None,
) -> Benchmark:
    """Time inference on random images; with a reference, alternate the two, so that a busy machine slows both.

    Modes, devices and torch's number of threads are restored afterwards.

    Args:
        model: the model; it takes images (B, C, H, W). A compiled one is timed as it is, as is an exported
            program, its module, or one scripted or traced by torch.jit, for the batch size that it was made for.
        reference: a model to compare with, usually the dense one.
        batch_size: images per batch.
        input_size: side, (height, width) or (channels, height, width) in pixels; the model's own by default.
        repeats: measured pairs; each sample is as many batches as fill 20 ms.
        warmup: batches before the first measured one, for each model.
        threads: number of torch threads; unchanged by default.
        device: where to run; the model's own by default.
        compile: time the models compiled by ``torch.compile``, as with ``runtime="torch.compile"``.
        runtime: the engine that runs the models: "torch" (the default), "torch.compile", or another registered one; the
            models themselves are not changed.
        reference_runtime: the engine that runs the reference; ``runtime`` by default. What 8 bits bring on top of a
            cut: ``bench(pruned, dense, runtime="openvino-int8", reference_runtime="openvino")``.

    Raises:
        InvalidArgument: a number is out of range, there is no such device or engine, a model is not a module or does
            not take the input, or ``reference_runtime`` without a reference.
        Unsupported: the engine does not run on this device or in the models' type.
    """
    batch_size = check.integer("batch_size", batch_size)
    repeats = check.integer("repeats", repeats)
    warmup = check.integer("warmup", warmup, 0)
    threads = check.integer("threads", threads, optional=True)
    engine = chosen(runtime, compile)
    if reference_runtime is not None and reference is None:
        raise InvalidArgument(f"reference_runtime: expected None without a reference, got {reference_runtime!r}")
    engines = [engine, engine if reference_runtime is None else chosen(reference_runtime, argument="reference_runtime")]
    model, reference = runnable(model), None if reference is None else runnable(reference, "reference")
    place = place_for(model, device)
    if reference is not None:
        place_for(reference, argument="reference")
    size = _input_size(model, input_size)
    models = [model] if reference is None else [model, reference]
    # What another engine than torch runs is the model itself.
    models = [each if run_by.name == "torch" else bare(each) for each, run_by in zip(models, engines, strict=False)]
    with ExitStack() as stack:
        stack.enter_context(torch_threads_set(threads))
        for each in models:
            stack.enter_context(borrowed(each, place))
        stack.enter_context(torch.inference_mode())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, *size, generator=generator, device="cpu").to(place)
        inputs = [images.to(input_dtype(each)) for each in models]
        runs, loops = [], []
        for run_by, each, batch, name in zip(engines, models, inputs, _NAMES, strict=False):
            runs.append(prepared(run_by, each, batch, name))
            loops.append(warm(runs[-1], batch, warmup))
        with progress(repeats, "bench", unit="repeats") as advance:
            times = in_turn(runs, inputs, loops, repeats, advance)
        used = torch.get_num_threads()
    medians = np.median(times, axis=0)
    ratios = times[:, 1] / times[:, 0] if reference is not None else None
    return Benchmark(
        images_per_second=float(batch_size / medians[0]),
        milliseconds=float(1e3 * medians[0]),
        quartiles=quartiles(1e3 * times[:, 0]),
        reference_images_per_second=None if ratios is None else float(batch_size / medians[1]),
        reference_milliseconds=None if ratios is None else float(1e3 * medians[1]),
        reference_quartiles=None if ratios is None else quartiles(1e3 * times[:, 1]),
        speedup=None if ratios is None else float(np.median(ratios)),
        speedup_quartiles=None if ratios is None else quartiles(ratios),
        batch_size=batch_size,
        input_size=size,
        repeats=repeats,
        threads=used,
        device=str(place),
        runtime=engine.name,
        reference_runtime=None if reference is None else engines[1].name,
    )


_NAMES = ("model", "reference")


def _input_size(model: nn.Module, given: int | Sequence[int] | None) -> tuple[int, int, int]:
    if given is None:
        return _own_size(model)
    sizes: tuple[Any, ...] = tuple(given) if isinstance(given, Sequence) else (given, given)
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes)
    if len(sizes) not in (2, 3) or not whole:
        raise InvalidArgument(
            f"input_size: expected a side, (height, width) or (channels, height, width), got {given!r}"
        )
    channels, height, width = sizes if len(sizes) == 3 else (_own_size(model, channels_only=True)[0], *sizes)
    return channels, height, width


def _own_size(model: nn.Module, *, channels_only: bool = False) -> tuple[int, int, int]:
    shape = graph_input(model)
    if is_graph(model) and (shape is None or (shape[1] if channels_only else min(shape[1:])) < 0):
        raise InvalidArgument(
            f"input_size: expected (channels, height, width), which {type(bare(model)).__name__} does not tell, got "
            + ("no channels" if channels_only else "none")
        )
    channels, height, width = data_config(model)["input_size"] if shape is None else shape[1:]
    return channels, height, width
