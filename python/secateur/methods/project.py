"""Score-preserving projection: the best rank of every head and of the residual stream, not the best subset of neurons.

Each head's queries and keys, its values, and the residual stream are rotated to the basis in which the cut costs least,
and their consumers are refitted by least squares over the calibration rows; the function of the dense model is the same
in every basis. Queries and keys with norms of their own are rotated in front of these. Where no change of basis is
allowed (a norm or gate between values and projection; FFN hidden units, which follow their activation; query/key norms
without a scale, or of a block that normalises what it adds) original neurons are selected and refitted, as the method
"refit" does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..anatomy import Kind
from .base import Bound, Handler, Method
from .handlers.fit import Fit
from .handlers.heads import RefittedHeads
from .handlers.hidden import SelectedHidden
from .handlers.layers import MeanKept
from .handlers.ranking import Ranking
from .handlers.scores import RotatedScores
from .handlers.values import RotatedValues
from .handlers.width import RotatedChannels
from .refit import HEAD_SCORE_HELP
from .registry import register
from .similarity import similarity

__all__ = ["Project"]


@dataclass(frozen=True)
class Options:
    """How heads are chosen."""

    head_score: Literal["error", "neurons", "michel"] = field(default="error", metadata={"help": HEAD_SCORE_HELP})


@register
class Project(Method):
    """Rotates each layer to the basis where truncation hurts least, then refits the next layer."""

    name = "project"
    paper = "ours; the residual stream after SliceGPT, Ashkboos et al., ICLR 2024, arXiv:2401.15024"
    Options: ClassVar[type] = Options
    needs = ("moments",)
    changes_weights = True

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Rotation where it is allowed, else selection and refit."""
        options: Options = bound.options
        fit = Fit(bound)
        return {
            "qk": RotatedScores(fit),
            "v": RotatedValues(fit),
            "ffn": SelectedHidden(fit),
            "conv": Ranking(bound, lambda group: similarity(bound.model, group)),
            "heads": RefittedHeads(fit, options.head_score),
            "width": RotatedChannels(fit),
            "layer": MeanKept(fit),
        }
