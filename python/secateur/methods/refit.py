"""Selects original neurons and refits their consumers in closed form.

Greedy backward elimination (the optimal brain surgeon for groups, OB²C, arXiv:2608.17657) or a one-shot criterion picks
the neurons; least squares over the calibration rows then makes their consumers take over what the others contributed
(CORP, arXiv:2602.05243), its mean through the bias. It needs no labels and no gradients; the moments are those of the
dense model.
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

HEAD_SCORE_HELP = "score of a head: the loss of the refitted projection, the mean over its neurons, or by gradients"


@dataclass(frozen=True)
class Options:
    """Options of the method "refit": how neurons and heads are scored."""

    selection: Literal["greedy", "snp", "energy"] = field(
        default="greedy", metadata={"help": "greedy elimination, SNP's scores, or the energy of each neuron"}
    )
    head_score: Literal["error", "neurons", "michel"] = field(default="error", metadata={"help": HEAD_SCORE_HELP})


@register
class Refit(Method):
    """Keeps original neurons and refits their consumers; residual channels are selected as in SNP, without a refit."""

    name = "refit"
    paper = "after CORP, arXiv:2602.05243, and OB²C, arXiv:2608.17657; queries and keys are ours"
    source = "after its papers; queries and keys are ours"
    Options: ClassVar[type] = Options
    needs = ("moments",)
    changes_weights = True

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return handlers that select and refit."""
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
