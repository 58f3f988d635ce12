"""Trains blocks from the first to the last until the pruned model's stream is close to the dense one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..families.base import Family
from ..runtime.progress import progress
from ..statistics.rows import RowWeights
from ..statistics.streams import Streams
from .best import Course, train
from .images import HeldBack, batched, shuffled

__all__ = ["Blocks"]

# Images among which the next is drawn.
_SHUFFLED = 512


class _Row(NamedTuple):
    """One image: what enters the blocks, (N, width), what should leave them, and the weights of its tokens, (N,)."""

    entering: Tensor
    wanted: Tensor
    weights: Tensor


class Blocks:
    """One run over the blocks of a model, which trains them in place.

    Args:
        dense: the dense model.
        pruned: the model; it merges no tokens.
        family: their family.
        anatomy: description of the dense model.
        streams: the residual streams of both.
        held: which images are held back.
        together: how many blocks are trained together.
        epochs: passes over the images for each.
        lr: the highest learning rate.
        batch_size: images in a step.
        seed: the seed of the order.
    """

    def __init__(
        self,
        dense: nn.Module,
        pruned: nn.Module,
        family: Family,
        anatomy: Anatomy,
        streams: Streams,
        held: HeldBack,
        *,
        together: int,
        epochs: int,
        lr: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self._dense, self._pruned, self._family, self._anatomy = dense, pruned, family, anatomy
        self._streams, self._held = streams, held
        self._together, self._epochs, self._lr, self._batch_size = together, epochs, lr, batch_size
        self._order = torch.Generator().manual_seed(seed)

    def run(self, rows: RowWeights) -> dict[str, Course]:
        """Train all blocks after the first one that differs; return the course of each, by its last layer."""
        found: dict[str, Course] = {}
        windows = list(self._windows())
        with progress(len(windows), "reconstruct", unit="blocks") as advance:
            for names in windows:
                course = self._window(names, rows)
                if course is not None:
                    found[names[-1]] = course
                advance(1)
        return found

    def _windows(self) -> Iterator[list[str]]:
        """Yield the names of the layers that are trained together."""
        names = list(self._family.layers(self._dense))
        numbers = [self._anatomy.block_of(self._anatomy.layers[name]) for name in names]
        for blocks in batched(dict.fromkeys(numbers), self._together):
            yield [name for name, number in zip(names, numbers, strict=True) if number in blocks]

    def _window(self, names: Sequence[str], rows: RowWeights) -> Course | None:
        """Train some layers, and run them in both models."""
        streams = self._streams
        dense, pruned = (self._family.layers(model) for model in (self._dense, self._pruned))
        layers = [(dense[name], pruned.get(name)) for name in names]
        same = not streams.diverged and all(mine is not None and _same(theirs, mine) for theirs, mine in layers)
        for _ in names:
            streams.advance_dense(both=same)
        if same:
            return None
        window = nn.Sequential(*(mine for _, mine in layers if mine is not None))
        shares = {}
        with streams.passing():
            for batch in streams:
                shares[batch.start] = rows.of(names[-1], batch.dense).to(batch.dense.dtype)
        course = self._trained(window, partial(self._rows, shares))
        streams.diverged = True
        for _ in names:
            streams.advance_pruned()
        return course

    def _trained(self, window: nn.Module, rows: Callable[[bool], Iterator[_Row]]) -> Course | None:
        parameters = [parameter for parameter in window.parameters() if parameter.requires_grad]
        if not parameters:
            return None

        def error(batch: Sequence[_Row]) -> Tensor:
            """Return the squared error of each image, (B,), weighted over tokens."""
            entering, wanted, weights = (torch.stack(part) for part in zip(*batch, strict=True))
            off: Tensor = window(entering) - wanted
            return (weights * off.square().sum(-1)).sum(1)

        def held_back() -> float:
            total, images = 0.0, 0
            for batch in batched(rows(True), self._batch_size):
                with torch.no_grad():
                    total += float(error(batch).double().sum())
                images += len(batch)
            return total / images

        before = held_back()
        scale = max(before, torch.finfo(torch.float32).tiny)

        def share(batch: Sequence[_Row]) -> Tensor:
            return error(batch).mean() / scale

        def batches() -> Iterator[Callable[[], Tensor]]:
            for batch in batched(shuffled(rows(False), _SHUFFLED, self._order), self._batch_size):
                yield partial(share, batch)

        images = self._streams.images
        steps = -(-(images - self._held.count(images)) // self._batch_size)
        return train(parameters, self._epochs, self._lr, steps, batches, lambda: held_back() / scale, before / scale)

    def _rows(self, shares: Mapping[int, Tensor], held: bool) -> Iterator[_Row]:
        """Yield the images that are held back, or the others."""
        source = iter(self._streams)
        while True:
            # Only while streams are computed: what is trained cannot go through tensors of inference mode.
            with torch.inference_mode():
                batch = next(source, None)
            if batch is None:
                return
            for place in range(len(batch.dense)):
                if self._held.holds(batch.start + place) is held:
                    yield _Row(batch.pruned[place], batch.dense[place], shares[batch.start][place])


def _same(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(
        value.shape == theirs[name].shape and torch.equal(value, theirs[name]) for name, value in mine.items()
    )
