"""Times models in turn, so that a slow minute of the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from ..errors import InvalidArgument
from ..runtime.progress import Advance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


Times: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


# Shorter samples measure the clock and the scheduler.
SHORTEST_SAMPLE_S = 0.02


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


def compiled(modules: Sequence[nn.Module]) -> list[Callable[[Tensor], object]]:
    """Return what ``torch.compile`` makes of modules; what else the process has compiled is forgotten."""
    # torch compiles one piece of code for a few models only, and then quietly no more.
    torch.compiler.reset()
    return [torch.compile(module, dynamic=False) for module in modules]


def warm(model: Callable[[Tensor], object], images: Tensor, warmup: int, name: str) -> int:
    """Run the warm-up and return how many batches make a sample.

    Raises:
        InvalidArgument: the model fails on such images; ``name`` is the argument it was.
    """
    try:
        model(images)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        shape = tuple(images.shape)
        raise InvalidArgument(
            f"{name}: expected a model that takes images of {shape}, got one that fails ({error})"
        ) from error
    for _ in range(warmup):
        model(images)
    return max(1, int(np.ceil(SHORTEST_SAMPLE_S / _sample(model, images, 1))))


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
