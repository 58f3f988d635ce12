"""Converts fractions removed from each kind or group to the number of units that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..anatomy import Anatomy, Group
from ..anatomy.kinds import renamed
from ..errors import InvalidArgument
from .limits import FreeGroups, check_kinds, removed_fraction
from .snp_names import fractions_from_file

_LAYERS = "layer"


def counts_from_ratios(
    anatomy: Anatomy,
    ratios: Mapping[str, float] | str | Path,
    *,
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
    removal: Callable[[Group], float] | None = None,
) -> dict[str, int]:
    """Return the kept units of each group, given the fraction removed from each kind or group.

    ``ratios`` is the fraction removed by kind or group, or a per-block file of such fractions. For the kind "layer"
    that fraction of all attention and FFN layers is removed, those with the least ``removal`` first; one of each stays.

    Raises:
        InvalidArgument: a key or value that does not fit; the text names it.
        Unsupported: a kind that this model cannot lose.
    """
    if isinstance(ratios, Mapping):
        ratios = renamed("ratios", ratios)
        fractions = _fractions(anatomy, ratios)
    else:
        fractions = fractions_from_file(anatomy, ratios)
    free = FreeGroups(anatomy, groups, freeze, min_keep, round_to, default_multiples={})
    if isinstance(ratios, Mapping) and _LAYERS in ratios:
        fractions |= _layers_to_remove(free, fractions, {*ratios}, removal)
    sizes = {
        group.name: free.count(group, fractions.get(group.name, 0.0)) if group in free.groups else group.size
        for group in anatomy.groups
    }
    anatomy.require_layers(sizes, "ratios")
    return sizes


def _layers_to_remove(
    free: FreeGroups, fractions: Mapping[str, float], named: set[str], removal: Callable[[Group], float] | None
) -> dict[str, float]:
    """Return 1 for each layer to remove, among those without a ratio of their own, and 0 for the others."""
    layers = [group for group in free.groups if group.traits.whole and group.name not in named]
    wanted = round(sum(fractions[group.name] for group in layers))
    if wanted and removal is None:
        raise InvalidArgument(
            f"ratios['{_LAYERS}']: expected layers by name, or statistics that say which layers matter "
            "(calibrate(sensitivity=True)), got a fraction"
        )
    if removal is not None:
        free.hold_one_of_each(removal, {name: fractions[name] == 0 for name in named if name in free.anatomy.layers})
    leaving = [group.name for group in layers if free.count(group, 1.0) == 0]
    order = sorted(leaving, key=lambda name: removal(free.anatomy.group(name)) if removal else 0.0)
    return {group.name: float(group.name in order[:wanted]) for group in layers}


def _fractions(anatomy: Anatomy, ratios: Mapping[str, float]) -> dict[str, float]:
    check_kinds(anatomy, "ratios", ratios)
    checked = {name: removed_fraction(anatomy, name, name, value) for name, value in ratios.items()}
    return {group.name: checked.get(group.name, checked.get(group.kind, 0.0)) for group in anatomy.groups}
