"""The engines by name."""

from __future__ import annotations

from typing import TypeVar

from ...engines import RUNTIMES
from ...errors import InvalidArgument
from .base import Runtime

__all__ = ["RUNTIMES", "chosen", "register"]

R = TypeVar("R", bound=type[Runtime])


def register(cls: R) -> R:
    """Register an engine; for use as a decorator.

    Raises:
        InvalidArgument: it lacks something, or its name is taken.
    """
    return RUNTIMES.register(cls)


def chosen(
    runtime: str | None,
    compile: bool = False,  # noqa: A002  # torch's own word for it
    argument: str = "runtime",
) -> Runtime:
    """The engine of this name, "torch" by default; ``compile`` is another word for "torch.compile".

    Raises:
        InvalidArgument: no such engine, which is said of ``argument``, or both of the others.
    """
    if compile and runtime is not None:
        raise InvalidArgument(f"compile, runtime: expected one of them, got compile=True and runtime={runtime!r}")
    name = "torch.compile" if compile else "torch" if runtime is None else runtime
    return RUNTIMES.named(name, argument)
