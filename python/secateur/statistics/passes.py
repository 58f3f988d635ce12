"""Runs images through a model while an observer watches, and takes the measurements that need more passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .. import core
from ..anatomy import Anatomy
from ..data.loader import ImageLoader, in_batches
from ..data.model_input import images_in, model_input, split_batch
from ..errors import InvalidArgument, NumericalError
from ..families.base import Family
from ..runtime.progress import progress
from ..runtime.ranks import Ranks
from .gradients import Gradients
from .measurements import MEASURED_IMAGES, Measurement, Work, measurements
from .objective import Share
from .observer import EnoughError, Observer
from .rows import RowWeights
from .statistics import Statistics

__all__ = ["as_written", "batches_of", "evaluating", "measuring", "run", "warn_unless_normalised"]

_ALONE = Ranks()
# Marks the end; it differs from every batch, even None.
_END = object()


def run(
    model: nn.Module,
    loader: Iterable[Any],
    observer: Observer,
    *,
    max_images: int | None,
    anatomy: Anatomy | None = None,
    family: Family | None = None,
    further: Sequence[Measurement] = (),
    path: Path | None = None,
    every: int | None = None,
    ranks: Ranks = _ALONE,
    labels: bool = False,
) -> Statistics:
    """Run the images and the measurements ``further``, and write ``path``; arguments are those of `calibrate`.

    With ``labels``, the classes of data sets and lists of single images are read too.
    """
    total = images_in(loader, max_images)
    with ranks.together():
        if ranks.size > 1 and isinstance(loader, ImageLoader):
            loader = loader.sharded(ranks.rank, ranks.size, whole_batches=True)
        if ranks.rank == 0 and path is not None and path.is_file():
            observer.restore(Statistics.load(path))
        if max_images is not None and observer.images > max_images:
            raise InvalidArgument(f"resume: expected a file of at most {max_images} images, got {observer.images}")
    observer.follow(ranks)
    seen = observer.images
    end = 0
    first: dict[int, torch.Tensor] = {}
    # A measurement whose sums have further names may have been interrupted, and skips what is done itself.
    taken = [name.rpartition("/")[2] for name in observer.sensitivity]
    missing = [measurement for measurement in further if measurement.name not in taken]
    with measuring(model), _kept(observer, path, ranks):
        shown = progress(total, "calibrate", silent=ranks.rank > 0)
        rounds = rounds_of(model, loader, max_images, seen, ranks, labels=labels)
        if observer.gradients is not None:
            rounds = _checked(model, observer, observer.gradients, rounds, ranks, seen)
        if observer.settings.row_weights:
            assert family is not None
            assert anatomy is not None
            rounds = _weighing(model, family, anatomy, observer, rounds, ranks)
        with observer.observing(model), shown as advance:
            for index, (start, images, stop, share) in enumerate(rounds):
                advance(stop - end)
                end = stop
                if missing and start < MEASURED_IMAGES and len(images) > 0:
                    first[start] = images[: MEASURED_IMAGES - start].detach().clone()
                if index == 0:
                    with ranks.together():  # a warning may be an error
                        if ranks.rank == 0:
                            warn_unless_normalised(images, observer.settings.data)
                if end <= seen:
                    continue
                skip = min(len(images), max(0, seen - start))
                with ranks.together(), observer.batch(start + skip, end):
                    if skip < len(images):
                        if observer.gradients is not None:
                            with observer.paused():
                                part = share.part(skip, len(images))
                                observer.gradients.add(model, images[skip:], part, start + skip)
                        _forward(model, observer, images[skip:])
                        observer.count(len(images) - skip)
                if every and path is not None and (index + 1) % every == 0:
                    _save(observer.statistics(ranks), path, ranks)
        if missing and end >= seen:
            assert family is not None
            assert anatomy is not None
            _measure(model, family, anatomy, observer, missing, first, ranks)
    if end < seen:
        raise InvalidArgument(f"resume: expected a loader of at least {seen} images, got {seen - end} fewer")
    if observer.images == 0:
        raise InvalidArgument("loader: expected at least one image, got none")
    statistics = observer.statistics(ranks)
    if path is not None and (observer.images > seen or observer.sensitivity):
        _save(statistics, path, ranks)
    return statistics


def _weighing(
    model: nn.Module,
    family: Family,
    anatomy: Anatomy,
    observer: Observer,
    rounds: Iterator[Round],
    ranks: Ranks,
) -> Iterator[Round]:
    """Measure on the first images how tokens count, unless that is known, and return all rounds."""
    early = []
    if not any(name.endswith("/rows") for name in observer.sensitivity):
        for each in rounds:
            # The loader may use its memory again.
            kept = each if observer.gradients is None else each._replace(share=copy.deepcopy(each.share))
            early.append(kept._replace(images=each.images.detach().clone()))
            if each.stop >= MEASURED_IMAGES:
                break
        first = {each.start: each.images[: max(0, MEASURED_IMAGES - each.start)] for each in early}
        first = {start: images for start, images in first.items() if len(images) > 0}
        _measure(model, family, anatomy, observer, [measurements.named("rows")], first, ranks)
    sums = {name: each for name, each in observer.sensitivity.items() if name.endswith("/rows")}
    if sums:
        observer.weights = RowWeights(model, anatomy, family.prefix_tokens(model), sums)
    return chain(early, rounds)


def _checked(
    model: nn.Module, observer: Observer, gradients: Gradients, rounds: Iterator[Round], ranks: Ranks, seen: int
) -> Iterator[Round]:
    """Try the loss on the first image that is not skipped, before any work."""
    tried = False
    for each in rounds:
        if not tried and each.stop > seen:
            skip = max(0, seen - each.start)
            with ranks.together(), observer.paused():
                if skip < len(each.images):
                    gradients.check(model, each.images[skip:], each.share.part(skip, len(each.images)))
            tried = True
        yield each


def _forward(model: nn.Module, observer: Observer, images: torch.Tensor) -> None:
    with suppress(EnoughError):
        model(images)
    try:
        observer.wait()
    except NumericalError:
        # The error came late, from a device: run again and wait, to find which layer and value it is.
        with observer.waiting(), suppress(EnoughError):
            model(images)
        raise


def _measure(
    model: nn.Module,
    family: Family,
    anatomy: Anatomy,
    observer: Observer,
    missing: Sequence[Measurement],
    first: Mapping[int, torch.Tensor],
    ranks: Ranks,
) -> None:
    """Take the measurements on the first images; all ranks have these, and each does a share of the work."""
    parts = ranks.gather({start: images.cpu() for start, images in first.items()}) if ranks.size > 1 else [first]
    found = dict(sorted(item for part in parts for item in part.items()))
    if not found:
        return
    with ranks.together():
        batches = [model_input(model, images) for images in found.values()]
    statistics = observer.statistics(ranks)
    for measurement in missing:
        done = frozenset(observer.sensitivity)
        rounds = measurement.take(
            Work(model, family, anatomy, batches, statistics, rank=ranks.rank, ranks=ranks.size, done=done)
        )
        while True:
            with ranks.together():
                share = next(rounds, None)
            if share is None:
                break
            for part in ranks.gather(share):
                for name, sums in part.items():
                    observer.sensitivity[name] = observer.sensitivity.get(name, 0) + sums


@contextmanager
def _kept(observer: Observer, path: Path | None, ranks: Ranks) -> Iterator[None]:
    """If the block fails, write what was collected, provided that all layers on all ranks have seen the same images."""
    before = observer.images
    try:
        yield
    except BaseException as error:
        # Several ranks are at the same position only after an error that is raised on all of them.
        if path is None or (ranks.size > 1 and (ranks.lost or not isinstance(error, Exception))):
            raise
        more = observer.images > before or (before > 0 and observer.sensitivity)
        if all(ranks.gather(observer.whole)) and more:
            _save(observer.statistics(ranks), path, ranks)
        raise


def _save(statistics: Statistics, path: Path, ranks: Ranks) -> None:
    with ranks.together():
        if ranks.rank == 0:
            statistics.save(path)


def _refuse_non_finite(images: torch.Tensor, start: int) -> None:
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0, 0])
        value = images[first][~images[first].isfinite()][0].item()
        raise NumericalError(f"loader: expected finite values, got {value} in image {start + first}")


def batches_of(
    model: nn.Module, loader: Iterable[Any], max_images: int | None, seen: int = 0, ranks: Ranks = _ALONE
) -> Iterator[tuple[int, torch.Tensor, int]]:
    """Yield the number of a batch's first image, this rank's images, and the number of images so far."""
    return ((start, images, stop) for start, images, stop, _ in rounds_of(model, loader, max_images, seen, ranks))


class Round(NamedTuple):
    """One batch: the number of its first image, the images as the model takes them, and the number so far."""

    start: int
    images: torch.Tensor
    stop: int
    share: Share


def rounds_of(
    model: nn.Module,
    loader: Iterable[Any],
    max_images: int | None,
    seen: int = 0,
    ranks: Ranks = _ALONE,
    *,
    labels: bool = False,
) -> Iterator[Round]:
    """Yield this rank's batches as the model takes them.

    In each round every rank has a batch, or has reached its end; images are numbered as if the batches of a round
    followed one another. There are exactly ``max_images`` in all, and no round begins after them. The first ``seen``
    images may hold anything.
    """
    source = iter(in_batches(loader, model, labels=labels))
    start = 0
    while max_images is None or start < max_images:
        with ranks.together(2 * ranks.size) as told:
            batch = next(source, _END)
            images = _images(batch, model, ranks)
            size = len(images)
            if len(images) > 0:
                images = model_input(model, images)
            told[ranks.rank] = len(images)
            told[ranks.size + ranks.rank] = batch is not _END
        if not any(told[ranks.size :]):
            return
        own = start + int(sum(told[: ranks.rank]))
        start += int(sum(told[: ranks.size]))
        if max_images is not None:
            start = min(start, max_images)
            images = images[: max(0, max_images - own)]
        with ranks.together():
            skip = max(0, seen - own)
            if skip < len(images):
                _refuse_non_finite(images[skip:], own + skip)
        yield Round(own, images, start, Share(batch, size, 0, len(images)))


def _images(batch: Any, model: nn.Module, ranks: Ranks) -> torch.Tensor:
    if batch is _END:
        return torch.empty(0)
    return split_batch(batch, empty=ranks.size > 1, labels=False, model=model)[0]


def warn_unless_normalised(images: torch.Tensor, data: Any) -> None:
    """Warn if the range of images does not fit (x − mean) / std for pixels in [0, 1]; ignore NaN and Inf."""
    if not data or len(images) == 0 or not bool(images.isfinite().all()):
        return
    mean, std = np.asarray(data["mean"]), np.asarray(data["std"])
    low, high = float(((0 - mean) / std).min()), float(((1 - mean) / std).max())
    least, most = float(images.min()), float(images.max())
    slack = 0.05 * (high - low)
    raw = least >= 0 and low < -slack
    if raw or least < low - slack or most > high + slack:
        warnings.warn(
            f"calibration images range over [{least:.3g}, {most:.3g}], but normalised as the model's data configuration"
            f" says (mean {tuple(data['mean'])}, std {tuple(data['std'])}) they would lie in [{low:.3g}, {high:.3g}]",
            stacklevel=3,
        )


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode, as it is written and without gradients, while the block runs."""
    with as_written(model), core.host_by_default(), evaluating(model), core.torch_threads(), torch.inference_mode():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode while the block runs, and restore its mode in any case."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run modules uncompiled while the block runs, because modules compiled in place may skip hooks."""
    compiled: list[tuple[Any, Any]] = [
        (module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, run in compiled:
            module._compiled_call_impl = run
