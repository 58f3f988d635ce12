"""Collects Gram matrices of single images, since a cut's error on an image's scores depends on its queries and keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...anatomy import Part, Tap
from ...core import fallback
from ..settings import SAMPLED_IMAGES, Settings
from .base import Accumulator, Collector, Position, State, register

__all__ = ["Samples"]

_GRAMS = ("query_gram", "key_gram")


@register
class Samples(Collector):
    """QᵀQ and K_cᵀK_c of the first images one by one, with ``collect="all"``; packed, in float32."""

    name = "samples"

    def open(
        self, taps: Mapping[Part, Tap], settings: Settings, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterable[Accumulator]:
        """Return one accumulator for queries and keys together."""
        if settings.collect == "all" and "query" in taps and "key" in taps:
            yield _Sample(taps["query"], taps["key"], shapes[taps["query"].name])

    def merge(self, name: str, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
        """Keep the first images' Grams, as in one long calibration; they are not sums."""
        return np.concatenate(arrays)[:SAMPLED_IMAGES] if name.startswith("sample/") else None


class _Sample:
    """Keeps Gram matrices of the first images; of an image with several maps, one map, changing with the image."""

    def __init__(self, query: Tap, key: Tap, shape: tuple[int, int]) -> None:
        self.taps = (query, key)
        self._names = {what: f"sample/{query.name}/{what}" for what in _GRAMS}
        self._shape = shape
        self._parts: dict[str, dict[int, Tensor]] = {what: {} for what in _GRAMS}  # by first image of the batch

    def update(self, position: Position, seen: Sequence[Tensor]) -> None:
        """Keep the Grams of those images that are among the first; they only measure errors."""
        left = SAMPLED_IMAGES - position.images
        if left <= 0:
            return
        q, k = (self._one_map(each.detach(), position.images)[:left] for each in seen)
        q, k = fallback.at_hand(q), fallback.at_hand(k).double()
        rows, columns = torch.triu_indices(self._shape[1], self._shape[1], device=q.device)
        for what, x in zip(_GRAMS, (q.double(), k - k.mean(1, keepdim=True)), strict=True):
            grams = torch.einsum("bnhi,bnhj->bhij", x, x)
            self._parts[what][position.images] = grams[..., rows, columns].to(torch.float32)

    def _one_map(self, x: Tensor, first: int) -> Tensor:
        maps = self.taps[0].maps_per_image
        if maps == 1:
            return x
        images = len(x) // maps
        return x[[image * maps + (first + image) % maps for image in range(images)]]

    def wait(self) -> None:
        """Do nothing: no work is pending."""

    def state(self, position: Position) -> State:
        """Return the Grams of the first images, each at its place; zeros where another rank has them."""
        heads, size = self._shape
        shape = (min(position.images, SAMPLED_IMAGES), heads, size * (size + 1) // 2)
        found: State = {}
        for what, parts in self._parts.items():
            first = parts.get(0)
            if first is not None and first.is_cuda and len(first) == shape[0]:
                found[self._names[what]] = first.cpu().numpy()  # all came at once, so there are no gaps
                continue
            grams = np.zeros(shape, np.float32)
            for start, part in parts.items():
                grams[start : start + len(part)] = part.cpu()
            found[self._names[what]] = grams
        return found

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from the Grams of a file."""
        self._parts = {what: {0: torch.from_numpy(state[name])} for what, name in self._names.items()}
