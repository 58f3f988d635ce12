"""The loss of each group at every size, by which a target is divided among the groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

from torch import nn

from ..anatomy import Anatomy, Group
from ..budgets.limits import default_groups
from ..budgets.measured import losses_between
from ..budgets.target import Target
from ..calibration.schedules import kept_tokens, token_groups
from ..errors import InvalidArgument
from ..families.base import classifies
from ..latency.table import LatencyTable
from ..methods.base import Prepared
from ..statistics.settings import Float
from ..statistics.statistics import Statistics

__all__ = ["Losses", "Merging", "losses_of", "merging_of", "removal_of", "with_tokens"]

Losses: TypeAlias = Callable[[Group], Float]
Merging: TypeAlias = Sequence[tuple[Mapping[str, int], float]]


def losses_of(
    anatomy: Anatomy,
    stats: Statistics,
    prepared: Prepared,
    cut: str,
    groups: Sequence[Group],
    allocation: str | None,
) -> Callable[[Group], Float] | None:
    """Return a function for the loss of a group at each size; None to remove the same fraction from all groups.

    Args:
        anatomy: description of the model.
        stats: its statistics.
        prepared: the method.
        cut: the name of the method's measured losses.
        groups: the groups that may be cut.
        allocation: as for `plan`.

    Raises:
        InvalidArgument: the statistics lack what the allocation needs.
    """
    if allocation == "uniform":
        return None
    groups = [group for group in groups if not group.of_tokens]
    missing = next((group for group in groups if not stats.losses(group.name, cut)), None)
    if allocation == "measured" and missing is not None:
        raise InvalidArgument(
            f"stats: expected losses of {missing.name!r} (calibrate(sensitivity=True), for this method; or loader=), "
            "got statistics without"
        )
    if missing is None:
        return cache(lambda group: _measured(anatomy, stats, prepared, cut, group))
    if allocation is None and not stats.sensitive:
        return None
    if not stats.sensitive:
        raise InvalidArgument("stats: expected sensitivities (calibrate(sensitivity='noise')), got statistics without")
    for group in groups:
        if prepared.errors(group) is None:
            if allocation is None and not any(other.traits.whole for other in groups):
                return None
            raise InvalidArgument(f"allocation: expected a method that knows the error of {group.name!r}, got none")
    return lambda group: _sensitive(stats, prepared, group)


def merging_of(anatomy: Anatomy, stats: Statistics, groups: Sequence[Group]) -> Merging:
    """Return the schedules worth considering of those that were measured: sizes of groups, and the loss.

    Each costs fewer MACs than any other that loses no more; there are none if no tokens may merge.
    """
    if not any(group.of_tokens for group in groups):
        return []
    measured = [(kept_tokens(anatomy, merged), loss) for merged, loss in stats.merged]
    found: list[tuple[Mapping[str, int], float]] = []
    least = float(anatomy.macs_at({}))
    for kept, loss in sorted(measured, key=lambda each: each[1]):
        macs = float(anatomy.macs_at(kept))
        if macs < least:
            found.append((kept, loss))
            least = macs
    return found


def with_tokens(
    model: nn.Module, anatomy: Anatomy, target: Target, limits: dict[str, Any], table: LatencyTable | None
) -> dict[str, Any]:
    """Return limits that also allow tokens to be merged, where no groups are named and it serves the target.

    Args:
        model: the model; without a classifier, all its tokens may be wanted.
        anatomy: its description.
        target: the budget; fewer tokens save no parameters.
        limits: limits on the groups, as from `limits_of`.
        table: the latency table that is given, which may not know tokens.
    """
    saves = target.macs is not None or target.latency is not None
    known = target.latency is None or table is None or table.knows_tokens
    if limits["groups"] is not None or not saves or not known or not classifies(model):
        return limits
    return {**limits, "groups": [*default_groups(anatomy), *{group.kind for group in token_groups(anatomy)}]}


def removal_of(stats: Statistics, prepared: Prepared, cut: str) -> Callable[[Group], float] | None:
    """Return a function for the loss of removing a whole layer; None where the statistics do not tell."""

    def removal(group: Group) -> float:
        measured = stats.losses(group.name, cut)
        return measured[0] if measured else float(_sensitive(stats, prepared, group)[0])

    return removal if stats.sensitive or cut in stats.cuts else None


def _measured(anatomy: Anatomy, stats: Statistics, prepared: Prepared, cut: str, group: Group) -> Float:
    # How a layer's loss falls with its size is known: it has one.
    errors = None if group.name in anatomy.layers else prepared.errors(group)
    return losses_between(stats.losses(group.name, cut), group.size, errors)


def _sensitive(stats: Statistics, prepared: Prepared, group: Group) -> Float:
    errors = prepared.errors(group)
    assert errors is not None
    return stats.sensitivity(group.name) * errors
