"""Measures what merging tokens costs, for schedules that differ in where they begin and how much they merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from ..anatomy import Anatomy, Group
from ..statistics.measurements import Work
from ..statistics.measurements.base import divergence, double
from ..statistics.settings import Float
from ..statistics.statistics import MERGED, merged_name
from ..surgery.trial import cut_copy
from .cuts import Passed, first_images

__all__ = ["MergingSchedules", "kept_tokens", "schedules", "token_groups"]

# Where merging begins, as shares of the depth, and which share of the tokens a block merges.
_STARTS = (0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
_RATES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.145)


class MergingSchedules:
    """Runs the model with tokens merged block by block, as schedules say, and compares the outputs.

    What merging costs in one block depends on how many tokens the blocks before it have merged, so whole schedules are
    measured. The loss is that of `Cuts`. Its sums are called "tokens/merged@n-n-…", with the number of tokens that each
    block merges.
    """

    name = MERGED

    def take(self, work: Work) -> Iterator[Mapping[str, Float]]:
        """Measure in one round; a rank measures its share of the schedules."""
        groups = token_groups(work.anatomy)
        named = {merged_name(merged): merged for merged in schedules(work.anatomy)}
        wanted = {name: merged for name, merged in named.items() if name not in work.done}
        if not wanted:
            return
        dense = [Passed.through(work.model, work.family, chunk) for chunk in first_images(work.batches)]
        images = float(sum(len(each.images) for each in dense))
        found: dict[str, Float] = {}
        for name in list(wanted)[work.rank :: work.ranks]:
            kept = kept_tokens(work.anatomy, wanted[name])
            losses = [divergence(work.model, each.output, _output(work, groups, each, kept)).sum() for each in dense]
            found[name] = np.array([float(sum(losses)), images])
        yield found


def token_groups(anatomy: Anatomy) -> list[Group]:
    """Return the groups of tokens, first block to last."""
    return [group for group in anatomy.groups if group.of_tokens]


def kept_tokens(anatomy: Anatomy, merged: Sequence[int]) -> dict[str, int]:
    """Return the sizes of all groups of tokens, given how many tokens each block merges."""
    return {group.name: group.size - count for group, count in zip(token_groups(anatomy), merged, strict=True)}


def schedules(anatomy: Anatomy) -> list[tuple[int, ...]]:
    """Return how many tokens each block merges, for the schedules that are measured; none where tokens cannot merge.

    From some block on, each but the last merges the same number of tokens, as in ToMe (Bolya et al., ICLR 2023), or the
    same share of those that are left.
    """
    groups = token_groups(anatomy)
    found: dict[tuple[int, ...], None] = {}
    for start in _STARTS if groups else ():
        for rate in _RATES:
            for of_all in (True, False):
                sizes = {**anatomy.sizes}
                merged = []
                for number, group in enumerate(groups):
                    here = anatomy.tokens[group.name]
                    left = int(here.left(lambda name, sizes=sizes: sizes[name]))  # type: ignore[misc]
                    base = here.patches if of_all else left
                    inside = round(start * len(groups)) <= number < len(groups) - 1
                    merged.append(min(round(rate * base), left // 2, group.size - 1) if inside else 0)
                    sizes[group.name] = group.size - merged[-1]
                if any(merged):
                    found[tuple(merged)] = None
    return list(found)


def _output(work: Work, groups: Sequence[Group], dense: Passed, kept: Mapping[str, int]) -> Tensor:
    first = next(group.block for group in groups if kept[group.name] < group.size)
    if dense.inputs and first is not None:
        # The blocks before the first that merges are not run again.
        return double(work.family.from_block(work.model, first, dense.inputs[first], kept))
    keep = {name: np.arange(size, dtype=np.int64)[None] for name, size in kept.items()}
    return double(cut_copy(work.model, work.family, work.anatomy, keep, {})(dense.images))
