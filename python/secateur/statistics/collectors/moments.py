"""Collects first and second moments of values, projection inputs, hidden units and norm inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import core
from ...anatomy import Part, Tap
from ...core import fallback
from ...errors import Unsupported
from ..settings import FOLDS, Settings
from .base import Accumulator, Collector, Folds, Position, State, in_turn, register

__all__ = ["Moments"]


@register
class Moments(Collector):
    """Sums of rows and of their outer products, with ``collect="all"``."""

    name = "moments"

    def open(
        self, taps: Mapping[Part, Tap], settings: Settings, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterable[Accumulator]:
        """Return one accumulator for each part except queries and keys; norms' inputs have no weights."""
        del shapes
        kind = _WeightedMoment if settings.row_weights else _Moment
        if settings.collect == "all":
            for part, tap in taps.items():
                if part not in ("query", "key"):
                    yield _Moment(tap, settings) if part == "stream" else kind(tap, settings)


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
        self._add(position, seen[0].detach())

    def _add(self, position: Position, x: Tensor) -> None:
        pair = in_turn(self._moments, position)
        stride, phases = self._chosen(position, x)
        fallback.update_moments(pair, x, norm=self.taps[0].norm, stride=stride, phases=phases, wait=position.wait)

    def _chosen(self, position: Position, x: Tensor) -> tuple[int, list[int]]:
        """Return the stride between tokens, and the first token for either fold of the batch."""
        return min(self._stride, x.shape[1]), [(position.images + turn) // 2 for turn in range(len(FOLDS))]


class _WeightedMoment(_Moment):
    """The same with a weight w for each token: sums of w, w x and w x xᵀ, and the number of tokens."""

    def __init__(self, tap: Tap, settings: Settings) -> None:
        super().__init__(tap, settings)
        # By fold: w, and w x, which the core, given x √w, cannot know.
        self._sums = [(np.zeros(1), np.zeros(tap.size)) for _ in FOLDS]

    def update(self, position: Position, seen: Sequence[Tensor]) -> None:
        """Add the chosen tokens, as without weights."""
        x, weights = seen[0].detach(), position.weights
        if weights is None or weights.shape != x.shape[:2]:
            found = "none" if weights is None else f"those of {tuple(weights.shape)}"
            raise Unsupported(f"row_weights: expected weights of {tuple(x.shape[:2])} in {self._name}, got {found}")
        column = weights.to(torch.promote_types(x.dtype, torch.float32))[:, :, None]
        self._add(position, x * column.sqrt())
        stride, phases = self._chosen(position, x)
        for turn, (total, sums) in enumerate(in_turn(self._sums, position)):
            rows, w = (fallback.chosen_rows(each[turn::2], stride, phases[turn]) for each in (x, column))
            total += float(w.sum(dtype=torch.float64))
            sums += (rows * w).sum(0, dtype=torch.float64).cpu().numpy()

    def state(self, position: Position) -> State:
        """Return the sums of both folds."""
        found = super().state(position)
        for fold, (total, sums) in zip(FOLDS, self._sums, strict=True):
            found[f"{fold}/{self._name}/weight"], found[f"{fold}/{self._name}/sum"] = total.copy(), sums.copy()
        return found

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from these sums."""
        super().load_state({name: array for name, array in state.items() if not name.endswith("/weight")})
        self._sums = [
            (np.array(state[f"{fold}/{self._name}/weight"]), np.array(state[f"{fold}/{self._name}/sum"]))
            for fold in FOLDS
        ]
