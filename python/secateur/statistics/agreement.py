"""How far two estimates of importance agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .settings import Float

__all__ = ["Agreement", "agreement_of"]


@dataclass(frozen=True)
class Agreement:
    """How far two estimates of a group's importance agree.

    ``spearman`` is the rank correlation over a head's neurons, averaged over heads; ``overlap`` is the share of the
    lower half that both would prune.
    """

    spearman: float
    overlap: float


def agreement_of(first: Float, second: Float) -> Agreement:
    """Compare the scores of the same heads, (heads, size) each."""
    correlations, overlaps = [], []
    for mine, theirs in zip(first, second, strict=True):
        ranks, other = _ranks(mine), _ranks(theirs)
        half = max(1, len(mine) // 2)
        correlations.append(1.0 if len(mine) < 2 else float(np.corrcoef(ranks, other)[0, 1]))
        overlaps.append(float(np.mean((ranks < half)[other < half])))
    return Agreement(float(np.mean(correlations)), float(np.mean(overlaps)))


def _ranks(scores: Float) -> Float:
    return np.argsort(np.argsort(scores, kind="stable"), kind="stable").astype(np.float64)
