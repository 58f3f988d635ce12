"""Chooses how many units of each group stay under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..anatomy import Anatomy, Group
from ..anatomy.costs import Cost
from ..errors import InvalidArgument
from ..statistics.settings import Float
from .budget import Allocation, Budget
from .least_loss import of_least_loss
from .limits import TARGET_MULTIPLES, FreeGroups, default_groups
from .target import Target
from .uniform import Step, bundles_of


def allocate(
    anatomy: Anatomy,
    target: Target,
    *,
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
    losses: Callable[[Group], Float] | None = None,
    merging: Sequence[tuple[Mapping[str, int], float]] = (),
    latency: Cost | None = None,
) -> Allocation:
    """Choose the kept units of each group under a budget; ``latency`` predicts what ``target.latency`` limits.

    ``losses`` returns what a group loses when 0 … size units stay, (size + 1,), in one unit for all groups. With it,
    the counts are those of the least total loss: for every width, each group takes the least loss + λ · cost, at the λ
    that meets the budget; then the width with the least total is chosen. Heads, their query/key and value sizes, and
    whether the layer stays at all are one choice, since their costs multiply. The Lagrangian dual at the same λ is a
    lower bound on the loss of any choice. Tokens are merged as one of the schedules in ``merging`` says, sizes of their
    groups with their total loss, or not at all. Without ``losses``, the same fraction is removed from all named groups,
    the least that meets the budget.

    Budget left over from rounding is then spent while anything fits. With ``losses``, it goes to the larger size that
    lowers the loss most for its cost, and sizes of two groups are exchanged as long as that lowers the loss; else it
    goes one rounding step at a time to the group that lost the largest share. Query/key and value of one layer step
    together, so that they keep the same size.

    Raises:
        InvalidArgument: the budget cannot be met; the text says what can be.
        Unsupported: a kind that this model cannot lose.
    """
    free = FreeGroups(
        anatomy, default_groups(anatomy) if groups is None else groups, freeze, min_keep, round_to, TARGET_MULTIPLES
    )
    if any(group.traits.whole for group in free.groups):
        if losses is None:
            raise InvalidArgument("groups: expected no 'layer' in a uniform allocation, which cannot tell layers apart")
        free.hold_one_of_each(lambda group: float(losses(group)[0]))
    assert (target.latency is None) == (latency is None), "what a target limits comes with a prediction"
    budget = Budget(anatomy, target, latency)

    allowed = None if losses is None else _allowed(merging, free)
    _require_reach(free, target, budget, None if allowed is None else [sizes for sizes, _ in allowed])
    if losses is not None and allowed is not None:
        return of_least_loss(anatomy, free, budget, losses, allowed)

    def counts(fraction: float) -> dict[str, int]:
        return {group.name: free.count(group, fraction) for group in free.groups}

    # Sizes change at a few fractions only: bisect to the last fraction whose sizes exceed the budget.
    low, high = 0.0, 1.0
    if budget.holds(counts(0.0)):
        high = 0.0
    for _ in range(50 if high else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if budget.holds(counts(middle)) else (middle, high)
    kept = {**anatomy.sizes, **counts(high)}

    steps = [Step(bundle, free) for bundle in bundles_of(free, kept)]
    while steps:
        step = min(steps, key=lambda candidate: candidate.share(kept))
        wider = step.next(kept)
        if wider is not None and budget.holds(wider):
            kept = wider
        else:
            # A step that does not fit now never will, since every other step adds to the cost.
            steps.remove(step)
    return Allocation(kept)


def _allowed(
    merging: Sequence[tuple[Mapping[str, int], float]], free: FreeGroups
) -> list[tuple[Mapping[str, int], float]]:
    """Return the schedules with the sizes that are allowed, the next larger ones; that only lowers the loss."""
    options = {group.name: free.options(group) for group in free.groups}
    found: list[tuple[Mapping[str, int], float]] = []
    for sizes, loss in merging:
        allowed = {
            name: min(option for option in options.get(name, [free.anatomy.sizes[name]]) if option >= size)
            for name, size in sizes.items()
        }
        found.append((allowed, loss))
    return found


def _require_reach(
    free: FreeGroups, target: Target, budget: Budget, merging: Sequence[Mapping[str, int]] | None
) -> None:
    """Refuse a target that the smallest sizes do not meet; ``merging`` holds the schedules, None for any numbers."""
    possible = [{group.name: free.count(group, 1.0) for group in free.groups}]
    if merging is not None:
        # Merging takes time itself, so none may be the fastest.
        tokens = {group.name: group.size for group in free.groups if group.of_tokens}
        possible = [{**possible[0], **tokens, **sizes} for sizes in ({}, *merging)]
    if not any(map(budget.holds, possible)):
        smallest = max(possible, key=lambda sizes: float(budget.room(sizes).min()))
        raise InvalidArgument(f"target: expected {budget.reach(smallest)} (the least these groups reach), got {target}")


def free_groups(anatomy: Anatomy, limits: Mapping[str, Any]) -> list[Group]:
    """Return the groups that a target may cut; errors are those of ``allocate``."""
    groups = default_groups(anatomy) if limits["groups"] is None else limits["groups"]
    return FreeGroups(anatomy, **{**limits, "groups": groups}, default_multiples=TARGET_MULTIPLES).groups


def check_target(
    anatomy: Anatomy,
    target: Target,
    *,
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
    merging: Sequence[Mapping[str, int]] = (),
    latency: Cost | None = None,
) -> list[Group]:
    """Return the groups that may be cut; refuse what can be refused without losses.

    With ``latency``, what it predicts must be within reach too, and tokens are merged as one of the schedules in
    ``merging`` says, or not at all.

    Raises:
        InvalidArgument: a name that does not fit, or a target that cannot be met; the text says what can be.
        Unsupported: a kind that this model cannot lose.
    """
    free = FreeGroups(
        anatomy, default_groups(anatomy) if groups is None else groups, freeze, min_keep, round_to, TARGET_MULTIPLES
    )
    # It is not known yet which layer of each kind must stay; their costs are alike, so any will do.
    free.hold_one_of_each(lambda _group: 0.0)
    allowed = None if latency is None else [sizes for sizes, _ in _allowed([(each, 0.0) for each in merging], free)]
    _require_reach(free, target, Budget(anatomy, target, latency), allowed)
    return free.groups
