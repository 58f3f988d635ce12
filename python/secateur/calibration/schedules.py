"""Lists schedules of merged tokens, which differ in where merging begins and in how much it merges."""

from __future__ import annotations

from collections.abc import Sequence

from ..anatomy import Anatomy, Group

__all__ = ["kept_tokens", "merged_by", "schedules", "token_groups"]

# Where merging begins, as shares of the depth, and which share of the tokens a block merges.
_STARTS = (0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
_RATES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.145)


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
    found: dict[tuple[int, ...], None] = {}
    for start in _STARTS:
        for rate in _RATES:
            for of_all in (True, False):
                merged = merged_by(anatomy, start, rate, of_all=of_all)
                if any(merged):
                    found[merged] = None
    return list(found)


def merged_by(anatomy: Anatomy, start: float, rate: float, *, of_all: bool) -> tuple[int, ...]:
    """Return how many tokens each block merges, if all but the last merge a share of ``rate`` from ``start`` on.

    Args:
        anatomy: the model.
        start: the first block that merges, as a share of the depth.
        rate: the share of tokens that a block merges.
        of_all: of all the model's patch tokens; else of those that are left.
    """
    groups = token_groups(anatomy)
    sizes = {**anatomy.sizes}
    merged = []
    for number, group in enumerate(groups):
        here = anatomy.tokens[group.name]
        left = int(here.left(lambda name: sizes[name]))
        base = here.patches if of_all else left
        inside = round(start * len(groups)) <= number < len(groups) - 1
        merged.append(min(round(rate * base), left // 2, group.size - 1) if inside else 0)
        sizes[group.name] = group.size - merged[-1]
    return tuple(merged)
