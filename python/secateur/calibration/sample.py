"""Chooses the images on which losses are measured, and how much each of them counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..families.base import classifies
from ..statistics.measurements import Work
from ..statistics.measurements.base import divergence
from ..statistics.outputs import double
from ..statistics.settings import Float
from ..surgery.trial import cut_copy
from .schedules import kept_tokens, merged_by

__all__ = ["Sample", "Sampler", "sample", "summed"]

_IMAGES = 40
# The inputs of all blocks are held for this many images at once.
_CHUNK = 20
# The share of the tokens that each block merges to tell which images lose much.
_RATE = 0.08
# What is added to the probability of every image, for those that seem to lose nothing.
_FLOOR = 0.3


@dataclass(frozen=True, eq=False)
class Sample:
    """Images (B, C, H, W) and how many of all images each stands for, (B,), float64 on the CPU."""

    images: Tensor
    weights: Tensor


class Sampler:
    """Chooses images once for all measurements of one run, which must be given the same images."""

    def __init__(self) -> None:
        self._chosen: list[Sample] | None = None

    def of(self, work: Work) -> list[Sample]:
        """Return the sample of the work that came first."""
        if self._chosen is None:
            self._chosen = sample(work)
        return self._chosen


def summed(chosen: Sequence[Sample], losses: Iterable[Tensor]) -> Float:
    """Return the weighted sum of the losses of all images, one (B,) for each sample, and the sum of the weights."""
    parts = [float(each.weights @ loss.double().cpu()) for each, loss in zip(chosen, losses, strict=True)]
    return np.array([sum(parts), float(sum(each.weights.sum() for each in chosen))])


def sample(work: Work) -> list[Sample]:
    """Return up to 40 of the work's images, a few at a time; the weights add up to their number.

    A cut changes the outputs of few images much, and chance decides how many of those are among 40. So images that may
    lose much are drawn with a larger probability, and weighted by its inverse: systematic sampling (Madow, Ann. Math.
    Stat. 20, 1949), without random numbers. The probability is proportional to √u + √l + 0.3, where u = 1 - Σ p² for
    the class probabilities p, and l is what the image loses when blocks merge 8 % of the tokens, both over their means.
    What a model lacks is left out: with neither classes nor tokens that merge, all images count alike.
    """
    images = torch.cat(list(work.batches))
    if len(images) <= _IMAGES:
        chosen, weights = torch.arange(len(images)), torch.ones(len(images), dtype=torch.float64)
    else:
        size = torch.full((len(images),), _FLOOR, dtype=torch.float64)
        for sign in _signs(work, images):
            root = sign.clamp_min(0).sqrt()
            if bool(root.isfinite().all()) and float(root.sum()) > 0:
                size += root / root.mean()
        order = size.argsort(stable=True)
        reached = size[order].cumsum(0) / size.sum()
        # An image that stands at several of the places is run once.
        places = torch.searchsorted(reached, (torch.arange(_IMAGES, dtype=torch.float64) + 0.5) / _IMAGES)
        chosen, counts = order[places.clamp(max=len(order) - 1)].unique(return_counts=True)
        weights = counts / size[chosen]
        weights *= _IMAGES / weights.sum()
    return list(_chunks(images, chosen, weights))


def _chunks(images: Tensor, chosen: Tensor, weights: Tensor) -> Iterator[Sample]:
    for numbers, some in zip(chosen.split(_CHUNK), weights.split(_CHUNK), strict=True):
        yield Sample(images[numbers.to(images.device)], some)


def _signs(work: Work, images: Tensor) -> list[Tensor]:
    """Return what tells how much each image may lose, each (B,), float64 on the CPU."""
    chunks = images.split(_CHUNK)
    outputs = [double(work.model(chunk)) for chunk in chunks]
    found = []
    if classifies(work.model):
        found.append([1 - output.softmax(-1).square().sum(-1) for output in outputs])
    merged = merged_by(work.anatomy, 0, _RATE, of_all=True)
    if any(merged):
        keep = {name: np.arange(size)[None] for name, size in kept_tokens(work.anatomy, merged).items()}
        less = cut_copy(work.model, work.family, work.anatomy, keep, {})
        pairs = zip(outputs, chunks, strict=True)
        found.append([divergence(work.model, output, double(less(chunk))) for output, chunk in pairs])
    return [torch.cat([part.double().cpu().reshape(len(part), -1).mean(1) for part in parts]) for parts in found]
