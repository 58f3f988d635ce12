"""Estimates from two folds how many images a fit needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .settings import Float

__all__ = ["GOOD", "covariance", "drawn", "excess", "images_for", "median_excess"]

# A fit is good enough when it errs this much more on other images than the best one does.
GOOD = 0.02
# How the excess falls with the number of images: for least squares by its reciprocal, with ridges more slowly. Measured
# on an ImageNet ViT-Tiny from 32 to 1,000 images.
_POWER = 0.7
# Channels that are predicted from others, and those, at most; the excess grows with the number of the latter.
_REGRESSED, _REGRESSORS = 64, 192
# With fewer channels, the excess of a group is mostly noise.
_LEAST_CHANNELS = 16
_RIDGES = tuple(10.0**exponent for exponent in range(-8, 4))


def median_excess(tensors: Mapping[str, npt.NDArray[Any]], folds: Sequence[str]) -> float:
    """Return the median excess of up to four groups with second moments, by the names of their sums; 0 without any."""
    # In one order, whether measured or read from a file.
    observed = sorted({name.split("/")[1] for name in tensors if name.endswith("/second_moment")})
    large = [group for group in observed if tensors[f"{folds[0]}/{group}/sum"].size >= _LEAST_CHANNELS]
    chosen = dict.fromkeys(large[round(part * (len(large) - 1))] for part in (0.1, 0.4, 0.7, 1)) if large else {}
    found = [
        excess([covariance(tensors, group, fold) for fold in folds], tensors[f"{folds[0]}/{group}/sum"].size)
        for group in chosen
        if all(tensors[f"{fold}/{group}/rows"][0] > 0 for fold in folds)
    ]
    return float(np.median(found)) if found else 0.0


def covariance(tensors: Mapping[str, npt.NDArray[Any]], group: str, fold: str) -> Float:
    """Return the covariance of the channels of a group that are `drawn`."""
    sums, packed = (tensors[f"{fold}/{group}/{what}"] for what in ("sum", "second_moment"))
    # Tokens count as one each unless they have weights.
    weight = tensors.get(f"{fold}/{group}/weight", tensors[f"{fold}/{group}/rows"])[0]
    size = sums.size
    channels = np.array(drawn(size))
    first, second = np.minimum.outer(channels, channels), np.maximum.outer(channels, channels)
    mean = sums[channels] / weight
    found: Float = packed[first * size - first * (first - 1) // 2 + second - first] / weight - np.outer(mean, mean)
    return found


def drawn(channels: int, seed: int = 0) -> list[int]:
    """Return the channels that `excess` looks at: first those to predict from, then those to predict."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return order[: _regressors(channels) + _REGRESSED]


def excess(folds: Sequence[Float], channels: int) -> float:
    """Return how much more a fit errs on other images than the best one, as a share of what that one leaves.

    Some channels are predicted from half of all, or from 192, by ridge regression on each fold, with the ridge that
    errs least on the other fold. What it errs more there than on its own fold is twice the excess of a fold, and a fit
    on both folds has half of that.

    Args:
        folds: two covariances, each of the channels that are `drawn`.
        channels: number of all channels.
    """
    first, second = (torch.from_numpy(fold) for fold in folds)
    count = _regressors(channels)
    errors = np.array([_errors(*pair, count) for pair in ((first, second), (second, first))]).mean(0)
    own, other = errors[errors[:, 1].argmin()]
    if not other > 0:
        return 0.0
    found: float = (other - own) / 4 * (channels / 2 / count) / other
    return max(0.0, found)


def _regressors(channels: int) -> int:
    return min(_REGRESSORS, channels // 2)


def _errors(fit: Tensor, held_out: Tensor, count: int) -> list[tuple[float, float]]:
    """Return the error on the fold itself and on the other one, for each ridge; the first channels are known."""
    known, wanted = slice(count), slice(count, None)
    values, basis = torch.linalg.eigh(fit[known, known])
    values = values.clamp_min(0)
    mean = float(values.mean())
    if not mean > 0:
        return [(0.0, 0.0)] * len(_RIDGES)
    along = basis.mT @ fit[known, wanted]
    found = []
    for ridge in _RIDGES:
        weights = basis @ (along / (values + ridge * mean)[:, None])
        own, other = (
            (weights * (part[known, known] @ weights - 2 * part[known, wanted])).sum() + part.diagonal()[wanted].sum()
            for part in (fit, held_out)
        )
        found.append((float(own), float(other)))
    return found


def images_for(images: int, excess: float) -> int:
    """Return about how many images a good fit needs, to two digits, if this many have such an excess."""
    needed = images * (excess / GOOD) ** (1 / _POWER)
    digits = 10.0 ** max(0, len(str(int(needed))) - 2)
    return int(np.ceil(needed / digits) * digits)
