"""Runs a dense model and its pruned copy side by side, layer by layer, over the same images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import core
from ..anatomy import Anatomy, Tap
from ..anatomy.fingerprint import Fingerprint
from ..data.loader import ImageLoader
from ..data.model_input import data_config, model_input, split_batch
from ..errors import InvalidArgument
from ..families.base import Family
from ..families.registry import family_of
from ..runtime.ranks import Ranks
from .measurements import MEASURED_IMAGES, Work, measurements
from .observer import EnoughError, Observer
from .passes import as_written, batches_of, evaluating, run, warn_unless_normalised
from .settings import Float, Settings
from .statistics import Statistics

__all__ = ["Keep", "Streams", "calibrate_norms", "seen"]

Keep = Literal["memory", "recompute"]
# Images that go through a layer at once: more take more memory and no less time.
_CHUNK = 64


class Streams:
    """The residual streams of a dense model and of a pruned copy, after some of their layers, image by image.

    ``dense_at`` and ``pruned_at`` count the layers that each has passed, by their place in ``names``; layers that have
    been removed are passed over. Until the copy ``diverges``, its stream is the dense one.

    Args:
        dense: the model.
        pruned: the copy that is being pruned.
        family: their family, which can run layers one at a time.
        names: the dense model's layers, in the order of a forward pass.
        loader: as for ``calibrate``.
        max_images: as for ``calibrate``.
        keep: "memory" keeps both streams in the model's type, on its device; "recompute" runs the layers before from
            the images on each time.
        ranks: the ranks that share the images.
    """

    def __init__(
        self,
        dense: nn.Module,
        pruned: nn.Module,
        family: Family,
        names: Sequence[str],
        loader: Iterable[Any],
        max_images: int | None,
        keep: Keep,
        ranks: Ranks,
    ) -> None:
        self._dense, self._pruned, self._family, self._names = dense, pruned, family, names
        if ranks.size > 1 and isinstance(loader, ImageLoader):
            loader = loader.sharded(ranks.rank, ranks.size, whole_batches=True)
        self._loader, self._limit, self._keep, self._ranks = loader, max_images, keep, ranks
        self.dense_at = self.pruned_at = 0
        self.diverged = False
        self.images = 0
        self._kept: list[Batch] = []
        self._places: list[tuple[int, int]] = []
        self._warned = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put both models in evaluation mode, uncompiled, while the block runs."""
        with ExitStack() as stack:
            for model in (self._dense, self._pruned):
                stack.enter_context(as_written(model))
                stack.enter_context(evaluating(model))
            stack.enter_context(core.host_by_default())
            yield

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let all ranks iterate over their batches, and fail together."""
        with self._ranks.together(), _without_gradients():
            yield

    def measure(self, anatomy: Anatomy) -> dict[str, Float]:
        """Take the measurement "rows" of the dense model on the first images; every rank returns the sums of all."""
        first = {start: images.detach().clone() for start, images in self._rounds(MEASURED_IMAGES) if len(images) > 0}
        parts = self._ranks.gather({start: images.cpu() for start, images in first.items()})
        place = next(self._dense.parameters()).device
        batches = [images.to(place) for _, images in sorted(item for part in parts for item in part.items())]
        with self._ranks.together(), core.torch_threads():
            nothing = Statistics.of_nothing(Fingerprint.without_weights(anatomy))
            work = Work(self._dense, self._family, anatomy, batches, nothing, self._ranks.rank, self._ranks.size)
            (found,) = measurements.named("rows").take(work)
        self._ranks.add(torch.from_numpy(sums) for sums in found.values())
        return dict(found)

    def start(self, dense_at: int = 0, pruned_at: int = 0, *, diverged: bool = False) -> None:
        """Read the images, and run both models up to these layers, as a run that came so far has done."""
        self.dense_at, self.pruned_at, self.diverged = dense_at, pruned_at, diverged
        self._kept, self._places = [], []
        for start, images in self._rounds(None):
            with self._ranks.together(), _without_gradients():
                self._places.append((start, len(images)))
                if self._keep == "memory":
                    self._kept += self._computed(start, images)
        with self._ranks.together(1) as told:
            told[0] = sum(count for _, count in self._places)
        self.images = int(told[0])
        if self.images == 0:
            raise InvalidArgument("loader: expected at least one image, got none")

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this rank with both streams where they are now; only within `passing`."""
        yield from self._kept if self._keep == "memory" else self._again()

    def through(self, name: str, x: Tensor, *, pruned: bool = False) -> Tensor:
        """Return the stream after one layer of a model, which keeps it as it is where the layer has been removed."""
        layer = self._family.layers(self._pruned if pruned else self._dense).get(name)
        found: Tensor = x if layer is None else layer(x)
        return found

    def enter_alike(self) -> bool:
        """Return whether both models make the same of the first image before their first layers."""
        for _, images in self._rounds(1):
            if len(images) > 0:
                with _without_gradients():
                    first, second = (_entry(model, self._family, images) for model in (self._dense, self._pruned))
                    return first.shape == second.shape and bool(torch.equal(first, second))
        return True

    def advance_dense(self, *, both: bool = False) -> None:
        """Run the next layer of the dense model; with ``both``, of the copy as well, which is the same so far."""
        name = self._names[self.dense_at]
        if self._keep == "memory":
            with self.passing():
                for batch in self:
                    batch.dense = self.through(name, batch.dense)
                    if both:
                        batch.pruned = batch.dense
        self.dense_at += 1
        self.pruned_at += both

    def advance_pruned(self) -> None:
        """Run the next layer of the pruned copy, which has diverged."""
        name = self._names[self.pruned_at]
        if self._keep == "memory":
            with self.passing():
                for batch in self:
                    batch.pruned = self.through(name, batch.pruned, pruned=True)
        self.pruned_at += 1

    def _computed(self, first: int, images: Tensor) -> Iterator[Batch]:
        """Run both models from the images on, in parts of a bounded number."""
        for part in range(0, len(images), _CHUNK):
            chunk = images[part : part + _CHUNK]
            x = pruned = _entry(self._dense, self._family, chunk)
            for name in self._names[: self.dense_at]:
                x = self.through(name, x)
            # While they are the same, they are computed and kept once.
            if self.diverged or self.pruned_at != self.dense_at:
                if self.diverged:
                    pruned = _entry(self._pruned, self._family, chunk)
                for name in self._names[: self.pruned_at]:
                    pruned = self.through(name, pruned, pruned=self.diverged)
            else:
                pruned = x
            yield Batch(first + part, x, pruned)

    def _again(self) -> Iterator[Batch]:
        """Read the images once more; as their numbers are known, ranks need not wait for each other."""
        for (start, count), batch in zip(self._places, self._loader, strict=False):
            images = split_batch(batch, empty=True, labels=False, model=self._dense)[0]
            if count > 0:
                yield from self._computed(start, model_input(self._dense, images)[:count])

    def _rounds(self, limit: int | None) -> Iterator[tuple[int, Tensor]]:
        """Yield this rank's images, none in some rounds, and the number of the first; all ranks have as many rounds."""
        limits = [each for each in (limit, self._limit) if each is not None]
        config = data_config(self._dense) if getattr(self._dense, "pretrained_cfg", None) else None
        batches = batches_of(self._dense, self._loader, min(limits, default=None), 0, self._ranks)
        for start, images, _ in batches:
            if not self._warned:
                self._warned = True
                with self._ranks.together():  # a warning may be an error
                    if self._ranks.rank == 0:
                        warn_unless_normalised(images, config)
            yield start, images


