"""Group Fisher pruning (Liu et al., ICML 2021, arXiv:2108.00708), in one shot."""

from __future__ import annotations

from collections.abc import Mapping

from ..anatomy import Group, Kind
from ..statistics.settings import Float
from .base import Bound, Handler, Method
from .handlers.ranking import Ranking, Removal
from .registry import register

__all__ = ["Fisher"]


@register
class Fisher(Method):
    """Keeps the units with the largest Fisher information of a factor on them, over all layers that read the unit.

    A unit's score is the mean over images of (Σ_l Σ x_l · ∂L/∂x_l)², summed over the layers l that read it before the
    square: one factor multiplies a residual channel wherever it is read. Queries and keys are read by their product; a
    head is read as all its values. Whole layers are ranked by calibration measurements. The paper removes one channel
    at a time while it trains, and divides by what a channel frees, which is the same for all units of a group.
    """

    name = "fisher"
    paper = "Liu et al., Group Fisher Pruning for Practical Network Compression, ICML 2021, arXiv:2108.00708, one-shot"
    source = "in its style"
    needs = ("gradients",)

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by these scores."""

        def scores(group: Group) -> Float:
            return bound.statistics.gradients(group.name, "fisher")

        units = Ranking(bound, scores)
        kinds: tuple[Kind, ...] = ("qk", "v", "ffn", "conv", "heads", "width")
        return {**dict.fromkeys(kinds, units), "layer": Removal()}
