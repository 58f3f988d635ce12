"""How many units of each group stay: from fractions, from a file, or from a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import check, container
from .anatomy import Anatomy, Group
from .cost import Cost, Size, Sizes
from .errors import InvalidArgument, Unsupported
from .statistics import Float

DEFAULT_GROUPS = ("qk", "v", "ffn")
# Each lowers the loss; that they end is certain, but not when.
_EXCHANGES = 100
_TARGET_MULTIPLES = {"qk": 8, "v": 8, "ffn": 32, "width": 32}


@dataclass(frozen=True)
class Target:
    """A budget: fractions, in (0, 1], of the MACs, parameters and latency of the model that is planned for.

    Several hold together. Latency is the time of one batch; ``plan`` says of what size and on which machine.

    Raises:
        InvalidArgument: no fraction given, or one outside (0, 1].
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise InvalidArgument("target: expected macs=, params= or latency=, got none")
        for name, value in given.items():
            # A plain number, which files can hold, whatever it came as.
            object.__setattr__(self, name, check.fraction(f"target.{name}", value, open_low=True))

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value:g}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class Allocation:
    """Sizes by group, and where losses are known what they come to: ``bound`` is what no choice can go below."""

    sizes: dict[str, int]
    loss: float = math.nan
    bound: float = math.nan


def kept_count(size: int, fraction: float, multiple: int = 1) -> int:
    """Units that stay when ``fraction`` of ``size`` is removed.

    size − round_half_even(fraction · size), then the nearest multiple (the larger of two equally near), at least one
    multiple and at most ``size``; a ``size`` that is no multiple, or is below one, can stay whole.
    """
    kept = size - round(fraction * size)
    if multiple == 1:
        return max(1, kept)
    largest = size // multiple * multiple
    if kept >= size or largest == 0:
        return size
    nearest = max(multiple, math.floor(kept / multiple + 0.5) * multiple)
    return size if nearest > largest else nearest


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
    """Kept units by group, from the fraction removed of each kind or group, or from a per-block file.

    Of the kind "block" that fraction of all attention and FFN layers leaves, those of the least ``removal`` first; one
    of each stays.

    Raises:
        InvalidArgument: a key or value that does not fit; the text names it.
        Unsupported: a kind that this model cannot lose.
    """
    if isinstance(ratios, Mapping):
        fractions = _fractions(anatomy, ratios)
    else:
        fractions = _fractions_from_file(anatomy, ratios)
    free = _Choice(anatomy, groups, freeze, min_keep, round_to, default_multiples={})
    if isinstance(ratios, Mapping) and "block" in ratios:
        fractions |= _layers_to_leave(free, fractions, {*ratios}, removal)
    sizes = {
        group.name: free.count(group, fractions.get(group.name, 0.0)) if group in free.groups else group.size
        for group in anatomy.groups
    }
    anatomy.require_layers(sizes, "ratios")
    return sizes


def _layers_to_leave(
    free: _Choice, fractions: Mapping[str, float], named: set[str], removal: Callable[[Group], float] | None
) -> dict[str, float]:
    """1 for the layers that leave of those that no ratio of their own names, 0 for the others."""
    layers = [group for group in free.groups if group.kind == "block" and group.name not in named]
    wanted = round(sum(fractions[group.name] for group in layers))
    if wanted and removal is None:
        raise InvalidArgument(
            "ratios['block']: expected layers by their names, or statistics that say which of them matter "
            "(calibrate(sensitivity=True)), got a fraction"
        )
    if removal is not None:
        free.hold_one_of_each(removal, {name: fractions[name] == 0 for name in named if name in free.anatomy.layers})
    leaving = [group.name for group in layers if free.count(group, 1.0) == 0]
    order = sorted(leaving, key=lambda name: removal(free.anatomy.group(name)) if removal else 0.0)
    return {group.name: float(group.name in order[:wanted]) for group in layers}


