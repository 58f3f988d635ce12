"""Collects query/key importance by SNP (Shim et al., ECCV 2024, arXiv:2404.11630), and the Gram matrices behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ... import core
from ...anatomy import Part, Tap
from ...core import fallback
from ...errors import InvalidArgument
from ..settings import FOLDS, Settings
from .base import Accumulator, Collector, Folds, Position, in_turn, register

__all__ = ["Scores"]


@register
class Scores(Collector):
    """Importance of query/key neurons; with ``collect="all"``, also their Gram matrices."""

    name = "scores"

    def open(
        self, taps: Mapping[Part, Tap], settings: Settings, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterable[Accumulator]:
        """Return one accumulator for queries and keys together."""
        if "query" in taps and "key" in taps:
            yield _Scorer(taps["query"], taps["key"], settings, shapes[taps["query"].name])


class _Scorer(Folds):
    """Two of the core's scorers, one for each fold."""

    def __init__(self, query: Tap, key: Tap, settings: Settings, shape: tuple[int, int]) -> None:
        self.taps = (query, key)
        heads, size = shape
        self._scorers = tuple(
            core.AttentionScorer(heads, size, settings.gamma, moments=settings.collect == "all", name=query.label)
            for _ in FOLDS
        )
        super().__init__(query.name, self._scorers)

    def update(self, position: Position, seen: Sequence[Tensor]) -> None:
        """Score the maps of each image, (B · maps, N, heads, head_dim) of queries and keys."""
        q, k = (each.detach() for each in seen)
        dtype = str(q.dtype).removeprefix("torch.")
        if position.dtype not in ("", dtype):
            raise InvalidArgument(f"resume: expected queries and keys of {position.dtype}, got {dtype}")
        position.dtype = dtype
        pair, maps = in_turn(self._scorers, position), self.taps[0].maps_per_image
        if maps == 1:
            fallback.update_scores(pair, q, k, wait=position.wait)
            return
        # All windows of an image belong to its fold.
        q, k = (each.unflatten(0, (-1, maps)) for each in (q, k))
        for turn, scorer in enumerate(pair[: len(q)]):
            fallback.update_scores([scorer], q[turn::2].flatten(0, 1), k[turn::2].flatten(0, 1), wait=position.wait)
