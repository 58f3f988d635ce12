"""The handler of whole layers: the mean of a removed layer is kept by the layer before it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...anatomy import Group, Indices
from ...statistics.settings import Float
from ..base import Handler
from ..weights import Weights
from .fit import Fit

__all__ = ["MeanKept"]


class MeanKept(Handler):
    """Removes a layer and adds the mean of its output to the bias of the writer before it."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    def errors(self, group: Group) -> Float | None:
        """Return the losses measured in calibration, with the mean or without."""
        whole, mean_kept = self._fit.statistics.removal(group.name)
        shifts = whole > 0 and self._fit.anatomy.before(group.name) is not None
        return np.array([max(0.0, mean_kept) / whole if shifts else 1.0, 0.0])

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Remove the layer but keep its mean, unless a norm follows that would change it."""
        del count
        layer = self._fit.anatomy.layers[group.name]
        before = self._fit.anatomy.before(group.name, gone=weights.keep)
        if before is not None:
            moments = self._fit.before_writer(layer)
            added = weights.weight(layer.writer) @ moments.mean + weights.bias(layer.writer)
            added = added * weights.scale(layer.scale)
            for writer, scale in before.writers.items():
                gain = weights.scale(scale)
                # A channel that the writer's LayerScale (almost) shuts off gets no share: it would overflow the type.
                share = added / gain.where(gain != 0, torch.inf) if isinstance(gain, Tensor) else added
                bias = weights.bias(writer)
                fits = (bias + share).abs() <= weights.largest(writer)
                weights.set(writer, bias + share.where(fits, 0), "bias")
            for token in before.tokens:
                weights.set("", weights.weight("", token) + added, token)
        return np.empty((1, 0), np.int64)
