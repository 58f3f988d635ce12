"""The objectives of a search: which models it accepts, and which of them it cuts further."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from .. import check
from ..errors import InvalidArgument
from ..latency.runtimes.registry import RUNTIMES

__all__ = [
    "AccuracyCritical",
    "LatencySensitive",
    "Measures",
    "MemoryConstrained",
    "Objective",
    "Verdict",
    "settings_of",
]

Cost = Literal["params", "macs"]


@dataclass(frozen=True)
class Measures:
    """The measurements of a round: counts, accuracy in percent, and latency as a fraction of the dense model's."""

    params: int
    macs: int
    accuracy: float
    latency: float | None = None


class Verdict(NamedTuple):
    """``further``: the search continues from this model, else it rolls back; ``accepted``: it may be the answer."""

    further: bool
    accepted: bool


def _keep(objective: object, **values: float) -> None:
    """Store values as plain numbers, whatever their type was, so that files can hold them."""
    for name, value in values.items():
        object.__setattr__(objective, name, value)


@dataclass(frozen=True)
class AccuracyCritical:
    """As small as possible with at most ``max_drop`` points of accuracy lost.

    A model is accepted, and cut further, while its accuracy is at most ``max_drop`` percentage points below the dense
    model's. ``cost`` is what the search reduces: "params" or "macs".

    Raises:
        InvalidArgument: a negative drop, or another cost.
    """

    max_drop: float = 1.0
    cost: Cost = "params"

    def __post_init__(self) -> None:
        _keep(self, max_drop=check.number("objective.max_drop", self.max_drop))
        if self.cost not in ("params", "macs"):
            raise InvalidArgument(f"objective.cost: expected 'params' or 'macs', got {self.cost!r}")

    def judge(self, found: Measures, dense: Measures, best: Measures | None) -> Verdict:
        """Judge a round; ``best`` is the last round accepted before it."""
        del best
        # Tolerate rounding: a drop of exactly max_drop must be accepted.
        met = dense.accuracy - found.accuracy <= self.max_drop + 1e-9
        return Verdict(met, met)

    def __str__(self) -> str:
        return f"fewest {'parameters' if self.cost == 'params' else 'MACs'}, at most {self.max_drop:g} points lost"


@dataclass(frozen=True)
class MemoryConstrained:
    """At most ``params`` (a fraction of the dense model's) parameters, as accurate as possible.

    A model within the budget is accepted if no model accepted before it is more accurate. As AAP's released code treats
    its parameter target, the search cuts further while a model has not lost more than the budget asks for, and rolls
    back after one that has.

    Raises:
        InvalidArgument: a fraction outside (0, 1].
    """

    params: float

    def __post_init__(self) -> None:
        _keep(self, params=check.fraction("objective.params", self.params, open_low=True))

    @property
    def cost(self) -> Cost:
        """The cost that the search reduces."""
        return "params"

    def judge(self, found: Measures, dense: Measures, best: Measures | None) -> Verdict:
        """Judge a round; ``best`` is the last round accepted before it."""
        return _judge_budget(found.params / dense.params, self.params, found, best)

    def __str__(self) -> str:
        return f"most accurate with at most {self.params:.4g} of the parameters"


@dataclass(frozen=True)
class LatencySensitive:
    """At most ``macs`` of the dense model's MACs, or ``latency`` of its measured time, as accurate as possible.

    Models are accepted as for `MemoryConstrained`. Give exactly one of the two fractions. Latency is measured by
    ``bench`` against the dense model, on ``batch_size`` images, as the inverse median of ``repeats`` paired ratios,
    both run by the engine ``runtime``; the search itself varies MACs.

    Raises:
        InvalidArgument: both or neither, a fraction outside (0, 1], a number below 1, or no such engine.
    """

    macs: float | None = None
    latency: float | None = None
    batch_size: int = 32
    repeats: int = 15
    runtime: str = "torch"

    def __post_init__(self) -> None:
        if (self.macs is None) == (self.latency is None):
            raise InvalidArgument(
                f"objective: expected either macs or latency, got {'neither' if self.macs is None else 'both'}"
            )
        for name in ("macs", "latency"):
            if getattr(self, name) is not None:
                _keep(self, **{name: check.fraction(f"objective.{name}", getattr(self, name), open_low=True)})
        _keep(self, batch_size=check.integer("objective.batch_size", self.batch_size))
        _keep(self, repeats=check.integer("objective.repeats", self.repeats))
        RUNTIMES.named(self.runtime)

    @property
    def cost(self) -> Cost:
        """The cost that the search reduces."""
        return "macs"

    def judge(self, found: Measures, dense: Measures, best: Measures | None) -> Verdict:
        """Judge a round; ``best`` is the last round accepted before it."""
        if self.macs is not None:
            return _judge_budget(found.macs / dense.macs, self.macs, found, best)
        assert self.latency is not None
        assert found.latency is not None
        return _judge_budget(found.latency, self.latency, found, best)

    def __str__(self) -> str:
        share, what = (self.macs, "MACs") if self.macs is not None else (self.latency, "latency")
        return f"most accurate with at most {share:.4g} of the {what}"


Objective: TypeAlias = AccuracyCritical | MemoryConstrained | LatencySensitive


def settings_of(objective: Objective) -> dict[str, Any]:
    """Return name and fields as JSON values; the engine only if it is not torch, as in older files."""
    fields = asdict(objective)
    if fields.get("runtime") == "torch":
        del fields["runtime"]
    return {"name": type(objective).__name__, **fields}


def _judge_budget(share: float, budget: float, found: Measures, best: Measures | None) -> Verdict:
    within = share <= budget
    return Verdict(share >= budget, within and (best is None or found.accuracy >= best.accuracy))
