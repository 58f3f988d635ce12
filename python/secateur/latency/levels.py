"""Chooses the sizes of a layer that a latency table measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import check
from ..anatomy import Anatomy, Group, Layer
from ..anatomy.costs import Tokens
from ..anatomy.kinds import current
from ..errors import InvalidArgument
from .table import ALIGNED, TOKENS

# Fractions of the dense size, rounded as in plans. All combinations are measured, so there are fewer levels if more
# sizes of a layer can change. Time is linear in the number of heads, except for the part that does not depend on them.
_FRACTIONS = {2: (0.125, 0.25, 0.5, 0.75, 1.0), 3: (0.25, 0.5, 0.75, 1.0), 4: (0.25, 0.5, 1.0)}
_UNEVEN = {2: (0.25, 0.625, 1.0), 3: (0.375, 1.0), 4: (0.375, 1.0)}
# Randomly cut models that the sum of layers is compared with: each group keeps a fraction between these.
_SHARES = ((0.1, 0.6), (0.4, 1.0), (0.2, 0.8), (0.2, 0.5))
# Shares of the patches.
_TOKENS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Levels:
    """The sizes to measure.

    ``named`` are the kinds that change, ``given`` are the sizes asked for by kind.
    """

    anatomy: Anatomy
    named: frozenset[str]
    given: Mapping[str, Sequence[int]]

    def of(
        self, axes: Mapping[str, str], whole: Mapping[str, int], tokens: Tokens | None = None, *, few: bool = False
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """Return the levels of a layer's axes, the present size last, and those of uneven sizes.

        Args:
            axes: maps an axis to the name of a group; a model whose width cannot be cut has no group for it.
            whole: maps an axis to its size if there is no group.
            tokens: the tokens, if there can be fewer.
            few: take few levels, for a layer that is in the model once and takes little of its time.
        """
        groups = {axis: self.anatomy.group(name) if name in self.anatomy.sizes else None for axis, name in axes.items()}
        free = {axis: group for axis, group in groups.items() if group is not None and group.kind in self.named}
        number = 4 if few else min(max(len(free) + (tokens is not None), 2), 4)
        even: dict[str, tuple[int, ...]] = {
            axis: (whole[axis] if group is None else group.size,) for axis, group in groups.items()
        }
        uneven = dict(even)
        for axis, group in free.items():
            even[axis] = self._even(group, _FRACTIONS[number])
            # Heads are not channels, and multiples of four are never uneven.
            never = group.traits.counted or group.multiple % ALIGNED == 0
            uneven[axis] = even[axis] if never else _uneven(group, _UNEVEN[number])
        if tokens is not None:
            even[TOKENS] = uneven[TOKENS] = self.tokens(tokens)
        own = any(group.kind in self.given for group in free.values())
        return even, {} if own or few or uneven == even else uneven

    @property
    def merging(self) -> bool:
        """Whether tokens may be merged."""
        return "tokens" in self.named and bool(self.anatomy.tokens)

    def tokens(self, tokens: Tokens) -> tuple[int, ...]:
        """Return the numbers of tokens to measure, all of them last."""
        return tuple(sorted({tokens.prefix + max(2, round(part * tokens.patches)) for part in _TOKENS}))

    def together(self, layer: Layer) -> list[tuple[str, ...]]:
        """Return the kinds of neurons of a layer, those together that step together from one size.

        Unequal queries and values may take another kernel, so that their times say nothing about steps.
        """
        found: dict[tuple[str, int], list[str]] = {}
        for kind, name in layer.groups.items():
            group = self.anatomy.group(name)
            if not (group.traits.counted or group.traits.shared):
                found.setdefault((group.traits.steps_with or kind, group.size), []).append(kind)
        return [tuple(kinds) for kinds in found.values()]

    def steps(self, group: Group) -> list[int]:
        """Return the sizes that a plan may choose for a group, between the least and the greatest that are measured."""
        if group.kind not in self.named or group.traits.whole or group.of_tokens:
            return [group.size]
        multiple = math.lcm(group.multiple, group.traits.multiple)
        least = min(self._even(group, _FRACTIONS[4]))
        return sorted({*(each for each in range(multiple, group.size, multiple) if each >= least), group.size})

    def _even(self, group: Group, fractions: Sequence[float]) -> tuple[int, ...]:
        multiple = math.lcm(group.multiple, group.traits.multiple)
        spread = [max(1, round(part * group.size / multiple)) * multiple for part in fractions]
        return _up_to(self.given.get(group.kind, spread), group.size)


def _uneven(group: Group, fractions: Sequence[float]) -> tuple[int, ...]:
    """Return sizes just below multiples of 4."""
    below = {round(part * group.size / ALIGNED) * ALIGNED - group.multiple for part in fractions[:-1]}
    last = group.size - group.multiple if group.size % ALIGNED == 0 else group.size
    return tuple(sorted({each for each in below if 1 <= each < last} | {last}))


def levels_for(anatomy: Anatomy, groups: Iterable[str] | None, grid: Mapping[str, Sequence[int]] | None) -> Levels:
    """Return the sizes to measure for the kinds that plans will cut.

    Raises:
        InvalidArgument: a kind that the model does not have, or an invalid size.
    """
    kinds = list(dict.fromkeys(group.kind for group in anatomy.groups))
    if isinstance(groups, str) or not isinstance(groups, (Iterable, type(None))):
        raise InvalidArgument(f"groups: expected a sequence of kinds, got {groups!r}")
    usual = dict.fromkeys(group.kind for group in anatomy.groups if group.traits.in_table)
    named = list(usual) if groups is None else [current(name) for name in groups]
    grid = {} if grid is None else grid
    if not isinstance(grid, Mapping):
        raise InvalidArgument(f"grid: expected a dict of sizes by kind, got {grid!r}")
    for argument, names, known in (("groups", named, kinds), ("grid", grid, list(usual))):
        for name in names:
            if name not in known:
                raise InvalidArgument(f"{argument}: expected kinds of {', '.join(known)}, got {name!r}")
    given = {
        kind: sorted({check.integer(f"grid[{kind!r}]", size) for size in _sizes(kind, sizes)})
        for kind, sizes in grid.items()
    }
    return Levels(anatomy, frozenset(named), given)


def _sizes(kind: str, sizes: object) -> Sequence[object]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise InvalidArgument(f"grid[{kind!r}]: expected a sequence of sizes, got {sizes!r}")
    return sizes


def _up_to(sizes: Iterable[int], size: int) -> tuple[int, ...]:
    return tuple(sorted({each for each in sizes if each < size} | {size}))


def merged_in(anatomy: Anatomy) -> list[str]:
    """Return the groups of tokens that a block would merge: a pooled last block does not."""
    names = list(anatomy.tokens)
    return names[:-1] if anatomy.default_last_block == "pooled" else names


def random_cuts(anatomy: Anatomy, levels: Levels) -> list[dict[str, int]]:
    """Draw sizes as in plans, separately for each block, with equal query/key and value sizes within a layer."""
    random = np.random.default_rng(0)
    merged = merged_in(anatomy) if levels.merging else []
    cuts: list[dict[str, int]] = []
    for number, (low, high) in enumerate(_SHARES):
        sizes: dict[str, int] = {}
        for group in anatomy.groups:
            options = levels.steps(group)
            if group.name in merged and number % 2:
                # As in plans, about the same number in each block.
                sizes[group.name] = max(1, group.size - round(random.uniform(0.03, 0.09) * 2 * group.size))
                continue
            end = max(1, math.ceil(high * len(options)))
            options = options[min(end - 1, int(low * len(options))) : end]
            layer = anatomy.layers.get(anatomy.layer_of.get(group.name, ""))
            followed = None if layer is None or group.traits.steps_with is None else group.traits.steps_with
            queries = 0 if followed is None or layer is None else sizes.get(layer.groups[followed], 0)
            # Width affects all costs, so it is cut in every other model only.
            if options != [group.size] and (not group.traits.shared or number % 2):
                sizes[group.name] = queries if queries in options else int(random.choice(options))
        if sizes:
            cuts.append(sizes)
    return cuts
