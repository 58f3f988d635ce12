"""Variance-based pruning with a mean shift (VBP, arXiv:2507.12988)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ..anatomy import Group, Kind
from ..statistics.settings import Float
from .base import Bound, Handler, Method
from .handlers.fit import Fit
from .handlers.layers import MeanKept
from .handlers.ranking import Ranking
from .handlers.shifted import MeanShifted
from .registry import register

__all__ = ["Vbp"]


@register
class Vbp(Method):
    """Keeps the units whose activations vary most; the next layer's bias takes over the mean of the others.

    The variance is over all tokens of the calibration images: of FFN units after the activation, as in the paper. Ours
    are values by their variance where they enter the projection, heads by the sum over their values, queries and keys
    by the energy of each neuron's centred scores, without a shift, and whole layers by calibration measurements. The
    residual width and convolutions are not cut. The paper ranks the units of all layers together; here each layer's
    count is chosen as for every method.
    """

    name = "vbp"
    paper = "Variance-Based Pruning, arXiv:2507.12988; values, heads, queries and keys are ours"
    source = "in its style"
    needs = ("moments",)
    cuts: ClassVar[tuple[Kind, ...]] = ("qk", "v", "ffn", "heads", "layer")
    changes_weights = True

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by variance."""
        fit = Fit(bound)

        def variances(group: Group) -> Float:
            moments = fit.before_writer(fit.layer(group.name))
            found: Float = moments.covariance.diagonal().reshape(group.heads, group.size).numpy()
            return found

        def heads(group: Group) -> Float:
            moments = fit.before_writer(fit.layer(group.name))
            found: Float = moments.covariance.diagonal().reshape(group.size, -1).sum(1)[None].numpy()
            return found

        def scores(group: Group) -> Float:
            found: Float = np.diagonal(bound.statistics.gram(group.name, "score_gram"), axis1=1, axis2=2)
            return found

        units = MeanShifted(fit, variances)
        return {
            "qk": Ranking(bound, scores),
            "v": units,
            "ffn": units,
            "heads": Ranking(bound, heads, mean_kept=True),
            "layer": MeanKept(fit),
        }
