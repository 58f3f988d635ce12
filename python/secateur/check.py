"""Checks arguments before anything is done, with the same error texts everywhere."""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path
from typing import Literal, overload

from .errors import InvalidArgument

__all__ = ["fraction", "integer", "number", "writable"]


@overload
def integer(argument: str, value: object, least: int = 1, *, optional: Literal[False] = False) -> int: ...
@overload
def integer(argument: str, value: object, least: int = 1, *, optional: Literal[True]) -> int | None: ...
def integer(argument: str, value: object, least: int = 1, *, optional: bool = False) -> int | None:
    """Return an integer of at least ``least``, or None if ``optional``. NumPy's integers count, bools do not.

    Raises:
        InvalidArgument: it is something else.
    """
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InvalidArgument(f"{argument}: expected an integer of at least {least}, got {value!r}")
    return int(value)


def fraction(
    argument: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = 1.0,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return a number between ``low`` and ``high``, excluding the ends that are open.

    Raises:
        InvalidArgument: it is something else.
    """
    found = _finite(value)
    if found is None or not (low < found if open_low else low <= found) or not _below(found, high, open_high):
        limits = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise InvalidArgument(f"{argument}: expected a fraction in {limits}, got {value!r}")
    return found


def number(argument: str, value: object, *, low: float = 0.0, high: float = math.inf, open_low: bool = False) -> float:
    """Return a finite number of at least ``low`` (more than ``low`` with ``open_low``) and at most ``high``.

    Raises:
        InvalidArgument: it is something else.
    """
    found = _finite(value)
    if found is None or not (low < found if open_low else low <= found) or found > high:
        limits = f"more than {low:g}" if open_low else f"at least {low:g}"
        limits += "" if high == math.inf else f" and at most {high:g}"
        raise InvalidArgument(f"{argument}: expected a number of {limits}, got {value!r}")
    return found


def writable(argument: str, path: object) -> Path:
    """Return the path of a file that can be written: its folder exists and is writable, and it is not a folder.

    Raises:
        InvalidArgument: it is something else.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgument(f"{argument}: expected a file in an existing folder, got {path!r}")
    found = Path(path)
    if not found.parent.is_dir() or found.is_dir():
        raise InvalidArgument(f"{argument}: expected a file in an existing folder, got {found}")
    if not os.access(found.parent, os.W_OK):
        raise InvalidArgument(f"{argument}: expected a folder that can be written, got {found.parent}")
    return found


def _below(value: float, high: float, open_high: bool) -> bool:
    return value < high if open_high else value <= high


def _finite(value: object) -> float | None:
    # Python accepts bools as numbers; here they are a mistake.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
