"""How many units of each group stay: from fractions, from a file, or from a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from . import check
from .anatomy import Anatomy, Group
from .cost import Cost
from .errors import InvalidArgument, Unsupported
from .statistics import Float

DEFAULT_GROUPS = ("qk", "v", "ffn")
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
            check.fraction(f"target.{name}", value, open_low=True)

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value:g}" for name, value in vars(self).items() if value is not None)


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
) -> dict[str, int]:
    """Kept units by group, from the fraction removed of each kind or group, or from a per-block file.

    Raises:
        InvalidArgument: a key or value that does not fit; the text names it.
        Unsupported: a kind that this model cannot lose.
    """
    if isinstance(ratios, Mapping):
        fractions = _fractions(anatomy, ratios)
    else:
        fractions = _fractions_from_file(anatomy, ratios)
    free = _Choice(anatomy, groups, freeze, min_keep, round_to, default_multiples={})
    return {
        group.name: free.count(group, fractions.get(group.name, 0.0)) if group in free.groups else group.size
        for group in anatomy.groups
    }


def counts_from_target(
    anatomy: Anatomy,
    target: Target,
    *,
    groups: Iterable[str] | None,
    freeze: Iterable[str],
    min_keep: Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
    losses: Callable[[Group], Float] | None = None,
    latency: Cost | None = None,
) -> dict[str, int]:
    """Kept units by group under a budget; ``latency`` predicts what ``target.latency`` limits.

    With ``losses``, what a group loses when 0 … size units stay, (size + 1,), in a unit common to all, the counts are
    those of the least total loss: for every width, the least of loss + λ · cost in each group, at the λ that meets the
    budget; then the width of the least total. Without, one removed fraction for all named groups, the least that meets
    the budget.

    What rounding leaves of the budget is then spent while anything fits: by ``losses`` on the wider size that saves
    most for its cost, else one rounding step at a time on the group that lost the largest share; query/key and value of
    one layer step together, so that they keep one size.

    Raises:
        InvalidArgument: the budget cannot be met; the text says what can.
        Unsupported: a kind that this model cannot lose.
    """
    free = _Choice(anatomy, DEFAULT_GROUPS if groups is None else groups, freeze, min_keep, round_to, _TARGET_MULTIPLES)
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
    return kept


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
            self._multiple = dict.fromkeys(anatomy.sizes, check.integer("round_to", round_to))
        for group in anatomy.groups:
            self._multiple[group.name] = math.lcm(self._multiple[group.name], group.multiple)

    def multiple(self, group: Group) -> int:
        return self._multiple[group.name]

    def count(self, group: Group, fraction: float) -> int:
        multiple = self.multiple(group)
        least = min(group.size, math.ceil(self._minimum.get(group.name, 1) / multiple) * multiple)
        return max(least, kept_count(group.size, fraction, multiple))

    def options(self, group: Group) -> list[int]:
        """All sizes that the group may have, rising."""
        least = self.count(group, 1.0)
        return sorted({least, *range(least, group.size, self.multiple(group)), group.size})

    def step_up(self, group: Group, kept: int) -> int:
        wider = (kept // self.multiple(group) + 1) * self.multiple(group)
        return group.size if wider > group.size // self.multiple(group) * self.multiple(group) else wider


def _of_least_loss(
    anatomy: Anatomy, free: _Choice, budget: _Budget, losses: Callable[[Group], Float]
) -> dict[str, int]:
    width = next((group for group in free.groups if group.kind == "width"), None)
    bundles = [bundle for bundle in _bundles(free, anatomy.sizes) if bundle != [width]]
    options = [_Options(bundle, free, losses) for bundle in bundles]
    best: tuple[float, dict[str, int]] | None = None
    for base in [anatomy.sizes] if width is None else [{**anatomy.sizes, width.name: n} for n in free.options(width)]:
        kept = _at_width(base, options, budget)
        if kept is None:
            continue
        loss = sum(float(option.losses[option.index(kept)]) for option in options)
        loss += 0.0 if width is None else float(losses(width)[kept[width.name]])
        if best is None or loss < best[0]:
            best = (loss, kept)
    assert best is not None, "the smallest sizes meet the budget"
    return best[1]


def _at_width(base: dict[str, int], options: list[_Options], budget: _Budget) -> dict[str, int] | None:
    """The choice of least loss within the budget when all other groups are as in ``base``."""
    shares = [budget.along(base, option.names, option.sizes) for option in options]
    best: tuple[float, dict[str, int]] | None = None
    # Which limit binds is not known before: a price on each alone, then on all of them alike.
    for prices in budget.prices():
        kept = _at_one_price(base, options, [prices @ share for share in shares], budget)
        if kept is None:
            return None
        kept = _filled(kept, options, shares, prices, budget)
        loss = sum(float(option.losses[option.index(kept)]) for option in options)
        if best is None or loss < best[0]:
            best = (loss, kept)
    assert best is not None, "a budget has a limit"
    return best[1]


def _at_one_price(
    base: dict[str, int], options: list[_Options], costs: list[Float], budget: _Budget
) -> dict[str, int] | None:
    """The least of loss + price · cost in each bundle, at the lowest price that meets the budget."""

    def chosen(price: float) -> dict[str, int]:
        kept = dict(base)
        for option, cost in zip(options, costs, strict=True):
            option.put(kept, int(np.argmin(option.losses + price * cost)))
        return kept

    kept = chosen(0.0)
    if budget.holds(kept):
        return kept
    kept = dict(base)
    for option in options:
        option.put(kept, 0)
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
    return kept


def _filled(
    kept: dict[str, int], options: list[_Options], shares: list[Float], prices: Float, budget: _Budget
) -> dict[str, int]:
    """Spend what is left of the budget, always on the wider size that saves most for what it costs."""
    refused = [np.zeros(len(option.sizes), bool) for option in options]
    while True:
        room = budget.room(kept)[:, None] + 1e-9
        best = (-np.inf, 0, 0)
        for number, (option, share) in enumerate(zip(options, shares, strict=True)):
            at = option.index(kept)
            extra = share[:, at + 1 :] - share[:, at, None]
            fits = (extra <= room).all(0) & ~refused[number][at + 1 :]
            if fits.any():
                rate = (option.losses[at] - option.losses[at + 1 :]) / np.maximum(prices @ extra, 1e-12)
                found = int(np.argmax(np.where(fits, rate, -np.inf)))
                if rate[found] > best[0]:
                    best = (float(rate[found]), number, at + 1 + found)
        rate_of_best, number, index = best
        if rate_of_best == -np.inf:
            return kept
        wider = dict(kept)
        options[number].put(wider, index)
        if budget.holds(wider):
            kept = wider
        else:
            # Shares add up but for rounding, and for groups of one layer that go apart; the budget has the last word.
            refused[number][index] = True


class _Options:
    """Groups that keep one size, the sizes they may have, and what each loses."""

    def __init__(self, groups: list[Group], free: _Choice, losses: Callable[[Group], Float]) -> None:
        self.names = [group.name for group in groups]
        self.sizes = free.options(groups[0])
        self.losses = np.sum([losses(group)[self.sizes] for group in groups], axis=0)
        self._position = {size: index for index, size in enumerate(self.sizes)}

    def index(self, kept: Mapping[str, int]) -> int:
        return self._position[kept[self.names[0]]]

    def put(self, kept: dict[str, int], index: int) -> None:
        for name in self.names:
            kept[name] = self.sizes[index]


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
    total: Callable[[Mapping[str, int]], float]

    def along(self, base: Mapping[str, int], names: Sequence[str], sizes: Sequence[int]) -> Float:
        """Linear, but for the last: a norm that serves every head is given to each of them once it is cut."""
        first, last = (self.total({**base, **dict.fromkeys(names, size)}) for size in (sizes[0], sizes[-1]))
        found = np.full(len(sizes), float(last))
        if len(sizes) > 1:
            ends = sizes[0], sizes[-2]
            before = self.total({**base, **dict.fromkeys(names, ends[1])})
            found[:-1] = np.interp(sizes[:-1], ends, (first, before)) if ends[0] < ends[1] else first
        return found


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

    def along(self, base: Mapping[str, int], names: Sequence[str], sizes: Sequence[int]) -> Float:
        """Costs as shares of their limits, (limits, sizes): ``base`` with the named groups at each of the sizes."""
        return np.stack([cost.along(base, names, sizes) / limit for cost, limit in self._limits])

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


def _removed(argument: str, value: object) -> float:
    return check.fraction(argument, value, open_high=True)


def _fractions(anatomy: Anatomy, ratios: Mapping[str, float]) -> dict[str, float]:
    _check_kinds(anatomy, "ratios", ratios)
    checked = {name: _removed(f"ratios[{name!r}]", value) for name, value in ratios.items()}
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
        text = shipped.read_text()
    else:
        path = Path(source)
        if not path.is_file():
            names = ", ".join(shipped_configurations())
            raise InvalidArgument(f"ratios: expected a dict, one of {names}, or a file, got {str(source)!r}")
        text = path.read_text()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"ratios: expected JSON in {source}, got {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgument(f"ratios: expected a JSON object in {source}, got {type(values).__name__}")
    values.pop("source", None)
    group_of = {_published_name(anatomy, group): group.name for group in anatomy.groups}
    if not any(key in group_of for key in values):
        group_of = {name: name for name in anatomy.sizes}
    _check_file_keys(anatomy, source, values, group_of)
    return {group_of[key]: _removed(f"ratios[{key!r}]", value) for key, value in values.items()}


def _check_file_keys(anatomy: Anatomy, source: str | Path, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for key in values:
        if "width" in anatomy.refused and (key == "width" or key.startswith("add_")):
            raise Unsupported(f"ratios: {source} cuts the width ({anatomy.refused['width']})")
        if key not in names:
            raise InvalidArgument(f"ratios: expected keys of this model in {source}, got the extra key {key!r}")
    for key, group in names.items():
        if key not in values and group != "width":
            raise InvalidArgument(f"ratios: expected the key {key!r} in {source}, got none")


def _published_name(anatomy: Anatomy, group: Group) -> str:
    if group.block is None:
        index = 2 * len({g.block for g in anatomy.groups if g.block is not None})
        return f"add_{index}" if group.kind == "width" else group.name
    if group.kind == "ffn":
        return f"blocks_{group.block}_mlp_fc1"
    index = 2 * group.block + (group.kind == "v")
    return f"matmul_{index}" if index else "matmul"
