"""What all trained methods have in common: a budget, a run of the training loop, and a plan at its end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from .. import core
from ..anatomy import Anatomy, Group, Kind
from ..anatomy.fingerprint import Fingerprint
from ..budgets.allocate import check_target
from ..budgets.budget import Allocation
from ..budgets.limits import AUTO, limits_of, recorded
from ..budgets.ratios import counts_from_ratios
from ..budgets.target import Target
from ..errors import InvalidArgument
from ..families.registry import inspect
from ..latency.table import LatencyTable
from ..methods.base import Decision, NoOptions
from ..plans.make import check_allocation, check_budget, sizes_for
from ..plans.on_the_clock import LatencyReport, any_multiple, loaded, table_for, with_steps
from ..plans.plan import Plan
from ..statistics.settings import Float
from ..training.hooks import LoopHook

__all__ = ["TrainedMethod", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """How much is to be removed, and where: arguments of `plan`, of which one of ``target`` and ``ratios`` is given.

    Raises:
        InvalidArgument: both are given, or neither, or something else is no such argument.
    """

    target: Target | None = None
    ratios: Mapping[str, float] | str | Path | None = None
    groups: Iterable[str] | None = None
    freeze: Iterable[str] = ()
    min_keep: Mapping[str, int] | None = None
    round_to: int | Literal["auto"] | Mapping[str, int] | None = None
    allocation: str | None = None
    latency_table: LatencyTable | str | Path | None = None
    batch_size: int | None = None
    runtime: str | None = None

    def __post_init__(self) -> None:
        check_allocation(self.allocation, ("error", "uniform"))
        timing = self.latency_table, self.batch_size, self.runtime
        check_budget(self.target, self.ratios, self.allocation, *timing, self.round_to)
        if self.round_to == AUTO:
            object.__setattr__(self, "latency_table", loaded(self.latency_table))
        for name, value in limits_of(self.groups, self.freeze, self.min_keep, self.round_to).items():
            object.__setattr__(self, name, value)
        self.limits()

    def limits(self, anatomy: Anatomy | None = None) -> dict[str, Any]:
        """Which groups may be cut, and to which counts: "auto" if the table with the steps is still to be measured."""
        limits = limits_of(self.groups, self.freeze, self.min_keep, self.round_to)
        return (
            with_steps(limits, self.latency_table, anatomy) if isinstance(self.latency_table, LatencyTable) else limits
        )

    def cut(self, anatomy: Anatomy) -> list[Group]:
        """The groups that may lose units.

        Raises:
            InvalidArgument: a name that does not fit the model, or a budget that cannot be met.
            Unsupported: a kind that the model cannot lose.
        """
        limits = self.limits(anatomy)
        if self.target is not None:
            # What is out of reach of all sizes is out of reach of multiples that are not measured yet.
            return check_target(anatomy, self.target, **any_multiple(limits))
        assert self.ratios is not None
        sizes = counts_from_ratios(anatomy, self.ratios, **limits)
        return [group for group in anatomy.groups if sizes[group.name] < group.size]

    def sizes(
        self, model: nn.Module, anatomy: Anatomy, method: TrainedMethod
    ) -> tuple[Allocation, LatencyReport | None, dict[str, Any]]:
        """The units of each group that stay, what became of a target for latency, which is measured, and the limits."""
        table, limits = None, self.limits(anatomy)
        if self.target is not None and self.target.latency is not None:
            where = loaded(self.latency_table), self.batch_size, self.runtime
            table = table_for(model, anatomy, self.target, limits, *where)
            limits = with_steps(limits, table)
        losses = method.losses if self.allocation == "error" else None
        found, latency = sizes_for(model, anatomy, self.target, self.ratios, limits, losses=losses, table=table)
        return found, latency, limits

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: what a run must be continued with."""
        ratios = dict(self.ratios) if isinstance(self.ratios, Mapping) else self.ratios
        return {
            "target": None if self.target is None else vars(self.target),
            "ratios": str(ratios) if isinstance(ratios, Path) else ratios,
            **self.limits(),
        }


