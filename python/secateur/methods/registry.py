"""Methods, one module each: importance criteria that select, and closed forms that change weights."""

from __future__ import annotations

from ..errors import InvalidArgument
from . import project, refit, snp
from .base import Method

__all__ = ["method_named", "methods"]

_METHODS: dict[str, Method] = {module.NAME: module for module in (snp, refit, project)}


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
