"""Losses at every size from losses that were measured at a few."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..statistics.settings import Float

__all__ = ["losses_between"]

# Below this, a measured divergence is rounding.
_LEAST = 1e-9


def losses_between(measured: Mapping[int, float], size: int, errors: Float | None = None) -> Float:
    """Return the loss when 0 … size units stay, (size + 1,), which never rises with the size.

    A method's own error knows where the loss bends but not how much it matters, so its logarithm is corrected by what
    was measured, linearly in the size between two measured ones, and equally outside. Without errors the logarithm of
    the loss itself is linear; below the smallest measured size it goes on rising, above the largest it falls with the
    square of the number of units removed. Nothing is lost when all units stay.

    Args:
        measured: the loss by size, at least one; sizes below ``size``.
        size: the number of units.
        errors: the method's error at every size, (size + 1,), in any unit.
    """
    sizes = np.array(sorted(measured), np.float64)
    logs = np.log(np.maximum([measured[int(each)] for each in sizes], _LEAST))
    logs = np.minimum.accumulate(logs)
    everywhere = np.arange(size + 1.0)
    if errors is not None and all(errors[int(each)] > 0 for each in sizes):
        known = np.log(np.maximum(errors, np.finfo(float).tiny))
        correction = np.interp(everywhere, sizes, logs - known[sizes.astype(int)])
        found = np.where(errors > 0, np.exp(known + correction), 0.0)
    else:
        found = np.exp(np.interp(everywhere, sizes, logs))
        if len(sizes) > 1:
            slope = max(0.0, (logs[0] - logs[1]) / (sizes[1] - sizes[0]))
            below = everywhere < sizes[0]
            found[below] = np.exp(logs[0] + slope * (sizes[0] - everywhere[below]))
        above = everywhere > sizes[-1]
        found[above] = np.exp(logs[-1]) * ((size - everywhere[above]) / (size - sizes[-1])) ** 2
    found[-1] = 0.0
    losses: Float = np.minimum.accumulate(found)
    return losses
