"""Prunes layer by layer so that each layer's output comes as close to the dense model's stream as it can."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import core
from ..anatomy import Anatomy, Group, Indices, Layer, Tap
from ..anatomy.fingerprint import Fingerprint
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..methods.base import Bound, Method, Remainder
from ..methods.towards import read_as_dense, remainder, write_as_dense
from ..methods.weights import Weights
from ..runtime.progress import progress as bar
from ..runtime.ranks import Ranks
from ..statistics.collectors import Accumulator, Position, collectors
from ..statistics.collectors.base import wait_for_all
from ..statistics.paired import PairedMoments, Sums, as_statistics
from ..statistics.rows import RowWeights
from ..statistics.settings import Float, Settings
from ..statistics.statistics import Statistics
from ..statistics.streams import Keep, Streams, seen
from ..surgery.cut import cut
from ..surgery.structure import set_norms
from .sequential_file import Progress, SequentialFile

__all__ = ["Course"]

T = TypeVar("T")


class Course:
    """One run over the layers of a model; everything is done on a copy, ``pruned``.

    Args:
        model: the dense model; it is not changed.
        anatomy: its description.
        method: the method that chooses what stays; it changes weights.
        options: its options.
        progress: what has been decided so far, with the size of each group afterwards.
        token_fraction: as for ``calibrate``.
        ranks: the ranks that share the images.
        file: where to write what has been decided.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        method: Method,
        options: Any,
        progress: Progress,
        *,
        token_fraction: float,
        ranks: Ranks,
        file: SequentialFile | None,
    ) -> None:
        self._model, self._dense, self._method, self._options = model, anatomy, method, options
        self._ranks, self._file = ranks, file
        self._stride = round(1 / token_fraction)
        self._settings = Settings(Fingerprint.without_weights(anatomy), 8, "all", token_fraction, "", {})
        self._family = family_of(model)
        self.pruned = copy.deepcopy(model)
        self.progress = progress

    def run(self, loader: Iterable[Any], max_images: int | None, keep: Keep) -> None:
        """Prune all layers; the residual width stays as it is."""
        names = list(self._dense.layers)
        first = next((number for number, name in enumerate(names) if self._is_cut(name)), len(names))
        if first == len(names):
            return
        streams = Streams(self._model, self.pruned, self._family, names, loader, max_images, keep, self._ranks)
        silent = self._ranks.rank > 0
        with streams.running(), bar(len(names), "prune", "layers", silent=silent) as advance:
            self._begin(streams, first)
            advance(self.progress.done)
            prefix = self._family.prefix_tokens(self._model)
            rows = RowWeights(self._model, self._dense, prefix, self.progress.rows)
            for number in range(self.progress.done, len(names)):
                if number < first:
                    streams.advance_dense(both=True)
                else:
                    self._layer(streams, names[number], rows)
                self.progress.done = number + 1
                advance(1)
                if number + 1 == len(names) or self._block(names[number]) != self._block(names[number + 1]):
                    self._write()

    def _begin(self, streams: Streams, first: int) -> None:
        """Read the images, and go on from what has been done."""
        done = self.progress.done
        if done == 0:
            self.progress.rows = streams.measure(self._dense)
            streams.start()
            self.progress.images = streams.images
            return
        with self._ranks.together():
            cut(self.pruned, self._family, self._dense, self.progress.keep, self.progress.weights)
            set_norms(self.pruned, self.progress.eps, self.progress.uncentred)
        streams.start(done, done, diverged=done > first)
        if streams.images != self.progress.images:
            raise InvalidArgument(f"resume: expected a loader of {self.progress.images} images, got {streams.images}")

    def _write(self) -> None:
        with self._ranks.together():
            if self._file is not None and self._ranks.rank == 0:
                self._file.write(self.progress)

    def _block(self, name: str) -> int | None:
        return self._dense.block_of(self._dense.layers[name])

    def _is_cut(self, name: str) -> bool:
        groups = (name, *self._dense.layers[name].groups.values())
        return any(self.progress.sizes[group] < self._dense.sizes[group] for group in groups)

    def _on_first(self, make: Callable[[], T]) -> T:
        """Compute something on the first rank, for all: the last bits of a solution depend on the machine."""
        found = None
        with self._ranks.together(), core.torch_threads():
            if self._ranks.rank == 0:
                found = make()
        result: T = self._ranks.gather(found)[0]
        return result

    def _layer(self, streams: Streams, name: str, rows: RowWeights) -> None:
        """Fit and cut one layer, and run it."""
        anatomy = self._family.inspect(self.pruned)
        layer = anatomy.layers[name]
        gone = self.progress.sizes[name] == 0
        self._read_as_dense(streams, anatomy, layer, rows, fit=streams.diverged and not gone)
        scored = self._smaller(anatomy, *(layer.groups[kind] for kind in ("qk", "heads") if kind in layer.groups))
        if scored and not gone:
            tensors = self._observe(streams, anatomy, layer)
            further: dict[str, Remainder] = {}
            if layer.groups["heads"] in scored:  # which are chosen by what they write
                more, further = self._write_as_dense(streams, anatomy, layer, rows, fit=streams.diverged)
                tensors |= more
            self._decide(tensors, scored, further)
            anatomy = self._family.inspect(self.pruned)
            layer = anatomy.layers[name]
        others = self._smaller(anatomy, name, *layer.groups.values())
        if gone:
            others = {name: 0}
        fit = streams.diverged or bool(scored)
        if others or (fit and not layer.post_norm):
            tensors, further = self._write_as_dense(streams, anatomy, layer, rows, fit=fit)
            if others:
                self._decide(tensors, others, further)
        streams.diverged = True
        if gone:
            # The mean that it added is now in a layer before, so the stream is another one from there on.
            streams.start(streams.dense_at, streams.pruned_at + 1, diverged=True)
        else:
            streams.advance_pruned()

    def _smaller(self, anatomy: Anatomy, *groups: str) -> dict[str, int]:
        """Return the sizes of those groups that are still to be cut."""
        sizes = self.progress.sizes
        return {group: sizes[group] for group in groups if sizes[group] < anatomy.sizes[group]}

    def _read_as_dense(self, streams: Streams, anatomy: Anatomy, layer: Layer, rows: RowWeights, *, fit: bool) -> None:
        """Run the dense layer; with ``fit``, make the pruned one read its input as the dense model's."""
        fit = fit and bool(layer.readers)
        width = self._width(layer)
        norms = [
            nn.Identity() if layer.input_norm is None else model.get_submodule(layer.input_norm)
            for model in (self.pruned, self._model)
        ]
        sums = Sums(width, width, name=layer.input_norm or layer.name, stride=self._stride)
        with streams.passing():
            for batch in streams:
                following = streams.through(layer.name, batch.dense)
                if fit:
                    found, wanted = norms[0](batch.pruned), norms[1](batch.dense)
                    sums.update(batch.start, found, wanted, rows.of(layer.name, following))
                batch.dense = following
        streams.dense_at += 1
        if not fit:
            return
        whole, folds = sums.moments(self._ranks)

        def drafted() -> dict[str, Tensor]:
            weights = Weights(self.pruned, anatomy)
            read_as_dense(weights, layer, whole, folds)
            return weights.finish()

        self._apply(anatomy, {}, self._on_first(drafted))

    def _observe(self, streams: Streams, anatomy: Anatomy, layer: Layer) -> dict[str, Float]:
        """Collect what methods ask of queries and keys, on the pruned model's input."""
        parts: list[Mapping[Any, Tap]] = [{part: layer.taps[part] for part in ("query", "key")}]
        if layer.norms:
            # Before query/key norms, whose inputs must be known for a change of basis.
            parts[:0] = [{"stream": norm.tap} for norm in anatomy.norms if norm.name == layer.input_norm]
        shapes = {group.name: (group.heads, group.size) for group in anatomy.groups}
        opened: list[Accumulator] = [
            each for taps in parts for collector in collectors for each in collector.open(taps, self._settings, shapes)
        ]
        taps = [tap for part in parts for tap in part.values()]
        position = Position()
        module = self._family.layers(self.pruned)[layer.name]
        with streams.passing():
            for batch in streams:
                position.images = batch.start
                found = dict(zip(map(id, taps), seen(self.pruned, taps, module, batch.pruned), strict=True))
                for each in opened:
                    each.update(position, [found[id(tap)] for tap in each.taps])
                wait_for_all(opened)
        position.images = streams.images
        tensors = {name: array for each in opened for name, array in each.state(position).items()}
        self._ranks.add(torch.from_numpy(array) for array in tensors.values())
        return tensors

    def _write_as_dense(
        self, streams: Streams, anatomy: Anatomy, layer: Layer, rows: RowWeights, *, fit: bool
    ) -> tuple[dict[str, Float], dict[str, Remainder]]:
        """Collect the moments of the writer's input and, with ``fit``, fit the whole writer to the dense stream.

        A layer that normalises what it adds has no output that is linear in its weights; it is not fitted.
        """
        fit = fit and not layer.post_norm
        whole, folds = self._written(streams, layer, rows, wanted=self._width(layer) if fit else 0)
        tensors = as_statistics(layer.before_writer.name, folds)
        if not fit:
            return tensors, {}

        def drafted() -> dict[str, Tensor]:
            weights = Weights(self.pruned, anatomy)
            write_as_dense(weights, layer, whole, folds)
            return weights.finish()

        self._apply(anatomy, {}, self._on_first(drafted))
        weight = Weights(self.pruned, anatomy).weight(layer.writer)
        return tensors, {layer.writer: remainder(weight, whole, folds)}

    def _written(
        self, streams: Streams, layer: Layer, rows: RowWeights, *, wanted: int
    ) -> tuple[PairedMoments, list[PairedMoments]]:
        """Collect moments of the writer's input, with what the dense stream has more than the pruned one before it."""
        tap = layer.before_writer
        module = self._family.layers(self.pruned)[layer.name]
        size = self.pruned.get_parameter(f"{layer.writer}.weight").shape[1]
        sums = Sums(size, wanted, name=tap.label, stride=self._stride)
        with streams.passing():
            for batch in streams:
                (z,) = seen(self.pruned, [tap], module, batch.pruned)
                weights = rows.of(layer.name, batch.dense)
                sums.update(batch.start, z, (batch.dense - batch.pruned)[..., :wanted], weights)
        return sums.moments(self._ranks)

    def _width(self, layer: Layer) -> int:
        return len(self._model.get_parameter(f"{layer.writer}.weight"))

    def _decide(
        self, tensors: Mapping[str, Float], smaller: Mapping[str, int], remainders: Mapping[str, Remainder]
    ) -> None:
        """Let the method choose what stays of some groups, and cut."""
        anatomy = self._family.inspect(self.pruned)
        bound = Bound(self.pruned, anatomy, Statistics(self._settings, tensors), self._options, remainders)
        decision = self._on_first(lambda: self._method.prepare(bound).decide({**anatomy.sizes, **smaller}))
        self._apply(anatomy, decision.keep, decision.weights)
        with self._ranks.together():
            set_norms(self.pruned, decision.eps, decision.uncentred)
        self.progress.eps |= decision.eps
        self.progress.uncentred += decision.uncentred

    def _apply(self, anatomy: Anatomy, keep: Mapping[str, Indices], weights: Mapping[str, Tensor]) -> None:
        """Cut the copy, and note how it differs from the dense model."""
        with self._ranks.together():
            cut(self.pruned, self._family, anatomy, keep, weights)
        for name, kept in keep.items():
            self.progress.keep[name] = self._of_all_heads(self._dense.group(name), kept)
        gone = {name for name, kept in self.progress.keep.items() if kept.shape[1] == 0}
        names = [*self.progress.weights, *weights]
        self.progress.weights = {
            name: self.pruned.get_parameter(name).detach()
            for name in sorted(set(names))
            if self._dense.layer_holding(name) not in gone
        }

    def _of_all_heads(self, group: Group, kept: Indices) -> Indices:
        """Return indices with a row for every head of the dense model; those of heads that were removed say nothing."""
        if len(kept) == group.heads:
            return kept
        assert group.within is not None
        found = np.tile(np.arange(kept.shape[1], dtype=np.int64), (group.heads, 1))
        found[self.progress.keep[group.within][0]] = kept
        return found
