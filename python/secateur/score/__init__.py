"""Importance criteria, one module each: a score per unit of a group; the lowest are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from ..anatomy import Group
from ..errors import InvalidArgument
from ..statistics import Float, Statistics
from . import snp


class Method(Protocol):
    """What a module of this package offers."""

    NAME: str
    OPTIONS: Mapping[str, tuple[str, ...]]

    def score(self, model: nn.Module, statistics: Statistics, group: Group, options: Mapping[str, str]) -> Float:
        """Importance of the group's units, (heads, size); (1, size) where the group is not per head."""


_METHODS: dict[str, Method] = {module.NAME: module for module in (snp,)}


def methods() -> list[str]:
    """Names that ``plan(method=)`` takes."""
    return sorted(_METHODS)


def method_named(name: str) -> Method:
    """The method with this name.

    Raises:
        InvalidArgument: there is none.
    """
    if name not in _METHODS:
        raise InvalidArgument(f"method: expected one of {', '.join(methods())}, got {name!r}")
    return _METHODS[name]
