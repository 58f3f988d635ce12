"""Measures what merging tokens costs, schedule by schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from ..anatomy import Group
from ..statistics.measurements import Work
from ..statistics.measurements.base import divergence
from ..statistics.outputs import double
from ..statistics.settings import Float
from ..statistics.statistics import MERGED, merged_name
from ..surgery.trial import cut_copy
from .cuts import Passed
from .sample import Sampler, summed
from .schedules import kept_tokens, schedules, token_groups

__all__ = ["MergingSchedules"]


class MergingSchedules:
    """Runs the model with tokens merged block by block, as schedules say, and compares the outputs.

    What merging costs in one block depends on how many tokens the blocks before it have merged, so whole schedules are
    measured. The loss is that of `Cuts`. Its sums are called "tokens/merged@n-n-…", with the number of tokens that each
    block merges.

    Args:
        sampler: chooses the images; by default one of its own.
    """

    name = MERGED

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._sampler = sampler or Sampler()

    def take(self, work: Work) -> Iterator[Mapping[str, Float]]:
        """Measure in one round; a rank measures its share of the schedules."""
        groups = token_groups(work.anatomy)
        named = {merged_name(merged): merged for merged in schedules(work.anatomy)}
        wanted = {name: merged for name, merged in named.items() if name not in work.done}
        if not wanted:
            return
        chosen = self._sampler.of(work)
        dense = [Passed.through(work.model, work.family, each.images) for each in chosen]
        found: dict[str, Float] = {}
        for name in list(wanted)[work.rank :: work.ranks]:
            kept = kept_tokens(work.anatomy, wanted[name])
            losses = (divergence(work.model, each.output, _output(work, groups, each, kept)) for each in dense)
            found[name] = summed(chosen, losses)
        yield found


def _output(work: Work, groups: Sequence[Group], dense: Passed, kept: Mapping[str, int]) -> Tensor:
    first = next(group.block for group in groups if kept[group.name] < group.size)
    if dense.inputs and first is not None:
        # The blocks before the first that merges are not run again.
        return double(work.family.from_block(work.model, first, dense.inputs[first], kept))
    keep = {name: np.arange(size, dtype=np.int64)[None] for name, size in kept.items()}
    return double(cut_copy(work.model, work.family, work.anatomy, keep, {})(dense.images))
