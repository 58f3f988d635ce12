"""Importance of heads by gradients (Michel et al., NeurIPS 2019, arXiv:1905.10650)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ..anatomy import Group, Kind
from ..statistics.settings import Float
from .base import Bound, Handler, Method
from .handlers.ranking import Ranking, Removal
from .registry import register

__all__ = ["Michel"]


@register
class Michel(Method):
    """Keeps the heads whose outputs the loss depends on most; it cuts whole heads, and layers, alone.

    A head's score is E |Att_h · ∂L/∂Att_h|, divided by the ℓ2 norm of its layer's scores, so that scores of layers can
    be compared. Whole layers are ranked by calibration measurements.
    """

    name = "michel"
    paper = "Michel et al., Are Sixteen Heads Really Better than One?, NeurIPS 2019, arXiv:1905.10650"
    source = "the paper's score; how many heads each layer keeps is up to the allocation"
    cuts: ClassVar[tuple[Kind, ...]] = ("heads", "layer")
    needs = ("gradients",)

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by these scores."""

        def scores(group: Group) -> Float:
            found = bound.statistics.head_importance(group.name)
            normalised: Float = found / max(float(np.linalg.norm(found)), np.finfo(float).tiny)
            return normalised[None]

        return {"heads": Ranking(bound, scores), "layer": Removal()}
