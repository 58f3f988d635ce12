"""Finds the step that an engine rewards: sizes that are multiples of it take less time than those between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from .stopwatch import Times

__all__ = ["step_of"]

# How much slower, in three of four runs, sizes between multiples must be. Less is noise, or not worth a coarser choice.
SLOWER = 0.03
_STEPS = (2, 4, 8, 16, 32, 64, 128)
# The larger ones are tried on layers of at least eight times that many units, the others from twice as many on.
_USUAL = 32

# Returns the seconds of a layer at these sizes, in runs that alternate between them, (repeats, sizes).
_Clock: TypeAlias = Callable[[Sequence[int]], Times]


def step_of(size: int, clock: _Clock, multiple: int = 1) -> int:
    """Return the step that kept counts of a layer's units should be multiples of, a power of two; 1 if none pays.

    Times at multiples of the largest step tried lie on a line. With d = 1, 2, 4, …, sizes d units above such a multiple
    are slower than the line says until d is the step. It counts if the sizes between two of its multiples are then
    slower than the line between these by more than 3 % on average, in three of four runs, and not faster than the next
    multiple, to which they would be rounded. Most engines without a step are found out by three sizes.

    Args:
        size: units of the whole layer.
        clock: measures the layer at several sizes.
        multiple: the layer's sizes are multiples of this in any case.
    """
    steps = [step for step in _STEPS if step // 2 % multiple == 0 and step * (2 if step <= _USUAL else 8) <= size]
    if not steps:
        return 1
    low = (size // steps[-1] - 1) * steps[-1]
    for step in steps:
        if not _slower(clock, low, [low + step // 2], low + steps[-1]):
            # The half of the first is no step: it is what all sizes are multiples of.
            found = step // 2 if step > steps[0] else 1
            break
    else:
        found = steps[-1]
    if found == 1:
        return 1
    between = sorted({multiple, found // 2, found - multiple})
    return found if _slower(clock, low, [low + each for each in between], low + found, rounded=True) else 1


def _slower(clock: _Clock, low: int, between: Sequence[int], high: int, *, rounded: bool = False) -> bool:
    """Return whether the sizes between two others are slower than the line through these.

    With ``rounded``, they must not be faster than the larger of the two either.
    """
    times = clock((low, *between, high))
    share = (np.asarray(between) - low) / (high - low)
    line = times[:, :1] + share * (times[:, -1:] - times[:, :1])
    above = (times[:, 1:-1] / line).mean(axis=1) - 1
    ahead = times[:, -1] / times[:, 1:-1].mean(axis=1) - 1
    return bool(np.quantile(above, 0.25) > SLOWER) and not (rounded and bool(np.median(ahead) > SLOWER))
