"""Makes pruned copies of models for a search, cut to a fraction of the dense one's cost, and trains them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from ..budgets.allocate import check_target
from ..budgets.target import Target
from ..calibration.calibrate import calibrate
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..plans.make import plan
from ..plans.plan import Plan
from ..plans.prune import prune
from ..statistics.objective import Objective
from ..statistics.statistics import Statistics
from ..training.finetune import finetune as finetune_

if TYPE_CHECKING:
    from ..anatomy import Anatomy


Tuning: TypeAlias = Mapping[str, Any] | Callable[[nn.Module], object]


class Cutting:
    """Makes copies of models, cut by T, a fraction of the dense model's cost."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, stats: Statistics, cost: str, arguments: Mapping[str, Any]
    ) -> None:
        self.model, self.anatomy, self.stats = model, anatomy, stats
        self._cost, self._arguments = cost, dict(arguments)

    def plan_of(self, base: nn.Module, stats: Statistics, share: float) -> Plan:
        """Plan for a fraction of the base model's cost."""
        return plan(base, stats, target=Target(**{self._cost: share}), **self._arguments)

    def cut(self, base: nn.Module, stats: Callable[[], Statistics], threshold: float) -> tuple[nn.Module, Plan | None]:
        """Return a pruned copy and its plan; the plan is None if nothing is cut.

        Raises:
            TooMuchError: T is more than can be removed from the base model.
        """
        anatomy = family_of(base).inspect(base)
        share = (1 - threshold) * getattr(self.anatomy, self._cost) / getattr(anatomy, self._cost)
        if share >= 1:
            return copy.deepcopy(base), None
        if share <= 0:
            raise TooMuchError
        limits = {name: self._arguments[name] for name in ("groups", "freeze", "min_keep", "round_to")}
        try:
            # All arguments were checked on the dense model, so an error now is about the target.
            check_target(anatomy, Target(**{self._cost: share}), **filled(limits))
        except InvalidArgument as error:
            raise TooMuchError from error
        chosen = self.plan_of(base, stats(), share)
        pruned = copy.deepcopy(base)
        prune(pruned, chosen)
        return pruned, chosen


class TooMuchError(Exception):
    """No choice of sizes removes this much."""


class Tuned:
    """How pruned copies are fine-tuned, and how statistics of them are collected."""

    def __init__(
        self,
        dense: nn.Module,
        how: Tuning,
        train_loader: Iterable[Any] | None,
        calibration_loader: Iterable[Any] | None,
        gradients: Objective | None = None,
    ) -> None:
        assert calibration_loader is not None
        self._gradients = gradients
        self.train_loader, self.calibration_loader = train_loader, calibration_loader
        self._call = how if callable(how) else None
        self._arguments: dict[str, Any] = {} if callable(how) else {"teacher": dense, **how}
        self.teacher: nn.Module | None = self._arguments.get("teacher")

    @property
    def described(self) -> dict[str, Any] | str:
        """Return the arguments as JSON values; all functions are described alike."""
        if self._call is not None:
            return "function"
        return {name: plain(value) for name, value in sorted(self._arguments.items()) if name != "teacher"}

    def train(self, model: nn.Module, resume: Path | None) -> None:
        """Train a copy in place."""
        if self._call is not None:
            self._call(model)
            return
        assert self.train_loader is not None
        keep = resume if self._arguments.get("checkpoint_every") is not None else None
        finetune_(model, self.train_loader, **self._arguments, resume=keep)

    def calibrate(self, model: nn.Module, like: Statistics) -> Statistics:
        """Collect the statistics of a trained copy with the settings used for the dense model."""
        objective = self._gradients
        methods = [cut.removeprefix("cut:") for cut in like.cuts]
        return calibrate(
            model,
            self.calibration_loader,
            max_images=like.images,
            collect=like.settings.collect,
            gamma=like.settings.gamma,
            token_fraction=like.settings.token_fraction,
            sensitivity=True if methods else "noise" if like.sensitive else False,
            methods=methods or None,
            gradients=objective is not None,
            loss=None if objective is None else objective.loss,
            amp=None if objective is None else objective.amp,
        )


def filled(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits in the form that the functions of budgets take."""
    return {**limits, "min_keep": limits["min_keep"] or {}}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it, or as text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
