"""What every method answers: how much is lost at each size, and what the model becomes at those that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from .. import core
from ..anatomy.anatomy import Anatomy
from ..anatomy.groups import Group, Indices
from ..statistics.statistics import Float, Statistics
from .selection_error import of_selection


@dataclass(frozen=True)
class Decision:
    """What stays: indices by group, and what changes: parameters, in their size after the cut, and norms."""

    keep: Mapping[str, Indices]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    uncentred: tuple[str, ...] = ()


class Prepared(Protocol):
    """A method bound to one model and its statistics."""

    def errors(self, group: Group) -> Float | None:
        """Share of the group's output lost when 0 … size units stay, (size + 1,); None where the method cannot say."""

    def decide(self, sizes: Mapping[str, int]) -> Decision:
        """Choose what stays at these sizes."""


class Method(Protocol):
    """What a module of this package offers."""

    NAME: str
    OPTIONS: Mapping[str, tuple[str, ...]]

    def prepare(
        self, model: nn.Module, anatomy: Anatomy, statistics: Statistics, options: Mapping[str, str]
    ) -> Prepared:
        """Bind the method to a model."""


class Ranking:
    """A method that only selects: the units of the highest score stay."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, statistics: Statistics, score: Callable[[Group], Float]
    ) -> None:
        self._model, self._anatomy, self._statistics, self._score = model, anatomy, statistics, score

    def errors(self, group: Group) -> Float | None:
        """What is lost with the units of the lowest scores; a score itself only orders them."""
        if group.kind == "block":
            return np.array([1.0, 0.0])
        order = np.argsort(-self._score(group), axis=1, kind="stable")
        return of_selection(self._model, self._anatomy, self._statistics, group, order)

    def decide(self, sizes: Mapping[str, int]) -> Decision:
        """Keep the highest scores of each group, as many per head."""
        keep: dict[str, Indices] = {}
        for group in self._anatomy.groups:
            if group.kind == "block" and not sizes[group.name]:
                keep[group.name] = np.empty((1, 0), np.int64)
            elif sizes[group.name] < group.size and sizes.get(self._anatomy.layer_of.get(group.name, ""), 1):
                keep[group.name] = core.select(self._score(group), sizes[group.name])
        return Decision(keep)
