"""Group Fisher pruning (Liu et al., ICML 2021, arXiv:2108.00708), in one shot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..anatomy import Group, Kind
from ..statistics.settings import Float
from .base import Bound, Handler, Method
from .handlers.ranking import Ranking, Removal
from .registry import register

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Options:
    """Options of the method "fisher"."""

    cost: Literal["none", "macs"] = field(
        default="none", metadata={"help": "divide scores by what the unit frees: nothing, or its MACs"}
    )


@register
class Fisher(Method):
    """Keeps the units with the largest Fisher information of a factor on them, over all layers that read the unit.

    A unit's score is the mean over images of (Σ_l Σ x_l · ∂L/∂x_l)², summed over the layers l that read it before the
    square: one factor multiplies a residual channel wherever it is read. Queries and keys are read by their product; a
    head is read as all its values. Units of a group free equally much, so the cost compares groups, not units. Whole
    layers are ranked by calibration measurements. The paper removes one channel at a time while it trains.
    """

    name = "fisher"
    paper = "Liu et al., Group Fisher Pruning for Practical Network Compression, ICML 2021, arXiv:2108.00708, one-shot"
    source = "in its style"
    Options: ClassVar[type] = Options
    needs = ("gradients",)

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by these scores."""
        options: Options = bound.options
        whole = bound.anatomy.macs_at({})

        def scores(group: Group) -> Float:
            found = bound.statistics.gradients(group.name, "fisher")
            if options.cost == "macs" and group.size > 1:
                found = found / max(1, whole - bound.anatomy.macs_at({group.name: group.size - 1}))
            return found

        units = Ranking(bound, scores)
        kinds: tuple[Kind, ...] = ("qk", "v", "ffn", "conv", "heads", "width")
        return {**dict.fromkeys(kinds, units), "layer": Removal()}
