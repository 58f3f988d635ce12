"""The interface of every method: errors at each size, and the decision at the chosen sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..anatomy import Anatomy, Group, Indices, Kind
from ..errors import InvalidArgument
from ..statistics.settings import Float
from ..statistics.statistics import Statistics
from .weights import Weights

__all__ = ["ALL_KINDS", "Bound", "Decision", "Handler", "Method", "NoOptions", "Prepared", "Remainder"]

# What most methods cut.
ALL_KINDS: tuple[Kind, ...] = ("qk", "v", "ffn", "conv", "heads", "width", "layer")
# Heads are decided before values, since values are refitted when a head is removed.
_ORDER = ("heads", "qk", "v", "ffn")


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none."""


@dataclass(frozen=True)
class Decision:
    """What stays (indices by group), and what changes: parameters, in their size after the cut, and norms."""

    keep: Mapping[str, Indices]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    uncentred: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Remainder:
    """What a writer is to add besides what it writes now: Cov(z, y − W z), (inputs, outputs) float64, over all rows.

    z is the writer's input, W its weight, y what it should write. ``folds`` holds the same of each fold, none if a fold
    is empty.
    """

    total: Tensor
    folds: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Bound:
    """One model with its statistics, and the options of the method that plans for it.

    ``remainders`` maps writers to what they are fitted to beyond their own output; without one, a refit preserves the
    output as it is.
    """

    model: nn.Module
    anatomy: Anatomy
    statistics: Statistics
    options: Any
    remainders: Mapping[str, Remainder] = field(default_factory=dict)


class Handler(ABC):
    """What a method does with the groups of one kind.

    With ``follows_heads``, it is also called for groups that stay whole if heads of their layer are removed.
    """

    follows_heads: ClassVar[bool] = False

    @abstractmethod
    def errors(self, group: Group) -> Float | None:
        """Return the share of the group's output lost when 0 … size units stay, (size + 1,); None if unknown."""

    @abstractmethod
    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Choose the ``count`` units of each head that stay, (heads, count), and change the weights accordingly."""


class Method(ABC):
    """A pruning method; a subclass registers itself with ``methods.register``.

    ``paper`` names its source, and ``source`` says whether the method is the paper's or in its style; ``needs`` names
    what ``calibrate`` has to collect for it: "scores", "moments" or "gradients", or nothing for a method that looks at
    weights alone. ``cuts`` names the kinds that it has handlers for. ``Options`` is a frozen dataclass of its options,
    each described in one line by its field's ``metadata["help"]``. With ``changes_weights`` the plan holds new weights.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str] = "not stated"
    cuts: ClassVar[tuple[Kind, ...]] = ALL_KINDS
    Options: ClassVar[type] = NoOptions
    needs: ClassVar[tuple[str, ...]] = ()
    changes_weights: ClassVar[bool] = False

    @abstractmethod
    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return the handler of each kind; kinds without one cannot be cut by this method.

        Raises:
            InvalidArgument: the statistics lack what the method needs.
        """

    def prepare(self, bound: Bound) -> Prepared:
        """Bind the method to a model and its statistics.

        Raises:
            InvalidArgument: the statistics lack what the method needs.
        """
        return Prepared(bound, self.handlers(bound))


class Prepared:
    """A method bound to one model and its statistics."""

    def __init__(self, bound: Bound, handlers: Mapping[Kind, Handler]) -> None:
        self._bound, self._handlers = bound, handlers
        self._errors: dict[str, Float | None] = {}

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of groups that the method cuts."""
        return frozenset(self._handlers)

    def errors(self, group: Group) -> Float | None:
        """Return the share of the group's output lost when 0 … size units stay, (size + 1,); None if unknown."""
        if group.name not in self._errors:
            self._errors[group.name] = self._handler(group).errors(group)
        return self._errors[group.name]

    def decide(self, sizes: Mapping[str, int]) -> Decision:
        """Choose what stays at these sizes, layer by layer in the order of a forward pass."""
        anatomy = self._bound.anatomy
        weights = Weights(self._bound.model, anatomy)
        keep = weights.keep
        for name, layer in anatomy.layers.items():
            if not sizes.get(name, 1):
                keep[name] = np.empty((1, 0), np.int64)
                continue
            for kind in sorted(layer.groups, key=_ORDER.index):
                group = anatomy.group(layer.groups[kind])
                smaller = sizes[group.name] < group.size
                # A method of heads alone has nothing to do with the neurons of heads that leave.
                follows = self._handlers.get(group.kind) if group.within in keep else None
                handler = self._handler(group) if smaller else follows
                if handler is not None and (smaller or handler.follows_heads):
                    kept = handler.cut(weights, group, sizes[group.name])
                    if smaller:
                        keep[group.name] = kept
        # The means of removed layers come last, added to the biases that earlier layers have by then.
        for name in anatomy.layers:
            if name in keep:
                group = anatomy.group(name)
                self._handler(group).cut(weights, group, 0)
        for group in anatomy.groups:
            inside = group.name in anatomy.layers or group.name in anatomy.layer_of
            if not inside and sizes[group.name] < group.size:
                # Units without weights (tokens to merge) are all alike: the images decide which.
                alike = np.arange(sizes[group.name], dtype=np.int64)[None]
                keep[group.name] = (
                    self._handler(group).cut(weights, group, sizes[group.name]) if group.members else alike
                )
        return Decision(dict(keep), weights.finish(), weights.eps, tuple(weights.uncentred))

    def _handler(self, group: Group) -> Handler:
        if group.kind not in self._handlers:
            kinds = ", ".join(self._handlers)
            raise InvalidArgument(f"groups: expected kinds that this method cuts ({kinds}), got {group.kind!r}")
        return self._handlers[group.kind]
