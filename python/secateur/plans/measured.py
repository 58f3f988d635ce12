"""Chooses sizes by what was measured: losses that are missing, and what cuts cost together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Group
from ..budgets.budget import Allocation
from ..calibration.cuts import MEASURED_IMAGES, Cuts, Passed, first_images, measured_sizes, pruned_copy
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..methods.base import Decision, Method, Prepared
from ..statistics.measurements import Work, divergence
from ..statistics.passes import batches_of, measuring
from ..statistics.settings import Float
from ..statistics.statistics import Statistics
from .on_the_clock import LatencyReport

__all__ = ["Choice", "Measured"]

# Further rounds change little: what a group costs beside the others depends weakly on their exact sizes.
_ROUNDS = 2
# How far the factors of single groups differ from that of all, relative to it, and the most that is believed.
_SPREAD, _MOST = 0.5, 4.0


Losses = Callable[[Group], Float]


class Choice(NamedTuple):
    """The sizes that were chosen, how a target for latency was met, what stays, and the parameters left."""

    allocation: Allocation
    latency: LatencyReport | None
    decision: Decision
    params: int


class Measured:
    """Runs the first images of a loader through cut copies of a model.

    Args:
        model: the model.
        anatomy: its description.
        groups: the groups that may be cut; None for all.
        loader: batches of images, as for `calibrate`.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, groups: Sequence[Group] | None, loader: Iterable[Any]
    ) -> None:
        self._model, self._anatomy, self._family = model, anatomy, family_of(model)
        self._groups = anatomy.groups if groups is None else groups
        self._batches: list[Tensor] = [images for _, images, _ in batches_of(model, loader, MEASURED_IMAGES)]
        if not self._batches:
            raise InvalidArgument("loader: expected at least one image, got none")

    def completed(self, stats: Statistics, method: Method, options: Any) -> Statistics:
        """Return the statistics with the method's losses of the groups, measured where they are missing."""
        cuts = Cuts(method, options, [group.name for group in self._groups])
        done = {name.removeprefix("sensitivity/") for name in stats.tensors}
        with measuring(self._model):
            work = Work(self._model, self._family, self._anatomy, self._batches, stats, done=done)
            added = {f"sensitivity/{name}": sums for part in cuts.take(work) for name, sums in part.items()}
        return Statistics(stats.settings, {**stats.tensors, **added})

    def jointly(
        self,
        found: Choice,
        prepared: Prepared,
        losses: Losses | None,
        choose: Callable[[Losses], Choice],
    ) -> tuple[Choice, float]:
        """Choose again by what each group costs beside all other cuts; return the best choice and its measured loss."""
        with measuring(self._model):
            dense = [Passed.through(self._model, self._family, chunk).output for chunk in first_images(self._batches)]
            best, cut = found, self._run(prepared, found.allocation.sizes, dense)
            for _ in range(_ROUNDS if losses is not None else 0):
                assert losses is not None
                factors = self._factors(prepared, best.allocation.sizes, losses, cut, dense)
                again = choose(_scaled(losses, factors))
                if again.allocation.sizes == best.allocation.sizes:
                    break
                tried = self._run(prepared, again.allocation.sizes, dense)
                if tried[1].mean() >= cut[1].mean():
                    break
                best, cut = again, tried
        return best, float(cut[1].mean())

    def _run(
        self, prepared: Prepared, sizes: Mapping[str, int], dense: Sequence[Tensor]
    ) -> tuple[list[Passed], Tensor]:
        """Run the model cut to these sizes; also return each image's loss."""
        cut = pruned_copy(self._model, self._family, self._anatomy, prepared, sizes)
        passed = [Passed.through(cut, self._family, chunk) for chunk in first_images(self._batches)]
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
        names, alone, beside, doubt = [], [], [], []
        for group in self._groups:
            # A group that is cut is restored; one that is whole is cut.
            other = group.size if sizes[group.name] < group.size else max(measured_sizes(group), default=group.size)
            expected = abs(float(losses(group)[sizes[group.name]] - losses(group)[other]))
            if not expected > 0:
                continue
            changed = pruned_copy(self._model, self._family, self._anatomy, prepared, {**sizes, group.name: other})
            loss = torch.cat(
                [each.loss(changed, self._family, group, out) for each, out in zip(passed, dense, strict=True)]
            )
            gained = base - loss if other == group.size else loss - base
            names.append(group.name)
            alone.append(expected)
            beside.append(float(gained.mean()))
            doubt.append(float(gained.std()) / len(gained) ** 0.5 if len(gained) > 1 else expected)
        return dict(zip(names, _shrunk(*map(np.array, (alone, beside, doubt))).tolist(), strict=True))


def _scaled(losses: Losses, factors: Mapping[str, float]) -> Losses:
    # Groups that lose nothing alone have no factor, and none is needed.
    return lambda group: factors.get(group.name, 1.0) * losses(group)


def _shrunk(alone: Float, beside: Float, doubt: Float) -> Float:
    """Return the losses beside other cuts over the losses alone; doubtful ones are drawn to the factor of all."""
    common = max(float(beside.sum()), 1e-9) / max(float(alone.sum()), 1e-9) if len(alone) else 1.0
    spread = (_SPREAD * common) ** 2
    trust = spread / (spread + (doubt / alone) ** 2)
    found: Float = np.clip(common + trust * (beside / alone - common), common / _MOST, common * _MOST)
    return found
