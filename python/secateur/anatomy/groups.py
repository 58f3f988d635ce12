"""Units that can only be removed together, and where in the model each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


Kind = Literal["qk", "v", "ffn", "heads", "width", "conv", "block"]


Role = Literal["writer", "reader", "norm", "elementwise"]


@dataclass(frozen=True)
class Member:
    """One axis of one parameter that loses entries when its group does.

    Unit u of the group is entry ``offset + u`` of axis ``dim``; in a per-head group u = head · size + i. A ``shared``
    parameter (a query/key norm) has one entry per i that serves every head; it is given one per head when cut.
    Role ``writer`` produces the units (and is scored), ``reader`` consumes them, ``norm`` normalises over them.
    """

    module: str
    parameter: str
    dim: int
    role: Role
    offset: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Group:
    """Units that can only leave together, with every parameter axis they live in.

    ``size`` counts units per head where ``per_head``, else all of them. Kept counts are multiples of ``multiple``.
    The units of kind "heads" are the heads of one attention layer: they live where the units of the per-head groups do
    that name them as ``heads_group``. A group of kind "block" is one attention or FFN layer, with size 1: it is the
    only kind of which nothing may stay, and takes ``modules`` with it.
    """

    name: str
    kind: Kind
    block: int | None
    size: int
    members: tuple[Member, ...]
    heads: int = 1
    per_head: bool = False
    multiple: int = 1
    heads_group: str | None = None
    modules: tuple[str, ...] = ()

    @property
    def least(self) -> int:
        """Fewest units that can stay."""
        return 0 if self.kind == "block" else 1


def parameter_name(module: str, parameter: str) -> str:
    """Dotted name of a module's parameter; the model itself is module ''."""
    return f"{module}.{parameter}" if module else parameter
