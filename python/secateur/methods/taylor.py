"""First-order Taylor importance of weights (Molchanov et al., CVPR 2019, arXiv:1906.10771)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..anatomy import Group, Kind
from ..statistics.settings import Float
from .base import Bound, Handler, Method
from .handlers.ranking import Ranking, Removal
from .registry import register

__all__ = ["Taylor"]


@register
class Taylor(Method):
    """Keeps the units whose weights the loss depends on most, to first order.

    A unit's score is the mean over images of (Σ w · ∂L/∂w)², summed over the rows that compute the unit: the squared
    change of the loss if the row were zero. Rows of several layers, such as a query's and a key's or those of all
    layers that write to a residual channel, are squared one by one. A head's score is the sum over its query, key and
    value neurons. Whole layers are ranked by calibration measurements.
    """

    name = "taylor"
    paper = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771, one-shot"
    source = "in its style"
    needs = ("gradients",)

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by these scores."""

        def scores(group: Group) -> Float:
            return bound.statistics.gradients(group.name, "taylor")

        def heads(group: Group) -> Float:
            layer = bound.anatomy.layers[bound.anatomy.layer_of[group.name]]
            inside = [bound.anatomy.group(name) for name in layer.groups.values() if name != group.name]
            total: Float = np.sum([scores(each).sum(1) for each in inside], axis=0)
            return total[None]

        units = Ranking(bound, scores)
        return {
            **dict.fromkeys(("qk", "v", "ffn", "conv", "width"), units),
            "heads": Ranking(bound, heads),
            "layer": Removal(),
        }