def allocate(
    anatomy: Anatomy,
    target: Target,
    *,
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
    losses: Callable[[Group], Float] | None = None,
    latency: Cost | None = None,
) -> Allocation:
    """Kept units by group under a budget; ``latency`` predicts what ``target.latency`` limits.

    With ``losses``, what a group loses when 0 … size units stay, (size + 1,), in a unit common to all, the counts are
    those of the least total loss: for every width, the least of loss + λ · cost in each group, at the λ that meets the
    budget; then the width of the least total. Heads, their query/key and value size and whether the layer stays at all
    are one choice, since their costs multiply. Lagrange's dual at the same λ is what no choice can go below. Without
    ``losses``, one removed fraction for all named groups, the least that meets the budget.

    What rounding leaves of the budget is then spent while anything fits: by ``losses`` on the wider size that saves
    most for its cost, and by exchanging sizes of two groups as long as that lowers the loss; else one rounding step at
    a time on the group that lost the largest share. Query/key and value of one layer step together, so that they keep
    one size.

    Raises:
        InvalidArgument: the budget cannot be met; the text says what can.
        Unsupported: a kind that this model cannot lose.
    """
    free = _Choice(anatomy, DEFAULT_GROUPS if groups is None else groups, freeze, min_keep, round_to, _TARGET_MULTIPLES)
    if any(group.kind == "block" for group in free.groups):
        if losses is None:
            raise InvalidArgument("groups: expected no 'block' in a uniform allocation, which cannot tell layers apart")
        free.hold_one_of_each(lambda group: float(losses(group)[0]))
    assert (target.latency is None) == (latency is None), "what a target limits comes with a prediction"
    budget = _Budget(anatomy, target, latency)

    def counts(fraction: float) -> dict[str, int]:
        return {group.name: free.count(group, fraction) for group in free.groups}

    smallest = counts(1.0)
    if not budget.holds(smallest):
        raise InvalidArgument(f"target: expected {budget.reach(smallest)} (the least these groups reach), got {target}")
    if losses is not None:
        return _of_least_loss(anatomy, free, budget, losses)
    # Sizes only change at a few fractions: bisect to the last of them that is too large for the budget.
    low, high = 0.0, 1.0
    if budget.holds(counts(0.0)):
        high = 0.0
    for _ in range(50 if high else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if budget.holds(counts(middle)) else (middle, high)
    kept = {**anatomy.sizes, **counts(high)}

    steps = [_Step(bundle, free) for bundle in _bundles(free, kept)]
    while steps:
        step = min(steps, key=lambda candidate: candidate.share(kept))
        wider = step.next(kept)
        if wider is not None and budget.holds(wider):
            kept = wider
        else:
            # A step that does not fit now never will: every other step only adds to the cost.
            steps.remove(step)
    return Allocation(kept)


def limits_of(
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int] | None,
    round_to: int | Mapping[str, int] | None,
) -> dict[str, Any]:
    """Arguments of ``plan`` as all functions here take them: names as lists, which can be read more than once.

    Raises:
        InvalidArgument: groups or freeze are no names.
    """
    return {
        "groups": None if groups is None else _sequence("groups", groups),
        "freeze": _sequence("freeze", freeze),
        "min_keep": {} if min_keep is None else min_keep,
        "round_to": round_to,
    }


def free_groups(anatomy: Anatomy, limits: Mapping[str, Any]) -> list[Group]:
    """The groups that a target may cut; errors are those of ``allocate``."""
    groups = DEFAULT_GROUPS if limits["groups"] is None else limits["groups"]
    return _Choice(anatomy, **{**limits, "groups": groups}, default_multiples=_TARGET_MULTIPLES).groups


def check_target(
    anatomy: Anatomy,
    target: Target,
    *,
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
) -> list[Group]:
    """Return the groups that may be cut; refuse what needs no measurement to be refused.

    Raises:
        InvalidArgument: a name that does not fit, or MACs or parameters that cannot be met; the text says what can.
        Unsupported: a kind that this model cannot lose.
    """
    free = _Choice(anatomy, DEFAULT_GROUPS if groups is None else groups, freeze, min_keep, round_to, _TARGET_MULTIPLES)
    # Which layer of each kind is the last to go is not known yet, and their costs are alike.
    free.hold_one_of_each(lambda _group: 0.0)
    counted = _Budget(anatomy, target, None)
    smallest = {group.name: free.count(group, 1.0) for group in free.groups}
    if not counted.holds(smallest):
        raise InvalidArgument(
            f"target: expected {counted.reach(smallest)} (the least these groups reach), got {target}"
        )
    return free.groups


