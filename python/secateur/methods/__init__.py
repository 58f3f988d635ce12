"""Pruning methods, one module each: criteria that select, and closed forms that change weights."""

import sys
from types import ModuleType

from .base import Bound, Handler, Method
from .registry import methods, register

__all__ = ["Bound", "Handler", "Method", "methods", "register"]


class _Callable(ModuleType):
    """This package, which ``secateur.methods()`` calls: importing it puts it in that function's place."""

    def __call__(self) -> list[str]:
        return methods()


sys.modules[__name__].__class__ = _Callable
