"""Removes the same fraction from all groups, the least that meets a budget."""

from __future__ import annotations

from collections.abc import Mapping

from ..anatomy import Group
from .limits import FreeGroups


class Step:
    """Groups that grow together, each by one multiple."""

    def __init__(self, groups: list[Group], free: FreeGroups) -> None:
        self._groups, self._free = groups, free

    def share(self, kept: Mapping[str, int]) -> float:
        """Return the fraction of the first group that is kept."""
        return kept[self._groups[0].name] / self._groups[0].size

    def next(self, kept: Mapping[str, int]) -> dict[str, int] | None:
        """Return the sizes one step larger, or None if all groups are whole."""
        if all(kept[group.name] == group.size for group in self._groups):
            return None
        return {**kept, **{group.name: self._free.step_up(group, kept[group.name]) for group in self._groups}}


def bundles_of(free: FreeGroups, kept: Mapping[str, int]) -> list[list[Group]]:
    """Bundle groups that step together: query/key and value of a layer while their sizes are equal; others alone."""
    layer_of = free.anatomy.layer_of
    followers = {
        (layer_of[group.name], group.traits.steps_with): group
        for group in free.groups
        if group.traits.steps_with is not None and group.name in layer_of
    }
    bundles: list[list[Group]] = []
    paired: set[str] = set()
    for group in free.groups:
        follower = followers.get((layer_of.get(group.name, ""), group.kind))
        if follower is not None and (group.size, kept[group.name], free.multiple(group)) == (
            follower.size,
            kept[follower.name],
            free.multiple(follower),
        ):
            bundles.append([group, follower])
            paired |= {group.name, follower.name}
    return bundles + [[group] for group in free.groups if group.name not in paired]
