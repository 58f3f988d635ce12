"""Watches a model's forward passes and passes what its layers' taps read to the collectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..anatomy import Anatomy, Part, Tap
from ..errors import InvalidArgument
from ..runtime.ranks import Ranks
from .collectors import Accumulator, Position, collectors
from .collectors.base import wait_for_all
from .gradients import Gradients
from .objective import Objective
from .rows import RowWeights, after_layers
from .settings import FOLDS, Float, Settings
from .statistics import IMAGES, Statistics

__all__ = ["EnoughError", "Observer"]

_ALONE = Ranks()


class EnoughError(Exception):
    """Everything that is observed has been seen, so the forward pass can end here."""


class Observer:
    """The accumulators of everything that is observed, and their position."""

    def __init__(
        self,
        anatomy: Anatomy,
        settings: Settings,
        *,
        only: int | None = None,
        norms: bool | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Observe the whole model, or the layers of block ``only``, or with ``norms`` the norms (and one attention).

        With an ``objective``, its gradients are gathered too.
        """
        self.position = Position()
        # Gives tokens their weights, where `Settings.row_weights` asks for them.
        self.weights: RowWeights | None = None
        self.whole = True
        self._paused = False
        self.settings = settings
        self.sensitivity: dict[str, Float] = {}
        first = next((anatomy.block_of(layer) for layer in anatomy.attention), None)
        blocks = None if norms is None else {first if only is None else only}
        # Attention comes first: its sums count the images.
        layers = [*anatomy.attention, *anatomy.ffn]
        self._layers = [each for each in layers if blocks is None or anatomy.block_of(each) in blocks]
        # Before query/key norms, whose inputs must be known for a change of basis.
        normed = {layer.input_norm for layer in self._layers if {"query", "key"} <= layer.norms.keys()}
        self._norms = [norm for norm in anatomy.norms if norms is None or norms or norm.name in normed]
        # Forward passes of one block end after its last layer.
        inside = [each.writer for each in anatomy.layers.values() if each in self._layers]
        self._last = inside[-1] if norms is False else None
        seen: list[Mapping[Part, Tap]] = [layer.taps for layer in self._layers]
        seen += [{"stream": norm.tap} for norm in self._norms]
        shapes = {g.name: (g.heads, g.size) for g in anatomy.groups}
        self._accumulators: list[Accumulator] = []
        # Those of layers, and what they have read before the layer's end, where its tokens get their weights.
        self._in_layers: list[Accumulator] = []
        self._read: list[tuple[Accumulator, list[Tensor]]] = []
        for taps in seen:
            order = list(taps.values())
            found = [each for collector in collectors for each in collector.open(taps, settings, shapes)]
            # In the order of a forward pass, so that errors name the first cause.
            self._accumulators += sorted(found, key=lambda each: order.index(each.taps[0]))
            self._in_layers += [] if "stream" in taps else found
        maps = [layer.taps["query"].maps_per_image for layer in self._layers if "query" in layer.taps]
        if set(maps) != {1}:
            # The scorers' own counts are of maps, and any of them may be asked.
            self._accumulators.append(_Count())

        self.gradients = None if objective is None else Gradients(anatomy, objective)
        self._accumulators += [] if self.gradients is None else [self.gradients]

    @property
    def images(self) -> int:
        """Number of images that all ranks have seen."""
        return self.position.images

    @contextmanager
    def batch(self, start: int, end: int) -> Iterator[None]:
        """Observe one forward pass of images from number ``start`` on; all ranks together will have seen ``end``.

        After a failure halfway, some layers have seen images that others have not.
        """
        self.whole = False
        self.position.images = start
        yield
        self.position.images = end
        self.whole = True

    def wait(self) -> None:
        """Wait for the work that was started on a device.

        Raises:
            NumericalError: a value that was not finite.
        """
        wait_for_all(self._accumulators)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the device after every layer, so that errors name the right layer."""
        self.position.wait = True
        try:
            yield
        finally:
            self.position.wait = False

    def statistics(self, ranks: Ranks = _ALONE) -> Statistics:
        """Return the statistics of all ranks; all must call it."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        for accumulator in self._accumulators:
            tensors |= accumulator.state(self.position)
        ranks.add(torch.from_numpy(array) for array in tensors.values())
        tensors |= {f"sensitivity/{name}": sums for name, sums in self.sensitivity.items()}
        dtypes = sorted({dtype for dtype in ranks.gather(self.position.dtype) if dtype})
        if len(dtypes) > 1:
            raise InvalidArgument(f"model: expected queries and keys of one type on all ranks, got {dtypes}")
        settings = Settings(**{**vars(self.settings), "dtype": "".join(dtypes)})
        return Statistics(settings, tensors)

    def follow(self, ranks: Ranks) -> None:
        """Continue from the first rank's position; the sums on this rank stay its own."""
        if ranks.size > 1:
            position, self.sensitivity = ranks.gather((self.position, self.sensitivity))[0]
            self.position.images, self.position.dtype = position.images, position.dtype

    def restore(self, statistics: Statistics) -> None:
        """Continue from the sums of a file.

        Raises:
            InvalidArgument: they are of another model, or were collected with other settings.
        """
        settings = statistics.settings
        self.settings.fingerprint.require(settings.fingerprint, "resume", strict=True)
        for name in ("gamma", "collect", "token_fraction", "data", "row_weights", "gradients"):
            mine, found = getattr(self.settings, name), getattr(settings, name)
            if mine != found:
                raise InvalidArgument(f"resume: expected a file of {name} = {mine!r}, got {found!r}")
        for accumulator in self._accumulators:
            accumulator.load_state(statistics.tensors)
        for name, array in statistics.tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "sensitivity":
                self.sensitivity[rest] = array
        self.position.images, self.position.dtype = statistics.images, settings.dtype

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Observe every forward pass while the block runs."""
        handles: list[RemovableHandle] = []
        try:
            for accumulator in self._accumulators:
                pending: dict[int, Tensor] = {}
                for number, tap in enumerate(accumulator.taps):
                    handles.append(_on(model, tap, partial(self._seen, accumulator, pending, number)))
            if self.weights is not None:
                handles += after_layers(model, self._layers, partial(self._weigh, self.weights))
            if self._last is not None:
                handles.append(model.get_submodule(self._last).register_forward_hook(_enough))
            yield
        finally:
            self._read.clear()
            for handle in handles:
                handle.remove()

    def count(self, images: int) -> None:
        """Count the images of a batch that has been run, for models where attention maps do not count them."""
        for accumulator in self._accumulators:
            if isinstance(accumulator, _Count):
                accumulator.add(self.position, images)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Observe nothing while the block runs: a second pass of the same images must not count."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _seen(self, accumulator: Accumulator, pending: dict[int, Tensor], number: int, seen: Tensor) -> None:
        if self._paused:
            return
        pending[number] = accumulator.taps[number].read(seen)
        if number == len(accumulator.taps) - 1:
            tensors = [pending[each] for each in range(len(accumulator.taps))]
            pending.clear()
            if self.weights is not None and accumulator in self._in_layers:
                self._read.append((accumulator, tensors))
            else:
                accumulator.update(self.position, tensors)

    def _weigh(self, weights: RowWeights, layer: str, stream: Tensor) -> None:
        """Add what was read in a layer, now that the stream after it is known."""
        if self._paused:
            return
        self.position.weights = weights.of(layer, stream)
        for accumulator, tensors in self._read:
            accumulator.update(self.position, tensors)
        self._read.clear()
        self.position.weights = None


class _Count:
    """The number of images in each fold, for models where any attention has several maps per image, or with none."""

    taps: tuple[Tap, ...] = ()

    def __init__(self) -> None:
        self._images = np.zeros(len(FOLDS))

    def update(self, position: Position, seen: object) -> None:
        """Do nothing: it observes no taps."""

    def add(self, position: Position, images: int) -> None:
        """Add images, from the batch's first on."""
        first = position.images % 2
        self._images[first] += (images + 1) // 2
        self._images[1 - first] += images // 2

    def wait(self) -> None:
        """Do nothing: no work is pending."""

    def state(self, position: Position) -> dict[str, npt.NDArray[Any]]:
        """Return the number of images in each fold."""
        del position
        return {f"{fold}/{IMAGES}/images": self._images[index : index + 1].copy() for index, fold in enumerate(FOLDS)}

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from these numbers."""
        self._images = np.array([state[f"{fold}/{IMAGES}/images"][0] for fold in FOLDS])


def _enough(_module: nn.Module, _args: object, _output: object) -> None:
    raise EnoughError


def _on(model: nn.Module, tap: Tap, observe: Callable[[Tensor], None]) -> RemovableHandle:
    module = model.get_submodule(tap.module)
    if tap.at == "input":
        return module.register_forward_pre_hook(lambda _module, args: observe(args[0]))
    return module.register_forward_hook(lambda _module, _args, output: observe(output))
