"""Decides which groups may be cut, and to which counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final, Literal

from .. import check
from ..anatomy import KINDS, Anatomy, Group
from ..anatomy.kinds import current, renamed
from ..errors import InvalidArgument, Unsupported

# For ``round_to``: the steps of a latency table, which take its place before anything is rounded.
AUTO: Final = "auto"
# Hardware-friendly sizes, used by plans for a target.
TARGET_MULTIPLES = {kind: traits.multiple for kind, traits in KINDS.items()}


def default_groups(anatomy: Anatomy) -> list[str]:
    """Return the kinds of this model that a target cuts unless told otherwise."""
    return list(dict.fromkeys(group.kind for group in anatomy.groups if group.traits.in_target))


def kept_count(size: int, fraction: float, multiple: int = 1) -> int:
    """Return the number of units that stay when ``fraction`` of ``size`` is removed.

    size − round_half_even(fraction · size), then the nearest multiple (the larger of two equally near), at least one
    multiple and at most ``size``; a ``size`` that is not a multiple can stay whole.
    """
    kept = size - round(fraction * size)
    if multiple == 1:
        return max(1, kept)
    largest = size // multiple * multiple
    if kept >= size or largest == 0:
        return size
    nearest = max(multiple, math.floor(kept / multiple + 0.5) * multiple)
    return size if nearest > largest else nearest


def limits_of(
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int] | None,
    round_to: int | Literal["auto"] | Mapping[str, int] | None,
) -> dict[str, Any]:
    """Collect these arguments of ``plan`` for the functions here, with names as lists that can be read repeatedly.

    Raises:
        InvalidArgument: groups or freeze are not sequences of names.
    """
    return {
        "groups": None if groups is None else _sequence("groups", groups),
        "freeze": _sequence("freeze", freeze),
        "min_keep": {} if min_keep is None else min_keep,
        "round_to": round_to,
    }


def check_rounding(round_to: object, latency_table: object, *, measured: bool = False) -> None:
    """Refuse words other than "auto", and "auto" without a table to take steps from, unless one will be ``measured``.

    Raises:
        InvalidArgument: another word, or no table.
    """
    if isinstance(round_to, str) and round_to != AUTO:
        raise InvalidArgument(f'round_to: expected an integer, a dict or "auto", got {round_to!r}')
    if round_to == AUTO and latency_table is None and not measured:
        raise InvalidArgument('round_to: expected latency_table= with "auto", from measure_latency, got none')


def recorded(round_to: int | Mapping[str, int] | None) -> int | dict[str, int] | None:
    """Return multiples as JSON can hold them."""
    if isinstance(round_to, Mapping):
        return {current(name): int(multiple) for name, multiple in round_to.items()}
    return None if round_to is None else int(round_to)


class FreeGroups:
    """The groups that may be cut, and the counts that each may have."""

    def __init__(
        self,
        anatomy: Anatomy,
        groups: Iterable[str] | None,
        freeze: Iterable[str],
        min_keep: Mapping[str, int],
        round_to: int | Mapping[str, int] | None,
        default_multiples: Mapping[str, int],
    ) -> None:
        self.anatomy = anatomy
        named = None if groups is None else {current(name) for name in _sequence("groups", groups)}
        if named is not None:
            check_kinds(anatomy, "groups", named)
            if not named:
                raise InvalidArgument("groups: expected at least one kind or group, got none")
        frozen = _matching(anatomy, "freeze", map(current, _sequence("freeze", freeze)))
        self.groups = [
            group
            for group in anatomy.groups
            if group.name not in frozen and (named is None or group.kind in named or group.name in named)
        ]
        self._minimum = _per_group(anatomy, "min_keep", min_keep)
        self._multiple = dict.fromkeys(anatomy.sizes, 1)
        for group in anatomy.groups:
            self._multiple[group.name] = default_multiples.get(group.kind, 1)
        if isinstance(round_to, Mapping):
            self._multiple.update(_per_group(anatomy, "round_to", round_to))
        elif round_to is not None:
            # Applies to channels only: heads and layers are counted one by one unless they are named.
            multiple = check.integer("round_to", round_to)
            self._multiple |= {g.name: multiple for g in anatomy.groups if not g.traits.counted}
        for group in anatomy.groups:
            self._multiple[group.name] = math.lcm(self._multiple[group.name], group.multiple)

    def multiple(self, group: Group) -> int:
        """Return the number that the kept counts of a group are multiples of."""
        return self._multiple[group.name]

    def count(self, group: Group, fraction: float) -> int:
        """Return the number of units that stay when ``fraction`` of the group is removed."""
        multiple = self.multiple(group)
        least = max(self._minimum.get(group.name, 0), group.least)
        least = min(group.size, math.ceil(least / multiple) * multiple)
        return max(least, 0 if fraction >= 1 else kept_count(group.size, fraction, multiple))

    def hold_one_of_each(
        self, removal: Callable[[Group], float], stays: Mapping[str, bool] = MappingProxyType({})
    ) -> None:
        """Keep one attention and one FFN layer where all could be removed: that with the largest ``removal``.

        ``stays`` holds the layers that the user has already decided on.
        """
        free = {group.name for group in self.groups}
        for layers in (self.anatomy.attention, self.anatomy.ffn):
            found = [self.anatomy.group(layer.name) for layer in layers]
            if any(g.name not in free or self._minimum.get(g.name) or stays.get(g.name) for g in found):
                continue
            undecided = [group for group in found if group.name not in stays]
            if undecided:
                self._minimum[max(undecided, key=removal).name] = 1

    def options(self, group: Group) -> list[int]:
        """Return all sizes that the group may have, in ascending order."""
        least = self.count(group, 1.0)
        return sorted({least, *range(least, group.size, self.multiple(group)), group.size})

    def step_up(self, group: Group, kept: int) -> int:
        """Return the next larger count that the group may have."""
        wider = (kept // self.multiple(group) + 1) * self.multiple(group)
        return group.size if wider > group.size // self.multiple(group) * self.multiple(group) else wider


def _sequence(argument: str, names: Any) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InvalidArgument(f"{argument}: expected a sequence of names, got {names!r}")
    return list(names)


def check_kinds(anatomy: Anatomy, argument: str, names: Iterable[str]) -> None:
    """Refuse names that are not a kind or a group of this model, or that it cannot lose."""
    kinds = list(dict.fromkeys(group.kind for group in anatomy.groups))
    for name in names:
        if name in anatomy.refused:
            raise Unsupported(
                f"{argument}: expected kinds that this model can lose, got {name!r} ({anatomy.refused[name]})"
            )
        if name not in kinds and name not in anatomy.sizes:
            raise InvalidArgument(f"{argument}: expected {', '.join(kinds)} or a group's name, got {name!r}")


def _matching(anatomy: Anatomy, argument: str, patterns: Iterable[str]) -> set[str]:
    """Return the names of the groups that match a kind, a name or a shell pattern such as 'blocks.0.*'."""
    found: set[str] = set()
    for pattern in patterns:
        names = {g.name for g in anatomy.groups if g.kind == pattern or fnmatchcase(g.name, pattern)}
        if not names:
            raise InvalidArgument(f"{argument}: expected a kind, group name or pattern of this model, got {pattern!r}")
        found |= names
    return found


def _per_group(anatomy: Anatomy, argument: str, values: Mapping[str, int]) -> dict[str, int]:
    """Expand positive integers by kind or group name to every group; a group's own name takes precedence."""
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{argument}: expected a dict by kind or group, got {values!r}")
    values = renamed(argument, values)
    check_kinds(anatomy, argument, values)
    return {
        group.name: check.integer(f"{argument}[{key!r}]", values[key])
        for group in anatomy.groups
        for key in (group.name, group.kind)
        if key in values and (key == group.name or group.name not in values)
    }


def removed_fraction(anatomy: Anatomy, key: str, name: str, value: object) -> float:
    """Check and return the fraction removed from a kind or group, which the user calls ``key``."""
    layer = name in anatomy.layers
    fraction = check.fraction(f"ratios[{key!r}]", value, open_high=not layer)
    if layer and fraction not in (0, 1):
        raise InvalidArgument(f"ratios[{key!r}]: expected 0 or 1 for a layer, got {value!r}")
    return fraction