class _Choice:
    """Which groups may be cut, and to which counts."""

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
        named = None if groups is None else set(_sequence("groups", groups))
        if named is not None:
            _check_kinds(anatomy, "groups", named)
            if not named:
                raise InvalidArgument("groups: expected at least one kind or group, got none")
        frozen = _matching(anatomy, "freeze", _sequence("freeze", freeze))
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
            # Of channels: heads and layers are counted one by one unless they are named.
            multiple = check.integer("round_to", round_to)
            self._multiple |= {g.name: multiple for g in anatomy.groups if g.kind not in ("heads", "block")}
        for group in anatomy.groups:
            self._multiple[group.name] = math.lcm(self._multiple[group.name], group.multiple)

    def multiple(self, group: Group) -> int:
        return self._multiple[group.name]

    def count(self, group: Group, fraction: float) -> int:
        multiple = self.multiple(group)
        least = min(group.size, math.ceil(self._minimum.get(group.name, group.least) / multiple) * multiple)
        return max(least, 0 if fraction >= 1 else kept_count(group.size, fraction, multiple))

    def hold_one_of_each(
        self, removal: Callable[[Group], float], stays: Mapping[str, bool] = MappingProxyType({})
    ) -> None:
        """Keep one attention and one FFN layer, where all might go: that of the largest ``removal``.

        ``stays`` says which layers the user has decided on already.
        """
        free = {group.name for group in self.groups}
        for layers in (self.anatomy.attention, self.anatomy.ffn):
            found = [self.anatomy.group(site.layer) for site in layers]
            if any(g.name not in free or self._minimum.get(g.name) or stays.get(g.name) for g in found):
                continue
            undecided = [group for group in found if group.name not in stays]
            if undecided:
                self._minimum[max(undecided, key=removal).name] = 1

    def options(self, group: Group) -> list[int]:
        """All sizes that the group may have, rising."""
        least = self.count(group, 1.0)
        return sorted({least, *range(least, group.size, self.multiple(group)), group.size})

    def step_up(self, group: Group, kept: int) -> int:
        wider = (kept // self.multiple(group) + 1) * self.multiple(group)
        return group.size if wider > group.size // self.multiple(group) * self.multiple(group) else wider


def _of_least_loss(anatomy: Anatomy, free: _Choice, budget: _Budget, losses: Callable[[Group], Float]) -> Allocation:
    width = next((group for group in free.groups if group.kind == "width"), None)
    choices = _choices(anatomy, free, losses)
    best: Allocation | None = None
    best_base = anatomy.sizes
    bound = math.inf
    for base in [anatomy.sizes] if width is None else [{**anatomy.sizes, width.name: n} for n in free.options(width)]:
        found = _at_width(base, choices, budget)
        if found is None:
            continue
        narrower = 0.0 if width is None else float(losses(width)[base[width.name]])
        loss = found.loss + narrower
        bound = min(bound, found.bound + narrower)
        if best is None or loss < best.loss:
            best, best_base = Allocation(found.sizes, loss), base
    assert best is not None, "the smallest sizes meet the budget"
    shares = [budget.along(best_base, choice.sizes) for choice in choices]
    kept = best.sizes
    for _ in range(_EXCHANGES):
        before = kept
        # What exchanges leave of the budget may be a step again.
        kept = _filled(_exchanged(kept, choices, shares, budget), choices, shares, budget.prices()[-1], budget)
        if kept == before:
            break
    loss = best.loss + _total(choices, kept) - _total(choices, best.sizes)
    # The dual of a linear programme may exceed what was found by rounding alone.
    return Allocation(kept, loss, min(bound, loss))


def _choices(anatomy: Anatomy, free: _Choice, losses: Callable[[Group], Float]) -> list[_Choices]:
    """What is decided apart: groups whose costs add up."""
    together: dict[str, list[list[Group]]] = {}
    for bundle in _bundles(free, anatomy.sizes):
        if bundle[0].kind != "width":
            layer = anatomy.layer_of.get(bundle[0].name, bundle[0].name)
            together.setdefault(layer, []).append(bundle)
    found = []
    for bundles in together.values():
        kinds = {group.kind for bundle in bundles for group in bundle}
        if kinds & {"heads", "block"}:
            found.append(_Choices(bundles, free, losses))
        else:
            found += [_Choices([bundle], free, losses) for bundle in bundles]
    return found


def _at_width(base: dict[str, int], choices: list[_Choices], budget: _Budget) -> Allocation | None:
    """The choice of least loss within the budget when all other groups are as in ``base``."""
    shares = [budget.along(base, choice.sizes) for choice in choices]
    # All choices start from the model at ``base``, which the sum of their costs holds once too often for each.
    repeated = (len(choices) - 1) * (1 - budget.room(base))
    best: Allocation | None = None
    bound = -math.inf
    # Which limit binds is not known before: a price on each alone, then on all of them alike.
    for prices in budget.prices():
        priced = [prices @ share for share in shares]
        found = _at_one_price(base, choices, priced, budget)
        if found is None:
            return None
        kept, least = found
        bound = max(bound, max(each - price * float(prices @ (1 + repeated)) for price, each in least))
        kept = _filled(kept, choices, shares, prices, budget)
        loss = _total(choices, kept)
        if best is None or loss < best.loss:
            best = Allocation(kept, loss)
    assert best is not None, "a budget has a limit"
    return Allocation(best.sizes, best.loss, bound)


def _at_one_price(
    base: dict[str, int], choices: list[_Choices], costs: list[Float], budget: _Budget
) -> tuple[dict[str, int], list[tuple[float, float]]] | None:
    """The least of loss + price · cost in each, at the lowest price that meets the budget; that sum at every price."""
    least: list[tuple[float, float]] = []

    def chosen(price: float) -> dict[str, int]:
        kept = dict(base)
        total = 0.0
        for choice, cost in zip(choices, costs, strict=True):
            priced = choice.losses + price * cost
            index = int(np.argmin(priced))
            total += float(priced[index])
            choice.put(kept, index)
        least.append((price, total))
        return kept

    kept = chosen(0.0)
    if budget.holds(kept):
        return kept, least
    kept = dict(base)
    for choice, cost in zip(choices, costs, strict=True):
        choice.put(kept, int(np.argmin(cost)))
    if not budget.holds(kept):
        return None
    low, high = -60.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        trial = chosen(2.0**middle)
        if budget.holds(trial):
            high, kept = middle, trial
        else:
            low = middle
    return kept, least


def _filled(
    kept: dict[str, int], choices: list[_Choices], shares: list[Float], prices: Float, budget: _Budget
) -> dict[str, int]:
    """Spend what is left of the budget, always on what saves most for what it costs."""
    refused = [np.zeros(len(choice.losses), bool) for choice in choices]
    while True:
        room = budget.room(kept)[:, None] + 1e-9
        best = (-np.inf, 0, 0)
        for number, (choice, share) in enumerate(zip(choices, shares, strict=True)):
            at = choice.index(kept)
            extra = share - share[:, at, None]
            saved, cost = choice.losses[at] - choice.losses, prices @ extra
            better = (saved > 0) | ((saved == 0) & (cost > 0))
            fits = (extra <= room).all(0) & better & ~refused[number]
            if fits.any():
                rate = np.where(fits, saved / np.maximum(cost, 1e-12), -np.inf)
                found = int(np.argmax(rate))
                if rate[found] > best[0]:
                    best = (float(rate[found]), number, found)
        rate_of_best, number, index = best
        if rate_of_best == -np.inf:
            return kept
        wider = dict(kept)
        choices[number].put(wider, index)
        if budget.holds(wider):
            kept = wider
        else:
            # Shares add up but for rounding; the budget has the last word.
            refused[number][index] = True


def _exchanged(kept: dict[str, int], choices: list[_Choices], shares: list[Float], budget: _Budget) -> dict[str, int]:
    """Take from one what another makes more of, as long as any such exchange fits; one limit's prices see no pairs."""
    if not choices:
        return kept  # the width alone, which is decided already
    owners = np.repeat(np.arange(len(choices)), [len(choice.losses) for choice in choices])
    starts = np.searchsorted(owners, np.arange(len(choices)))
    for _ in range(_EXCHANGES):
        at = [choice.index(kept) for choice in choices]
        gained = np.concatenate([c.losses[i] - c.losses for c, i in zip(choices, at, strict=True)])
        extra = np.concatenate([share - share[:, i, None] for share, i in zip(shares, at, strict=True)], axis=1)
        wider, narrower = np.flatnonzero(gained > 0), np.flatnonzero((extra < 0).any(0))
        room = budget.room(kept)[:, None, None]
        best: tuple[float, list[int]] = (1e-9 * max(_total(choices, kept), 1e-300), [])
        for some in np.array_split(wider, max(1, len(wider) * len(narrower) // 1_000_000)):
            saved = gained[some, None] + gained[narrower]
            fits = (extra[:, some, None] + extra[:, None, narrower] <= room).all(0)
            saved = np.where(fits & (owners[some, None] != owners[narrower]), saved, -np.inf)
            if saved.size and saved.max() > best[0]:
                first, second = np.unravel_index(int(saved.argmax()), saved.shape)
                best = (float(saved.max()), [int(some[first]), int(narrower[second])])
        trial = dict(kept)
        for index in best[1]:
            choices[owners[index]].put(trial, index - int(starts[owners[index]]))
        if not best[1] or not budget.holds(trial):
            break
        kept = trial
    return kept


def _total(choices: list[_Choices], kept: Mapping[str, int]) -> float:
    return sum(float(choice.losses[choice.index(kept)]) for choice in choices)


class _Choices:
    """Groups that are chosen together, the sizes they may have, and what each choice loses.

    Each bundle keeps one size. Losses add up, as far as the layer stays; without it, all that it does is lost.
    """

    def __init__(self, bundles: list[list[Group]], free: _Choice, losses: Callable[[Group], Float]) -> None:
        inner = [bundle for bundle in bundles if bundle[0].kind != "block"]
        layer = next((bundle[0] for bundle in bundles if bundle[0].kind == "block"), None)
        options = [free.options(bundle[0]) for bundle in inner]
        grid = [axis.flatten() for axis in np.meshgrid(*options, indexing="ij")] if inner else []
        total = np.zeros(len(grid[0]) if inner else 1)
        sizes: dict[str, npt.NDArray[np.int64]] = {}
        for bundle, axis in zip(inner, grid, strict=True):
            for group in bundle:
                sizes[group.name] = axis
                total = total + losses(group)[axis]
        if layer is not None:
            sizes[layer.name] = np.ones(len(total), np.int64)
            if free.count(layer, 1.0) == 0:
                # What is within an absent layer is whole, and costs nothing.
                whole = {group.name: group.size for bundle in inner for group in bundle}
                sizes = {name: np.append(axis, whole.get(name, 0)) for name, axis in sizes.items()}
                total = np.append(total, losses(layer)[0])
        self.sizes, self.losses = sizes, total
        self._tuples = list(zip(*(axis.tolist() for axis in sizes.values()), strict=True))
        self._position = {sizes: index for index, sizes in enumerate(self._tuples)}

    def index(self, kept: Mapping[str, int]) -> int:
        return self._position[tuple(kept[name] for name in self.sizes)]

    def put(self, kept: dict[str, int], index: int) -> None:
        kept.update(zip(self.sizes, self._tuples[index], strict=True))


class _Step:
    """Groups that grow together by one multiple each."""

    def __init__(self, groups: list[Group], free: _Choice) -> None:
        self._groups, self._free = groups, free

    def share(self, kept: Mapping[str, int]) -> float:
        return kept[self._groups[0].name] / self._groups[0].size

    def next(self, kept: Mapping[str, int]) -> dict[str, int] | None:
        if all(kept[group.name] == group.size for group in self._groups):
            return None
        return {**kept, **{group.name: self._free.step_up(group, kept[group.name]) for group in self._groups}}


def _bundles(free: _Choice, kept: Mapping[str, int]) -> list[list[Group]]:
    """Groups to step together: query/key and value of a layer where they are and stay equal, others alone."""
    by_block: dict[int, Group] = {
        group.block: group for group in free.groups if group.kind == "v" and group.block is not None
    }
    bundles: list[list[Group]] = []
    paired: set[str] = set()
    for group in free.groups:
        value = by_block.get(group.block) if group.kind == "qk" and group.block is not None else None
        if value is not None and (group.size, kept[group.name], free.multiple(group)) == (
            value.size,
            kept[value.name],
            free.multiple(value),
        ):
            bundles.append([group, value])
            paired |= {group.name, value.name}
    return bundles + [[group] for group in free.groups if group.name not in paired]


@dataclass(frozen=True)
class _Count:
    """MACs or parameters."""

    name: str
    dense: float
    total: Callable[[Mapping[str, Size]], Size]

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        """The cost at ``base`` but with the groups of ``sizes`` at each of these in turn."""
        found = self.total({**base, **{name: np.asarray(each) for name, each in sizes.items()}})
        return np.asarray(found, np.float64)


class _Budget:
    """Does a choice of sizes meet the target?"""

    def __init__(self, anatomy: Anatomy, target: Target, latency: Cost | None) -> None:
        costs: list[Cost] = []
        if target.macs is not None:
            costs.append(_Count("macs", anatomy.macs, anatomy.macs_at))
        if target.params is not None:
            costs.append(_Count("params", anatomy.params, anatomy.params_at))
        if latency is not None:
            costs.append(latency)
        self._limits = [(cost, getattr(target, cost.name) * cost.dense) for cost in costs]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        return all(cost.total(sizes) <= limit for cost, limit in self._limits)

    def room(self, sizes: Mapping[str, int]) -> Float:
        """What is left of each limit, as a share of it: (limits,)."""
        return np.array([1 - cost.total(sizes) / limit for cost, limit in self._limits])

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> Float:
        """Costs as shares of their limits, (limits, n): ``base`` with the groups of ``sizes`` at each of these."""
        return np.stack([cost.along(base, sizes) / limit for cost, limit in self._limits])

    def prices(self) -> list[Float]:
        """Weights of the limits to try: each alone, and all alike."""
        count = len(self._limits)
        return [*np.eye(count), *([np.ones(count)] if count > 1 else [])]

    def reach(self, sizes: Mapping[str, int]) -> str:
        return ", ".join(
            f"{cost.name} >= {math.ceil(cost.total(sizes) / cost.dense * 1e4) / 1e4:g}" for cost, _ in self._limits
        )


def _sequence(argument: str, names: Any) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InvalidArgument(f"{argument}: expected a sequence of names, got {names!r}")
    return list(names)


def _check_kinds(anatomy: Anatomy, argument: str, names: Iterable[str]) -> None:
    """Every name is a kind or a group of this model."""
    kinds = list(dict.fromkeys(group.kind for group in anatomy.groups))
    for name in names:
        if name in anatomy.refused:
            raise Unsupported(
                f"{argument}: expected kinds that this model can lose, got {name!r} ({anatomy.refused[name]})"
            )
        if name not in kinds and name not in anatomy.sizes:
            raise InvalidArgument(f"{argument}: expected {', '.join(kinds)} or a group's name, got {name!r}")


def _matching(anatomy: Anatomy, argument: str, patterns: Iterable[str]) -> set[str]:
    """Names of the groups that are named by kind, by name or by a shell pattern such as 'blocks.0.*'."""
    found: set[str] = set()
    for pattern in patterns:
        names = {g.name for g in anatomy.groups if g.kind == pattern or fnmatchcase(g.name, pattern)}
        if not names:
            raise InvalidArgument(f"{argument}: expected a kind, group name or pattern of this model, got {pattern!r}")
        found |= names
    return found


def _per_group(anatomy: Anatomy, argument: str, values: Mapping[str, int]) -> dict[str, int]:
    """Spread positive integers by kind or group name over groups; a group's own name wins over its kind."""
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{argument}: expected a dict by kind or group, got {values!r}")
    _check_kinds(anatomy, argument, values)
    return {
        group.name: check.integer(f"{argument}[{key!r}]", values[key])
        for group in anatomy.groups
        for key in (group.name, group.kind)
        if key in values and (key == group.name or group.name not in values)
    }


def _removed(anatomy: Anatomy, key: str, name: str, value: object) -> float:
    """The fraction that leaves of a kind or group, which the user calls ``key``."""
    layer = name in anatomy.layers
    fraction = check.fraction(f"ratios[{key!r}]", value, open_high=not layer)
    if layer and fraction not in (0, 1):
        raise InvalidArgument(f"ratios[{key!r}]: expected 0 or 1 of a layer, got {value!r}")
    return fraction


def _fractions(anatomy: Anatomy, ratios: Mapping[str, float]) -> dict[str, float]:
    _check_kinds(anatomy, "ratios", ratios)
    checked = {name: _removed(anatomy, name, name, value) for name, value in ratios.items()}
    return {group.name: checked.get(group.name, checked.get(group.kind, 0.0)) for group in anatomy.groups}


def shipped_configurations() -> list[str]:
    """Names of the published per-block ratio files that ship with the package."""
    folder = resources.files(__package__) / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def _fractions_from_file(anatomy: Anatomy, source: str | Path) -> dict[str, float]:
    """Read a per-block file: group names, or the names that SNP's authors use (Shim et al., ECCV 2024).

    There matmul_{2i} is block i's query/key, matmul_{2i+1} its value, blocks_i_mlp_fc1 its FFN, and the last add the
    residual width; index 0 has no number.
    """
    shipped = resources.files(__package__) / "configs" / f"{source}.json"
    if isinstance(source, str) and source in shipped_configurations():
        values = json.loads(shipped.read_text())
    else:
        path = Path(source)
        if not path.is_file():
            names = ", ".join(shipped_configurations())
            raise InvalidArgument(f"ratios: expected a dict, one of {names}, or a file, got {str(source)!r}")
        try:
            values = container.read_json(path)
        except ValueError as error:
            raise InvalidArgument(f"ratios: expected JSON in {source}, got {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgument(f"ratios: expected a JSON object in {source}, got {type(values).__name__}")
    values.pop("source", None)
    published = [group for group in anatomy.groups if group.kind not in ("heads", "block")]
    group_of = {_published_name(anatomy, group): group.name for group in published}
    if not any(key in group_of for key in values):
        group_of = {name: name for name in anatomy.sizes}
    _check_file_keys(anatomy, source, values, group_of)
    return {group_of[key]: _removed(anatomy, key, group_of[key], value) for key, value in values.items()}


def _check_file_keys(anatomy: Anatomy, source: str | Path, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for key in values:
        if "width" in anatomy.refused and (key == "width" or key.startswith("add_")):
            raise Unsupported(f"ratios: {source} cuts the width ({anatomy.refused['width']})")
        if key not in names:
            raise InvalidArgument(f"ratios: expected keys of this model in {source}, got the extra key {key!r}")
    for key, name in names.items():
        if key not in values and anatomy.group(name).kind in ("qk", "v", "ffn"):
            raise InvalidArgument(f"ratios: expected the key {key!r} in {source}, got none")


def _published_name(anatomy: Anatomy, group: Group) -> str:
    if group.block is None:
        index = 2 * len({g.block for g in anatomy.groups if g.block is not None})
        return f"add_{index}" if group.kind == "width" else group.name
    if group.kind == "ffn":
        return f"blocks_{group.block}_mlp_fc1"
    index = 2 * group.block + (group.kind == "v")
    return f"matmul_{index}" if index else "matmul"
