"""Which counts a method is given: one ratio for all kinds, or a grid of ratios, at one budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import peers
import secateur as sc
from secateur.anatomy import Anatomy
from secateur.budgets.limits import kept_count

OURS = ("project", "refit", "snp")
INNER = ("qk", "v", "ffn")
# The largest share that a grid takes of any kind.
MOST = 0.95
# Emphasis on query/key, value and width where the FFN's is 1.
GRID = tuple(itertools.product((0.6, 1.0, 1.5), (0.3, 0.6, 1.0, 1.5), (0.0, 0.15, 0.3)))


@dataclass(frozen=True)
class Budget:
    """A share of the dense model's MACs or parameters."""

    quantity: str
    kept: float

    def cost(self, anatomy: Anatomy, sizes: Mapping[str, int]) -> float:
        """Share that a model of these sizes costs."""
        if self.quantity == "macs":
            return anatomy.macs_at(sizes) / anatomy.macs
        return anatomy.params_at(sizes) / anatomy.params

    @property
    def target(self) -> sc.Target:
        return sc.Target(**{self.quantity: self.kept})

    def __str__(self) -> str:
        return f"{self.quantity} {self.kept:g}"


def sizes_at(anatomy: Anatomy, ratios: Mapping[str, float]) -> dict[str, int]:
    return {g.name: kept_count(g.size, ratios.get(g.kind, 0.0), g.multiple) for g in anatomy.groups}


def ratios_at(anatomy: Anatomy, budget: Budget, emphasis: Mapping[str, float]) -> dict[str, float] | None:
    """The removed fractions in proportion to ``emphasis``, the least that meet the budget; None where none do."""
    if not any(share > 0 for share in emphasis.values()):
        return None

    def ratios(scale: float) -> dict[str, float]:
        return {kind: min(MOST, scale * share) for kind, share in emphasis.items() if share > 0}

    def holds(scale: float) -> bool:
        return budget.cost(anatomy, sizes_at(anatomy, ratios(scale))) <= budget.kept

    low, high = 0.0, MOST / min(share for share in emphasis.values() if share > 0)
    if not holds(high):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return ratios(high)


def kinds_of(anatomy: Anatomy, method: str) -> tuple[str, ...]:
    """The kinds that a method can cut in this model."""
    if method in peers.PEERS:
        kinds = peers.PEERS[method].kinds_of(anatomy)
    elif method == "project" and any(isinstance(stream, str) for stream in anatomy.streams.values()):
        kinds = INNER
    else:
        kinds = (*INNER, "width")
    return tuple(kind for kind in kinds if kind not in anatomy.refused)


def uniform(anatomy: Anatomy, budget: Budget, method: str = "") -> dict[str, float]:
    """One ratio for query/key, value and FFN, or for those of them that the method can cut."""
    kinds = [kind for kind in kinds_of(anatomy, method) if kind in INNER]
    ratios = ratios_at(anatomy, budget, dict.fromkeys(kinds, 1.0))
    if ratios is None:
        raise sc.Unsupported(f"{budget} cannot be reached with {', '.join(kinds) or 'nothing'} alone")
    return ratios


def allocations(anatomy: Anatomy, budget: Budget, method: str) -> Iterator[dict[str, float]]:
    """The grid's ratios that meet the budget, of the kinds that the method can cut."""
    tied = method in peers.PEERS and peers.PEERS[method].tied
    seen = set()
    allowed = kinds_of(anatomy, method)
    for qk, v, width in GRID:
        if (width and "width" not in allowed) or (tied and qk != v):
            continue
        emphasis = {"qk": qk, "v": v, "ffn": 1.0, "width": width}
        ratios = ratios_at(anatomy, budget, {kind: share for kind, share in emphasis.items() if kind in allowed})
        sizes = None if ratios is None else tuple(sizes_at(anatomy, ratios).values())
        if ratios is not None and sizes not in seen:
            seen.add(sizes)
            yield ratios
