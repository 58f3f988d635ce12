"""SNP: structured neuron-level pruning of vision transformers (Shim et al., ECCV 2024, arXiv:2404.11630)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..anatomy import Group, Kind
from ..statistics.settings import Float
from .base import Bound, Handler, Method
from .handlers.ranking import Ranking, Removal
from .registry import register
from .similarity import channel_scores, head_scores, similarity

__all__ = ["SNP"]


@dataclass(frozen=True)
class Options:
    """Options of the method "snp", for what the paper leaves open."""

    similarity: Literal["weights", "activations"] = field(
        default="weights",
        metadata={"help": "compare value and FFN neurons by rows of weights, as in the paper, or by their outputs"},
    )
    head_score: Literal["neurons", "michel"] = field(
        default="neurons",
        metadata={"help": "score of a head: the mean over its neurons, or by gradients (Michel et al., 2019)"},
    )


@register
class SNP(Method):
    """Keeps the query/key neurons that carry the attention scores, and value and FFN neurons that no other repeats.

    A query/key neuron's score is how much of the attention scores' leading singular directions it carries. For values,
    FFN units and filters, it is Σ (1 − |cos|) to every other neuron of the layer, over all heads. For the residual
    width, it is the same over the output rows of each layer that writes to it, averaged over these layers.
    """

    name = "snp"
    paper = "Shim et al., SNP: Structured Neuron-level Pruning, ECCV 2024, arXiv:2404.11630"
    source = "the paper's, where it states its formulas"
    Options: ClassVar[type] = Options
    needs = ("scores",)

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by these scores."""
        options: Options = bound.options
        activations = options.similarity == "activations"

        def of_heads(group: Group) -> Float:
            found = head_scores(
                bound.model, bound.anatomy, bound.statistics, group, options.head_score, activations=activations
            )
            return found[None]

        def of_units(group: Group) -> Float:
            return similarity(bound.model, group, bound.statistics if activations else None)

        units = Ranking(bound, of_units)
        return {
            "qk": Ranking(bound, lambda group: bound.statistics.importance(group.name)),
            "v": units,
            "ffn": units,
            "conv": Ranking(bound, lambda group: similarity(bound.model, group)),
            "heads": Ranking(bound, of_heads),
            "width": Ranking(bound, lambda group: channel_scores(bound.model, group)),
            "layer": Removal(),
        }