def calibrate_norms(
    model: nn.Module, loader: Iterable[Any], max_images: int | None, token_fraction: float, ranks: Ranks
) -> Statistics:
    """Collect statistics of what the norms of residual streams see, over the images of all ranks."""
    anatomy = family_of(model).inspect(model)
    settings = Settings(Fingerprint.of(model, anatomy), 8, "all", token_fraction, "", {})
    return run(model, loader, Observer(anatomy, settings, norms=True), max_images=max_images, ranks=ranks)


class Batch:
    """Some images: the number of the first, and their streams (B, N, width); putting new ones replaces them."""

    def __init__(self, start: int, dense: Tensor, pruned: Tensor) -> None:
        self.start, self.dense, self.pruned = start, dense, pruned


def seen(model: nn.Module, taps: Sequence[Tap], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Run a layer until all taps have been passed, and return what they read."""
    found: dict[int, Tensor] = {}

    def note(number: int, value: Tensor) -> None:
        found[number] = taps[number].read(value)
        if len(found) == len(taps):
            raise EnoughError

    def before(number: int) -> Any:
        return lambda _module, args: note(number, args[0])

    def after(number: int) -> Any:
        return lambda _module, _args, output: note(number, output)

    with ExitStack() as stack, suppress(EnoughError):
        for number, tap in enumerate(taps):
            module = model.get_submodule(tap.module)
            if tap.at == "input":
                handle = module.register_forward_pre_hook(before(number))
            else:
                handle = module.register_forward_hook(after(number))
            stack.callback(handle.remove)
        layer(x)
    return [found[number] for number in range(len(taps))]


@contextmanager
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode(), core.torch_threads():
        yield


def _entry(model: nn.Module, family: Family, images: Tensor) -> Tensor:
    """Return the residual stream before the first block, (B, N, width)."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise EnoughError

    handle = family.blocks(model)[0].register_forward_pre_hook(hook)
    try:
        with suppress(EnoughError):
            model(images)
    finally:
        handle.remove()
    return found[0]
