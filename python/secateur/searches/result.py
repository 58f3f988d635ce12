"""The result of a search: its rounds as a table, a plot and a file, and the model that is its answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from .. import check
from ..anatomy.show import render, units
from ..errors import InvalidArgument
from ..files.container import replacing
from .objectives import AccuracyCritical, Measures, Objective

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import nn

    from ..plans.plan import Plan
    from .stepper import Move

__all__ = ["Round", "SearchResult", "check_figure"]

_FIGURE_FORMATS = (".pdf", ".png", ".svg")


def check_figure(path: str | os.PathLike[str]) -> Path:
    """Return the path of a figure, after checking that it can be drawn.

    Raises:
        InvalidArgument: as `SearchResult.plot`.
    """
    file = check.writable("path", path)
    if file.suffix not in _FIGURE_FORMATS:
        raise InvalidArgument(f"path: expected a {', '.join(_FIGURE_FORMATS)} file, got {file.name!r}")
    check.packages("plot", "plot", "matplotlib")
    return file


@dataclass(frozen=True)
class Round:
    """One round of a search; round 0 is the measured dense model.

    ``threshold`` (T) is the fraction of the dense model's cost to be removed, ``step`` (λ) the step at that time,
    ``base`` the round whose model was cut. ``params`` and ``macs`` are counts. Either ``top1`` or, if the images have
    no labels, ``agreement`` with the dense model's predictions is given, in percent; the other is None. ``latency`` is
    a fraction of the dense model's, None unless the objective asks for it. All are None if T is more than can be cut.
    ``accepted`` says whether the model meets the objective; ``move`` is the next step of the search: "grow", "halve",
    "return" or "end".
    """

    threshold: float
    step: float
    base: int | None
    params: int | None
    macs: int | None
    top1: float | None
    agreement: float | None
    latency: float | None
    accepted: bool
    move: Move

    @property
    def measures(self) -> Measures | None:
        """The measurements; None if there was no model."""
        accuracy = self.agreement if self.top1 is None else self.top1
        if self.params is None or self.macs is None or accuracy is None:
            return None
        return Measures(self.params, self.macs, accuracy, self.latency)


@dataclass(frozen=True)
class SearchResult:
    """The answer of a search, and how it was found.

    ``model`` is the last accepted model or, if none was accepted, a copy of the dense one; ``round`` is its index in
    ``history``, 0 for the dense one. With ``plan``, ``prune`` makes it from the dense model; ``plan`` is None for the
    dense model, and after fine-tuning, since a plan does not hold trained weights. ``resumed`` is the number of rounds
    read from a file.
    """

    model: nn.Module
    plan: Plan | None
    objective: Objective
    history: tuple[Round, ...]
    round: int
    resumed: int = 0

    @property
    def accepted(self) -> bool:
        """Whether a model was accepted; if not, the answer is the dense model."""
        return self.round > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, without model and plan."""
        return {
            "objective": {"name": type(self.objective).__name__, **asdict(self.objective)},
            "accepted": self.accepted,
            "round": self.round,
            "history": [asdict(row) for row in self.history],
        }

    def save_history(self, path: str | os.PathLike[str]) -> None:
        """Write objective and history as JSON, as returned by `to_dict`.

        Raises:
            InvalidArgument: the folder does not exist.
        """
        with replacing(check.writable("path", path)) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the threshold of every round, and the accuracy over the remaining cost; needs matplotlib.

        Args:
            path: a .png, .svg or .pdf file.

        Raises:
            InvalidArgument: the folder does not exist, another kind of file, or matplotlib is not installed.
        """
        file = check_figure(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        numbers = range(len(self.history))
        left.step(numbers, [row.threshold for row in self.history], where="mid", color="0.6")
        right.set_xlabel(f"{self._cost} left (share of the dense model)")
        right.set_ylabel(f"{self._accuracy} (%)")
        dense = self.history[0].measures
        assert dense is not None
        for number, row in enumerate(self.history):
            face = "tab:green" if row.accepted else "none"
            edge = "tab:green" if row.accepted else "tab:red"
            left.plot(number, row.threshold, "o", markerfacecolor=face, markeredgecolor=edge)
            found = row.measures
            if found is not None:
                share = self._share(found, dense)
                right.plot(share, found.accuracy, "o", markerfacecolor=face, markeredgecolor=edge)
                right.annotate(str(number), (share, found.accuracy), xytext=(4, 4), textcoords="offset points")
        if isinstance(self.objective, AccuracyCritical):
            right.axhline(dense.accuracy - self.objective.max_drop, color="0.6", linestyle="--")
        else:
            right.axvline(self._budget, color="0.6", linestyle="--")
        for face, label in (("tab:green", "accepted"), ("none", "not accepted")):
            edge = "tab:red" if face == "none" else face
            left.plot([], [], "o", markerfacecolor=face, markeredgecolor=edge, label=label)
        left.legend()
        left.set_xlabel("round")
        left.set_ylabel("T (share to be removed)")
        figure.suptitle(f"{self.objective}: round {self.round}")
        with replacing(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:])

    @property
    def _cost(self) -> str:
        if getattr(self.objective, "latency", None) is not None:
            return "latency"
        return "parameters" if self.objective.cost == "params" else "MACs"

    @property
    def _budget(self) -> float:
        assert not isinstance(self.objective, AccuracyCritical)
        found = next(getattr(self.objective, name, None) for name in ("params", "macs", "latency") if self._has(name))
        assert isinstance(found, float)
        return found

    def _has(self, name: str) -> bool:
        return getattr(self.objective, name, None) is not None

    @property
    def _accuracy(self) -> str:
        return "top-1" if self.history[0].agreement is None else "agreement"

    def _share(self, found: Measures, dense: Measures) -> float:
        if self._cost == "latency":
            assert found.latency is not None
            return found.latency
        return found.params / dense.params if self._cost == "parameters" else found.macs / dense.macs

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE)
        dense = self.history[0].measures
        assert dense is not None
        timed = any(row.latency is not None for row in self.history)
        columns = ("round", "of", "T", "step", "parameters", "", "MACs", "", self._accuracy)
        for column in (*columns, *(("latency",) if timed else ())):
            table.add_column(column, justify="right")
        for column in ("accepted", "next"):
            table.add_column(column)
        for number, row in enumerate(self.history):
            found = row.measures
            cells = ["-"] * (6 if timed else 5)
            if found is not None:
                cells = [units(found.params), f"{found.params / dense.params:.1%}"]
                cells += [units(found.macs), f"{found.macs / dense.macs:.1%}", f"{found.accuracy:.2f} %"]
                cells += [f"{found.latency:.3f}" if found.latency is not None else "-"] if timed else []
            base = "-" if row.base is None else str(row.base)
            place = [str(number), base, f"{row.threshold:.4g}", f"{row.step:.4g}"]
            table.add_row(*place, *cells, "yes" if row.accepted else "no", row.move)
        last = f"round {self.round} is the answer"
        if not self.accepted:
            last = f"none of {len(self.history) - 1} rounds was accepted: the answer is the dense model"
        return "\n".join([f"Search({self.objective})", render(table), last])
