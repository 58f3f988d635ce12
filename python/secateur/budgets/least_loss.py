"""Chooses the sizes with the least total loss within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..anatomy import Anatomy, Group
from ..statistics.settings import Float
from .budget import Allocation, Budget
from .limits import FreeGroups
from .uniform import bundles_of

# Each exchange lowers the loss, so they end, but possibly late.
_EXCHANGES = 100


def of_least_loss(
    anatomy: Anatomy,
    free: FreeGroups,
    budget: Budget,
    losses: Callable[[Group], Float],
    merging: Sequence[tuple[Mapping[str, int], float]] = (),
) -> Allocation:
    """Return the sizes with the least total loss that meet the budget, and a lower bound on any choice's loss.

    Of all numbers of tokens to merge, those in ``merging`` are considered, and none: sizes of groups, and their loss.
    """
    widths = [group for group in free.groups if group.traits.shared and not group.of_tokens]
    choices = _choices(anatomy, free, losses)
    best: Allocation | None = None
    best_base = anatomy.sizes
    bound = math.inf
    fewer = [({}, 0.0), *merging]
    for base, merged in itertools.product(_widths(anatomy, free, widths), fewer):
        sizes, lost = merged
        found = _at_width({**base, **sizes}, choices, budget)
        if found is None:
            continue
        lost = lost + sum(float(losses(width)[base[width.name]]) for width in widths)
        loss = found.loss + lost
        bound = min(bound, found.bound + lost)
        if best is None or loss < best.loss:
            best, best_base = Allocation(found.sizes, loss), {**base, **sizes}
    assert best is not None, "the smallest sizes meet the budget"
    shares = [budget.along(best_base, choice.sizes) for choice in choices]
    kept = best.sizes
    for _ in range(_EXCHANGES):
        before = kept
        # The budget that exchanges free may be enough for another step.
        kept = _filled(_exchanged(kept, choices, shares, budget), choices, shares, budget.prices()[-1], budget)
        if kept == before:
            break
    loss = best.loss + _total(choices, kept) - _total(choices, best.sizes)
    # By rounding error alone, the dual may exceed the loss that was found.
    return Allocation(kept, loss, min(bound, loss))


def _widths(anatomy: Anatomy, free: FreeGroups, widths: list[Group]) -> list[dict[str, int]]:
    """Return the model's sizes at each possible width; with one width per stage, all lose the same fraction."""
    if not widths:
        return [anatomy.sizes]
    first = max(widths, key=lambda width: len(free.options(width)))
    bases = []
    for option in free.options(first):
        removed = 1 - option / first.size
        bases.append(
            {**anatomy.sizes, **{width.name: free.count(width, removed) for width in widths}, first.name: option}
        )
    return bases


def _choices(anatomy: Anatomy, free: FreeGroups, losses: Callable[[Group], Float]) -> list[_Choices]:
    """Split the groups into independent choices, whose costs add up."""
    together: dict[str, list[list[Group]]] = {}
    for bundle in bundles_of(free, anatomy.sizes):
        if not bundle[0].traits.shared:
            layer = anatomy.layer_of.get(bundle[0].name, bundle[0].name)
            together.setdefault(layer, []).append(bundle)
    found = []
    for bundles in together.values():
        if any(group.traits.counted for bundle in bundles for group in bundle):
            found.append(_Choices(bundles, free, losses))
        else:
            found += [_Choices([bundle], free, losses) for bundle in bundles]
    return found


def _at_width(base: dict[str, int], choices: list[_Choices], budget: Budget) -> Allocation | None:
    """Return the choice of least loss within the budget when all other groups are as in ``base``."""
    shares = [budget.along(base, choice.sizes) for choice in choices]
    # Every choice's cost includes the model at ``base``; their sum counts it once for each, but it must count once.
    repeated = (len(choices) - 1) * (1 - budget.room(base))
    best: Allocation | None = None
    bound = -math.inf
    # It is not known in advance which limit binds: try a price on each alone, then on all equally.
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
    base: dict[str, int], choices: list[_Choices], costs: list[Float], budget: Budget
) -> tuple[dict[str, int], list[tuple[float, float]]] | None:
    """Minimise loss + price · cost at the lowest price that meets the budget; also return the sums at each price."""
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
    kept: dict[str, int], choices: list[_Choices], shares: list[Float], prices: Float, budget: Budget
) -> dict[str, int]:
    """Spend the remaining budget, each time on the step that lowers the loss most for its cost."""
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
            # Shares add up except for rounding, so the budget decides.
            refused[number][index] = True


def _exchanged(kept: dict[str, int], choices: list[_Choices], shares: list[Float], budget: Budget) -> dict[str, int]:
    """Exchange sizes between two choices while that fits and lowers the loss, which prices alone do not find."""
    if not choices:
        return kept  # only the width is free, and it is decided already
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
    """Groups that are chosen together, the sizes they may have, and what each combination loses.

    Each bundle has one size. Losses add up while the layer stays; without it, everything it computes is lost.
    """

    def __init__(self, bundles: list[list[Group]], free: FreeGroups, losses: Callable[[Group], Float]) -> None:
        inner = [bundle for bundle in bundles if not bundle[0].traits.whole]
        layer = next((bundle[0] for bundle in bundles if bundle[0].traits.whole), None)
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
                # The groups of a removed layer count as whole, and cost nothing.
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
