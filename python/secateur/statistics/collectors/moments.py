"""Collects first and second moments of values, projection inputs, hidden units and norm inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ... import core
from ...anatomy import Part, Tap
from ...core import fallback
from ..settings import FOLDS, Settings
from .base import Accumulator, Collector, Folds, Position, in_turn, register

__all__ = ["Moments"]


@register
class Moments(Collector):
    """Sums of rows and of their outer products, with ``collect="all"``."""

    name = "moments"

    def open(
        self, taps: Mapping[Part, Tap], settings: Settings, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterable[Accumulator]:
        """Return one accumulator for each part except queries and keys."""
        del shapes
        if settings.collect == "all":
            for part, tap in taps.items():
                if part not in ("query", "key"):
                    yield _Moment(tap, settings)


class _Moment(Folds):
    """Two of the core's accumulators, one for each fold."""

    def __init__(self, tap: Tap, settings: Settings) -> None:
        self.taps = (tap,)
        self._stride = round(1 / settings.token_fraction)
        self._moments = tuple(core.MomentAccumulator(tap.size, name=tap.label) for _ in FOLDS)
        super().__init__(tap.name, self._moments)

    def update(self, position: Position, seen: Sequence[Tensor]) -> None:
        """Add the chosen tokens of (B, N, d) to the fold of their image.

        Of image g, every stride-th token from (g // 2) mod stride on is used, so that both folds see all positions and
        the choice does not depend on how images are split into batches.
        """
        (x,) = seen
        pair = in_turn(self._moments, position)
        stride = min(self._stride, x.shape[1])
        phases = [(position.images + turn) // 2 for turn in range(len(pair))]
        fallback.update_moments(
            pair, x.detach(), norm=self.taps[0].norm, stride=stride, phases=phases, wait=position.wait
        )
