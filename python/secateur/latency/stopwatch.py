"""Times models in alternation, so that a slow minute of the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import Error, InvalidArgument
from ..runtime.progress import Advance
from .agreement import difference, largest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from .runtimes.base import Runtime


Times: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


# Shorter samples would measure the clock and the scheduler.
SHORTEST_SAMPLE_S = 0.02
# Tolerances relative to the largest output: an engine may round differently, but must compute the same.
_FAR = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.2}


def in_turn(
    models: Sequence[Callable[[Tensor], object]],
    inputs: Sequence[Tensor],
    loops: Sequence[int],
    repeats: int,
    advance: Advance,
) -> Times:
    """Time models one after the other, repeatedly; return the seconds of one batch, (repeats, models).

    Args:
        models: callables, each of which takes its batch from ``inputs``.
        inputs: one batch for each model.
        loops: number of batches per sample, for each model.
        repeats: samples of each model.
        advance: called after every repeat.
    """
    times = np.empty((repeats, len(models)))
    for repeat in range(repeats):
        # Reverse the order every time: the second finds warmer caches and a hotter chip.
        for index in range(len(models))[:: -1 if repeat % 2 else 1]:
            times[repeat, index] = _sample(models[index], inputs[index], loops[index])
        advance(1)
    return times


def prepared(runtime: Runtime, model: nn.Module, images: Tensor, name: str) -> Callable[[Tensor], object]:
    """Return a callable that runs the model on an engine, after comparing its first output with the model's.

    Raises:
        InvalidArgument: the model fails on such images (``name`` is the argument that held it); or only the engine
            fails, or computes something else; or the engine itself raises this.
        Unsupported: the engine itself raises this.
    """
    try:
        run = runtime.prepare(model, images)
        found = run(images)
    except Error:
        raise
    except Exception as error:  # engines can raise anything
        _require_takes(model, images, name)
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise InvalidArgument(f"runtime: expected one that runs the {name}, got {runtime.name}'s {reason}") from error
    if run is not model:
        expected = _require_takes(model, images, name)
        if isinstance(expected, Tensor):
            apart = difference(found, expected)
            most = getattr(runtime, "tolerance", _FAR.get(expected.dtype, 0.0))
            if not apart <= most * largest(expected):
                raise InvalidArgument(
                    f"runtime: expected one that computes what the {name} does, got outputs of {runtime.name} that "
                    f"differ by {apart:.3g}"
                )
    return run


def _require_takes(model: nn.Module, images: Tensor, name: str) -> object:
    """Return the output of the model, or refuse a model that fails on the images."""
    try:
        return model(images)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        shape = tuple(images.shape)
        raise InvalidArgument(
            f"{name}: expected a model that takes images of {shape}, got one that fails ({error})"
        ) from error


def warm(run: Callable[[Tensor], object], images: Tensor, warmup: int) -> int:
    """Run the warm-up and return the number of batches per sample."""
    for _ in range(warmup):
        run(images)
    return max(1, int(np.ceil(SHORTEST_SAMPLE_S / _sample(run, images, 1))))


def _sample(model: Callable[[Tensor], object], images: Tensor, batches: int) -> float:
    """Return the seconds per batch, the mean over ``batches``."""
    _wait(images.device)
    start = time.perf_counter()
    for _ in range(batches):
        model(images)
    _wait(images.device)
    return (time.perf_counter() - start) / batches


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def quartiles(values: Times) -> tuple[float, float]:
    """Return the first and third quartile."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(low), float(high)


@contextmanager
def torch_threads_set(count: int | None) -> Iterator[None]:
    """Set torch's number of threads while the block runs; None leaves it unchanged."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
