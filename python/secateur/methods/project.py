"""Score-preserving projection: keeps the best subspace of every head and of the residual stream, not selected neurons.

Each head's queries and keys, its values, and the residual stream are rotated to the basis where truncation hurts least,
and their consumers are refitted by least squares over the calibration rows; the dense model's function is the same in
every basis. Queries and keys that have norms are rotated before these. Where no change of basis is allowed (a norm or
gate between values and projection; FFN hidden units, which come after an activation; query/key norms without a scale,
or in a block that normalises its output) original neurons are selected and refitted, as in the method "refit".
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
    """Options of the method "project": how heads are scored."""

    head_score: Literal["error", "neurons", "michel"] = field(default="error", metadata={"help": HEAD_SCORE_HELP})


@register
class Project(Method):
    """Rotates each layer to the basis where truncation hurts least, then refits the next layer."""

    name = "project"
    paper = "ours; the residual stream after SliceGPT, Ashkboos et al., ICLR 2024, arXiv:2401.15024"
    source = "ours"
    Options: ClassVar[type] = Options
    needs = ("moments",)
    changes_weights = True

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return handlers that rotate where it is allowed, and else select and refit."""
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
