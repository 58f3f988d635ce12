"""Chooses sizes by what was measured: losses that are missing, and what cuts cost together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Group
from ..anatomy.fingerprint import Fingerprint
from ..budgets.budget import Allocation
from ..calibration.cuts import Cuts, Passed, measured_sizes, pruned_copy
from ..calibration.merging import MergingSchedules
from ..calibration.sample import Sample, Sampler
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..methods.base import Decision, Method, Prepared
from ..statistics.measurements import MEASURED_IMAGES, Measurement, Work
from ..statistics.measurements.base import divergence
from ..statistics.passes import batches_of, measuring
from ..statistics.settings import Float
from ..statistics.statistics import Statistics
from .losses import Losses, Merging
from .on_the_clock import LatencyReport

__all__ = ["Choice", "Measured"]

# Further rounds change little: what a group costs beside the others depends weakly on their exact sizes.
_ROUNDS = 2
# How far the factors of single groups differ from that of all, relative to it, and the most that is believed.
_SPREAD, _MOST = 0.5, 4.0


class Choice(NamedTuple):
    """The sizes that were chosen, how a target for latency was met, what stays, and the parameters left."""

    allocation: Allocation
    latency: LatencyReport | None
    decision: Decision
    params: int


class Measured:
    """Runs some of the first images of a loader through cut copies of a model.

    Args:
        model: the model.
        anatomy: its description.
        groups: the groups that may be cut.
        loader: batches of images, as for `calibrate`.

    Raises:
        InvalidArgument: there are no images, or not of the model's size.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, groups: Sequence[Group], loader: Iterable[Any]) -> None:
        self._groups = groups
        batches = [images for _, images, _ in batches_of(model, loader, MEASURED_IMAGES)]
        if not batches:
            raise InvalidArgument("loader: expected at least one image, got none")
        nothing = Statistics.of_nothing(Fingerprint.without_weights(anatomy))
        self._work = Work(model, family_of(model), anatomy, batches, nothing)
        self._sampler = Sampler()

    def completed(self, stats: Statistics, method: Method, options: Any) -> Statistics:
        """Return the statistics with the method's losses of the groups, measured where they are missing."""
        names = [group.name for group in self._groups]
        needed: list[Measurement] = [Cuts(method, options, names, self._sampler)]
        if not stats.merged and any(group.of_tokens for group in self._groups):
            needed.append(MergingSchedules(self._sampler))
        done = {name.removeprefix("sensitivity/") for name in stats.tensors}
        work = replace(self._work, statistics=stats, done=done)
        with measuring(work.model):
            parts = [part for measurement in needed for part in measurement.take(work)]
        added = {f"sensitivity/{name}": sums for part in parts for name, sums in part.items()}
        return Statistics(stats.settings, {**stats.tensors, **added})

    def jointly(
        self,
        found: Choice,
        prepared: Prepared,
        losses: Losses | None,
        merging: Merging,
        choose: Callable[[Losses, Merging], Choice],
    ) -> tuple[Choice, float]:
        """Choose again by what each group costs beside all other cuts; return the best choice and its measured loss."""
        with measuring(self._work.model):
            dense = [each.output for each in self._passed(self._work.model)]
            best, cut = found, self._run(prepared, found.allocation.sizes, dense)
            for _ in range(_ROUNDS if losses is not None else 0):
                assert losses is not None
                sizes = best.allocation.sizes
                factors = self._factors(prepared, sizes, losses, cut, dense)
                merged = self._factor_of_merging(prepared, sizes, merging, cut, dense)
                again = choose(_scaled(losses, factors), [(each, merged * loss) for each, loss in merging])
                if again.allocation.sizes == best.allocation.sizes:
                    break
                tried = self._run(prepared, again.allocation.sizes, dense)
                if self._mean(tried[1]) >= self._mean(cut[1]):
                    break
                best, cut = again, tried
        return best, self._mean(cut[1])

    @property
    def _sample(self) -> list[Sample]:
        return self._sampler.of(self._work)

    @cached_property
    def _weights(self) -> Tensor:
        return torch.cat([each.weights for each in self._sample])

    def _mean(self, losses: Tensor) -> float:
        return float(self._weights @ losses.cpu() / self._weights.sum())

    def _doubt(self, losses: Tensor) -> float:
        """Return the standard error of the mean."""
        apart = losses.cpu() - self._mean(losses)
        return float((self._weights * apart).square().sum().sqrt() / self._weights.sum())

    def _passed(self, model: nn.Module) -> list[Passed]:
        return [Passed.through(model, self._work.family, each.images) for each in self._sample]

    def _run(
        self, prepared: Prepared, sizes: Mapping[str, int], dense: Sequence[Tensor]
    ) -> tuple[list[Passed], Tensor]:
        """Run the model cut to these sizes; also return each image's loss."""
        cut = pruned_copy(self._work, prepared, sizes)
        passed = self._passed(cut)
        losses = [divergence(cut, wanted, each.output) for wanted, each in zip(dense, passed, strict=True)]
        return passed, torch.cat(losses)

    def _factors(
        self,
        prepared: Prepared,
        sizes: Mapping[str, int],
        losses: Losses,
        cut: tuple[list[Passed], Tensor],
        dense: Sequence[Tensor],
    ) -> dict[str, float]:
        """Return what each group's cut costs beside the others, as a multiple of what it costs alone."""
        passed, base = cut
        rows: dict[str, tuple[float, float, float]] = {}
        for group in (each for each in self._groups if not each.of_tokens):
            # A group that is cut is restored; one that is whole is cut.
            other = group.size if sizes[group.name] < group.size else max(measured_sizes(group), default=group.size)
            alone = abs(float(losses(group)[sizes[group.name]] - losses(group)[other]))
            if not alone > 0:
                continue
            changed = pruned_copy(self._work, prepared, {**sizes, group.name: other})
            pairs = zip(passed, dense, strict=True)
            loss = torch.cat([each.loss(changed, self._work.family, group, out) for each, out in pairs])
            gained = base - loss if other == group.size else loss - base
            doubt = self._doubt(gained) if len(gained) > 1 else alone
            rows[group.name] = alone, self._mean(gained), doubt
        return dict(zip(rows, _shrunk(*np.array(list(rows.values())).T).tolist(), strict=True)) if rows else {}

    def _factor_of_merging(
        self,
        prepared: Prepared,
        sizes: Mapping[str, int],
        merging: Merging,
        cut: tuple[list[Passed], Tensor],
        dense: Sequence[Tensor],
    ) -> float:
        """Return what merging costs beside the cuts, as a multiple of what it costs alone."""
        if not merging:
            return 1.0
        whole = {name: self._work.anatomy.sizes[name] for name in merging[0][0]}
        left = sum(sizes[name] for name in whole)
        if left < sum(whole.values()):
            # Limits may have changed the schedule that was measured.
            other, less, sign = whole, min(merging, key=lambda each: abs(sum(each[0].values()) - left))[1], 1
        else:
            other, less, sign = dict(merging[len(merging) // 2][0]), merging[len(merging) // 2][1], -1
        _, loss = self._run(prepared, {**sizes, **other}, dense)
        beside = sign * self._mean(cut[1] - loss)
        return min(_MOST, max(1 / _MOST, beside / less)) if less > 0 else 1.0


def _scaled(losses: Losses, factors: Mapping[str, float]) -> Losses:
    # Groups that lose nothing alone have no factor, and none is needed.
    return lambda group: factors.get(group.name, 1.0) * losses(group)


def _shrunk(alone: Float, beside: Float, doubt: Float) -> Float:
    """Return the losses beside other cuts over the losses alone; doubtful ones are drawn to the factor of all."""
    common = max(float(beside.sum()), 1e-9) / max(float(alone.sum()), 1e-9)
    spread = (_SPREAD * common) ** 2
    trust = spread / (spread + (doubt / alone) ** 2)
    found: Float = np.clip(common + trust * (beside / alone - common), common / _MOST, common * _MOST)
    return found