class TrainedMethod(LoopHook):
    """A hook of the training loop that ends in a plan; a subclass registers itself with ``trained.registry.register``.

    It is made by `trained_method`, given to `finetune`, and asked for its `plan` when that has returned. ``paper``
    names the method's source, ``Options`` is a frozen dataclass of what it takes, a field's ``metadata["help"]`` a line
    about it. ``kinds`` are the kinds of units that it can remove.
    """

    paper: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    kinds: ClassVar[tuple[Kind, ...]]

    def __init__(self, wanted: Wanted | None = None, options: Any = None) -> None:
        # What a registry holds has no budget.
        self._wanted = wanted
        self.options = self.Options() if options is None else options
        self._model: nn.Module | None = None
        # Of the weights that the last run ended with.
        self._fingerprint: Fingerprint | None = None

    @abstractmethod
    def attach(self, model: nn.Module, anatomy: Anatomy, groups: list[Group]) -> AbstractContextManager[Any]:
        """Return the context in which the model is trained, as `LoopHook.begin`; ``groups`` may lose units."""

    @abstractmethod
    def decide(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> Decision:
        """Choose what stays at these sizes, and the weights that then change; none is added.

        Raises:
            InvalidArgument: a group has a smaller size that was not trained to.
        """

    @abstractmethod
    def losses(self, group: Group) -> Float:
        """What is lost when 0 … size units of a group stay, (size + 1,): how allocation="error" shares out a target."""

    @property
    def wanted(self) -> Wanted:
        """The budget that it was made with."""
        assert self._wanted is not None, "a method for training has a budget"
        return self._wanted

    def settings(self) -> dict[str, Any]:
        """Options and budget."""
        return {"options": asdict(self.options), **self.wanted.to_dict()}

    @contextmanager
    def begin(self, model: nn.Module) -> Iterator[Any]:
        """Check that the budget can be met on this model, and attach to it.

        Raises:
            InvalidArgument: it cannot, or names kinds of units that the method does not remove.
            Unsupported: the model is of no family, or the method does not know what to do with it.
        """
        self._model = self._fingerprint = None
        anatomy = inspect(model)
        groups = self.wanted.cut(anatomy)
        self._require_kinds(groups)
        with self.attach(model, anatomy, groups) as parameters:
            yield parameters
        self._model, self._fingerprint = model, Fingerprint.of(model, anatomy)

    @core.host_by_default()
    def plan(self, *, target: Target | None = None, ratios: Mapping[str, float] | str | Path | None = None) -> Plan:
        """Choose which units stay, by what was learnt; for use when `finetune` has returned, and before `prune`.

        The plan is for the model that was trained. It has the weights that the model was trained with; without the
        plan they are worth little, for what the method had put in was taken out at the end of `finetune`.

        Args:
            target: another budget than the method was made with.
            ratios: other ratios.

        Raises:
            InvalidArgument: there was no run, or none that came to its end; the model has other weights since; a budget
                that cannot be met, or one for groups that were not trained.
        """
        if self._model is None or self._fingerprint is None:
            raise InvalidArgument(f"plan: expected {self.name!r} in the hooks of a finetune that ended, got none")
        wanted = self.wanted
        if target is not None or ratios is not None:
            wanted = replace(wanted, target=target, ratios=ratios, allocation=wanted.allocation if target else None)
        model, anatomy = self._model, inspect(self._model)
        fingerprint = Fingerprint.of(model, anatomy)
        self._fingerprint.require(fingerprint, "model", strict=True)
        self._require_kinds(wanted.cut(anatomy))
        allocation, latency, limits = wanted.sizes(model, anatomy, self)
        decision = self.decide(model, anatomy, allocation.sizes)
        return Plan(
            method=self.name,
            options={
                **asdict(self.options),
                "target": None if wanted.target is None else vars(wanted.target),
                "round_to": recorded(limits["round_to"]),
            },
            fingerprint=fingerprint,
            keep=decision.keep,
            params=(anatomy.params, anatomy.params_at(allocation.sizes)),
            macs=(anatomy.macs, anatomy.macs_at(allocation.sizes)),
            weights=decision.weights,
            eps=decision.eps,
            uncentred=decision.uncentred,
            latency=latency,
        )

    def _require_kinds(self, groups: Iterable[Group]) -> None:
        for group in groups:
            if group.kind not in self.kinds:
                raise InvalidArgument(
                    f"groups: expected kinds that {self.name!r} removes ({', '.join(self.kinds)}), got {group.kind!r}"
                )
