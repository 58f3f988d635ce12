"""Groups of units that can only be removed together, and where each unit is in the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from .kinds import KINDS, Kind, Traits

Indices = npt.NDArray[np.int64]
Role = Literal["writer", "reader", "norm", "elementwise"]
# The part that a tensor plays in its layer: methods ask for rows by part, and only families know which module has them.
Part = Literal["query", "key", "value", "output", "hidden", "gate", "bias_table", "stream"]


def unit_entries(size: int, heads: int = 1, *, start: int = 0, copies: int = 1, stride: int = 0) -> Indices:
    """Return where units are along an axis, (heads, size, copies), head after head from ``start`` on.

    Each unit has ``copies`` entries, ``stride`` apart: for example the two rows of a gated unit, or the four entries of
    a channel after patch merging.
    """
    first = start + np.arange(heads * size, dtype=np.int64).reshape(heads, size, 1)
    return first + stride * np.arange(copies, dtype=np.int64)


def shared_entries(size: int, heads: int) -> Indices:
    """Return the entries of an axis that all heads share, as in a query/key norm: (heads, size, 1)."""
    return np.tile(np.arange(size, dtype=np.int64)[None, :, None], (heads, 1, 1))


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter or buffer that loses entries when its group loses units.

    ``tensor`` is its dotted name. ``entries``, (heads, units, k), says where along ``axis`` unit u of head h is: k = 1
    for a row, 2 for the two rows of a gated unit or a rotary pair, height · width after a flatten. Where all heads have
    the same entries they share them; when units are removed, each head gets its own copy. A ``writer`` produces the
    units (and is scored), a ``reader`` consumes them, a ``norm`` normalises over them, and ``elementwise`` acts on each
    of them alone.
    """

    tensor: str
    axis: int
    entries: Indices = field(repr=False)
    part: Part
    role: Role

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor; the model itself is ''."""
        return self.tensor.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The tensor's name within its module."""
        return self.tensor.rpartition(".")[2]

    @cached_property
    def shared(self) -> bool:
        """Whether all heads share the same entries."""
        return len(self.entries) > 1 and bool((self.entries == self.entries[:1]).all())

    @property
    def copies(self) -> int:
        """Number of entries of one unit."""
        return int(self.entries.shape[2])


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can only be removed together, with every axis they appear in.

    ``size`` counts units per head where the group has heads, else all units. Kept counts are multiples of ``multiple``.
    The units of kind "heads" are the heads of one attention layer; groups ``within`` it lose the units of a removed
    head. A group of kind "layer" is one attention or FFN layer, with size 1: it is the only kind that can be removed
    entirely, and its ``modules`` are removed with it. At least ``fewest`` units stay where that is more than the kind
    requires.
    """

    name: str
    kind: Kind
    block: int | None
    size: int
    members: tuple[Member, ...]
    heads: int = 1
    multiple: int = 1
    within: str | None = None
    modules: tuple[str, ...] = ()
    fewest: int = 0

    @property
    def traits(self) -> Traits:
        """The properties of its kind."""
        return KINDS[self.kind]

    @property
    def least(self) -> int:
        """The fewest units that can stay."""
        return max(self.traits.least, self.fewest)

    @property
    def per_head(self) -> bool:
        """Whether units are counted per head."""
        return self.within is not None

    @property
    def of_tokens(self) -> bool:
        """Whether its units are tokens, which have no weights."""
        return self.traits.shared and self.traits.counted

    def of(self, role: Role, part: Part | None = None, parameter: str = "weight") -> list[Member]:
        """Return its members with a role, and with a part if one is named, on their weights unless told otherwise."""
        return [
            member
            for member in self.members
            if member.role == role and part in (None, member.part) and member.parameter == parameter
        ]


def parameter_name(module: str, parameter: str) -> str:
    """Return the dotted name of a module's parameter; the model itself is module ''."""
    return f"{module}.{parameter}" if module else parameter


def named(groups: Iterable[Group], name: str) -> Group | None:
    """Return the group called ``name``, or None."""
    return next((group for group in groups if group.name == name), None)
