"""Times models in turn, so that a slow minute of the machine slows all of them."""

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


# Shorter samples measure the clock and the scheduler.
SHORTEST_SAMPLE_S = 0.02
# Shares of the largest output: an engine may round otherwise, but has to compute the same.
_FAR = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.2}


def in_turn(
    models: Sequence[Callable[[Tensor], object]],
    inputs: Sequence[Tensor],
    loops: Sequence[int],
    repeats: int,
    advance: Advance,
) -> Times:
    """Time models one after the other, again and again: seconds of one batch, (repeats, models).

    Args:
        models: what takes its batch of ``inputs``.
        inputs: one for each model.
        loops: how many batches make a sample of each model.
        repeats: samples of each.
        advance: told of every repeat.
    """
    times = np.empty((repeats, len(models)))
    for repeat in range(repeats):
        # Turned round every time: whoever goes second finds warmer caches and a hotter chip.
        for index in range(len(models))[:: -1 if repeat % 2 else 1]:
            times[repeat, index] = _sample(models[index], inputs[index], loops[index])
        advance(1)
    return times


def prepared(runtime: Runtime, model: nn.Module, images: Tensor, name: str) -> Callable[[Tensor], object]:
    """Return what runs the model on an engine, after a first run, whose output is compared with the model's.

    Raises:
        InvalidArgument: the model fails on such images (``name`` is the argument it was); or only the engine does, or
            computes something else; or what the engine itself raises.
        Unsupported: what the engine itself raises.
    """
    try:
        run = runtime.prepare(model, images)
        found = run(images)
    except Error:
        raise
    except Exception as error:  # engines raise what they like
        _require_takes(model, images, name)
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise InvalidArgument(f"runtime: expected one that runs the {name}, got {runtime.name}'s {reason}") from error
    if run is not model:
        expected = _require_takes(model, images, name)
        if isinstance(expected, Tensor):
            apart = difference(found, expected)
            if not apart <= _FAR.get(expected.dtype, 0.0) * largest(expected):
                raise InvalidArgument(
                    f"runtime: expected one that computes what the {name} does, got outputs of {runtime.name} that "
                    f"differ by {apart:.3g}"
                )
    return run


def _require_takes(model: nn.Module, images: Tensor, name: str) -> object:
    """The output of the model."""
    try:
        return model(images)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        shape = tuple(images.shape)
        raise InvalidArgument(
            f"{name}: expected a model that takes images of {shape}, got one that fails ({error})"
        ) from error


def warm(run: Callable[[Tensor], object], images: Tensor, warmup: int) -> int:
    """Run the warm-up and return how many batches make a sample."""
    for _ in range(warmup):
        run(images)
    return max(1, int(np.ceil(SHORTEST_SAMPLE_S / _sample(run, images, 1))))


def _sample(model: Callable[[Tensor], object], images: Tensor, batches: int) -> float:
    """Return the seconds of one batch, the mean over so many."""
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
    """First and third quartile."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(low), float(high)


@contextmanager
def torch_threads_set(count: int | None) -> Iterator[None]:
    """Have torch use so many threads while the block runs; None for as many as it has."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
