"""Finds methods by name and checks their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .. import check
from ..errors import InvalidArgument
from ..registry import Registry
from .base import Method

__all__ = ["method_named", "methods", "options_of", "register"]

registry: Registry[Method] = Registry("method", "secateur.methods", "secateur.methods", members=("handlers", "paper"))
register = registry.register


def methods() -> list[str]:
    """Return the names that ``plan(method=)`` takes."""
    return registry.names()


def method_named(name: str) -> Method:
    """Return the method with this name.

    Raises:
        InvalidArgument: there is none.
    """
    return registry.named(name)


def options_of(method: Method, given: Mapping[str, Any]) -> Any:
    """Return a method's options, with defaults for those that are not given.

    Raises:
        InvalidArgument: an unknown option, or a value that it does not take.
    """
    hints = get_type_hints(method.Options)
    names = [each.name for each in fields(method.Options)]
    for name, value in given.items():
        if name not in names:
            raise InvalidArgument(f"options: expected {', '.join(names) or 'none'}, got {name!r}")
        _check(name, value, hints[name])
    return method.Options(**given)


def _check(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InvalidArgument(f"{name}: expected one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
    elif kind is float:
        check.number(name, value, low=float("-inf"))
    elif kind is int:
        check.integer(name, value, 0)
    elif not isinstance(value, kind):
        raise InvalidArgument(f"{name}: expected {kind.__name__}, got {value!r}")
