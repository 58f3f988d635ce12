"""Pruning methods, one module each: criteria that select units, and closed forms that change weights."""

import sys
from types import ModuleType

from .base import Bound, Handler, Method
from .registry import methods, register

__all__ = ["Bound", "Handler", "Method", "methods", "register"]


class _Callable(ModuleType):
    """This package as a module that can be called, so that ``secateur.methods()`` still works after its import."""

    def __call__(self) -> list[str]:
        return methods()


sys.modules[__name__].__class__ = _Callable
