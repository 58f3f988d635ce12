"""Selection of original neurons, and their consumers refitted in closed form.

Greedy backward elimination (the optimal brain surgeon for groups, OB²C, arXiv:2608.17657) or a one-shot criterion picks
the neurons; least squares over the calibration rows then gives their consumers what the others contributed (CORP,
arXiv:2602.05243), the mean of it through the bias. No labels, no gradients; the moments are those of the dense model.
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
from .handlers.scores import SelectedScores
from .handlers.values import SelectedValues
from .registry import register
from .similarity import channel_scores, similarity

__all__ = ["HEAD_SCORE_HELP", "Refit"]

HEAD_SCORE_HELP = "score of a head: what the refitted projection loses, the mean over its neurons, or by gradients"


@dataclass(frozen=True)
class Options:
    """How neurons and heads are chosen."""

    selection: Literal["greedy", "snp", "energy"] = field(
        default="greedy", metadata={"help": "greedy elimination, SNP's scores, or the energy of each neuron"}
    )
    head_score: Literal["error", "neurons", "michel"] = field(default="error", metadata={"help": HEAD_SCORE_HELP})


@register
class Refit(Method):
    """Keeps original neurons, and refits their consumers; channels of the residual width are SNP's, without a refit."""

    name = "refit"
    paper = "after CORP, arXiv:2602.05243, and OB²C, arXiv:2608.17657; queries and keys are ours"
    Options: ClassVar[type] = Options
    needs = ("moments",)
    changes_weights = True

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Selection and refit by kind."""
        options: Options = bound.options
        fit = Fit(bound)
        return {
            "qk": SelectedScores(fit, options.selection),
            "v": SelectedValues(fit, options.selection),
            "ffn": SelectedHidden(fit, options.selection),
            "conv": Ranking(bound, lambda group: similarity(bound.model, group)),
            "heads": RefittedHeads(fit, options.head_score),
            "width": Ranking(bound, lambda group: channel_scores(bound.model, group)),
            "layer": MeanKept(fit),
        }
