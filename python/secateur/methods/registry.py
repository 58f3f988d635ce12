"""Finds methods by name and checks their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import check
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
    return check.options(method.Options, given)
