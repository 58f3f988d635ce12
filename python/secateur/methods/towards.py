"""Fits a layer of a pruned model to what the same layer of the dense model reads and writes, before it is cut.

Both fits are asymmetric: the input is that of the pruned model, the output that of the dense one, as in GPTAQ
(arXiv:2504.02692), where both are fixed when a layer is quantised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..anatomy import Layer
from ..statistics.paired import PairedMoments
from .base import Remainder
from .linalg.regression import Moment, shrunk
from .weights import Weights

__all__ = ["read_as_dense", "remainder", "write_as_dense"]

Folds = Sequence[PairedMoments]


def read_as_dense(weights: Weights, layer: Layer, whole: PairedMoments, folds: Folds) -> None:
    """Make a layer read its input n̂ as A n̂ + a ≈ n, the dense layer's: W ← W A, b ← b + W a for each reader.

    A is shrunk towards the identity.

    Args:
        weights: the drafts that are changed.
        layer: the layer, with its readers.
        whole: moments of n̂ and n, after the layer's input norm, over all rows.
        folds: the same of each fold.
    """
    eye = torch.eye(len(whole.xx), dtype=torch.float64)
    change = _change(eye, whole, folds)
    if not bool(change.any()) and torch.equal(whole.x, whole.y):
        return
    read = eye + change
    shift = whole.y - read @ whole.x
    for reader in layer.readers:
        weight = weights.weight(reader)
        weights.set(reader, weights.bias(reader) + weight @ shift, "bias")
        weights.set(reader, weight @ read)


def write_as_dense(weights: Weights, layer: Layer, whole: PairedMoments, folds: Folds) -> None:
    """Fit a layer's writer to y ≈ W z + b, shrunk towards what it writes now.

    y is what is to be added to the residual stream, so a LayerScale after the writer is folded into it first.

    Args:
        weights: the drafts that are changed.
        layer: the layer.
        whole: moments of z, the writer's input, and of y, over all rows.
        folds: the same of each fold.
    """
    factor = weights.scale(layer.scale)
    prior = weights.weight(layer.writer)
    if isinstance(factor, Tensor):
        assert layer.scale is not None
        prior = factor[:, None] * prior
        weights.set(layer.scale, torch.ones_like(factor), "gamma")
    fitted = prior + _change(prior, whole, folds)
    weights.set(layer.writer, fitted)
    weights.set(layer.writer, whole.y - fitted @ whole.x, "bias")


def remainder(weight: Tensor, whole: PairedMoments, folds: Folds) -> Remainder:
    """Return what the moments ask of a writer beyond its present weight (outputs, inputs)."""
    filled = all(fold.rows > 0 for fold in folds)
    return Remainder(_beyond(weight, whole), [_beyond(weight, fold) for fold in folds] if filled else [])


def _beyond(weight: Tensor, moments: PairedMoments) -> Tensor:
    return moments.xy - moments.xx @ weight.mT


def _change(prior: Tensor, whole: PairedMoments, folds: Folds) -> Tensor:
    """Return what to add to the prior (outputs, inputs), as far as both folds agree."""

    def rest(moments: PairedMoments) -> Moment:
        return Moment(moments.xx, _beyond(prior, moments))

    return shrunk(rest(whole), [rest(fold) for fold in folds if fold.rows > 0]).mT
