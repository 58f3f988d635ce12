"""Checks arguments before anything is done, with the same error texts everywhere."""

from __future__ import annotations

import importlib.util
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints, overload

from .errors import InvalidArgument

__all__ = ["choice", "fraction", "integer", "new_folder", "number", "options", "packages", "writable"]


T = TypeVar("T")


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


def choice(argument: str, value: object, known: Sequence[str]) -> None:
    """Refuse anything but these names.

    Raises:
        InvalidArgument: another value; the text names the argument and what it can be.
    """
    if value not in known:
        names = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise InvalidArgument(f"{argument}: expected {names}, got {value!r}")


def writable(argument: str, path: object, *, folder: bool = False) -> Path:
    """Return the path of a file that can be written: its folder exists and is writable, and it is not a folder.

    With ``folder`` it may be one, but not a file.

    Raises:
        InvalidArgument: it is something else.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgument(f"{argument}: expected a file in an existing folder, got {path!r}")
    found = Path(path)
    if not found.parent.is_dir() or (found.is_file() if folder else found.is_dir()):
        kind = "folder" if folder else "file"
        raise InvalidArgument(f"{argument}: expected a {kind} in an existing folder, got {found}")
    if not os.access(found.parent, os.W_OK):
        raise InvalidArgument(f"{argument}: expected a folder that can be written, got {found.parent}")
    return found


def new_folder(argument: str, path: object) -> Path:
    """Return the path of a folder that can be made: there is none, or an empty one, and the one above is writable.

    Raises:
        InvalidArgument: it is something else.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgument(f"{argument}: expected a new or empty folder in an existing one, got {path!r}")
    found = Path(path)
    usable = not any(found.iterdir()) if found.is_dir() and not found.is_symlink() else not os.path.lexists(found)
    if not found.name or not found.parent.is_dir() or not usable:
        raise InvalidArgument(f"{argument}: expected a new or empty folder in an existing one, got {found}")
    if not os.access(found.parent, os.W_OK):
        raise InvalidArgument(f"{argument}: expected a folder that can be written, got {found.parent}")
    return found


def options(kind: type[T], given: Mapping[str, Any]) -> T:
    """Return a frozen dataclass of options, with defaults for those that are not given.

    Raises:
        InvalidArgument: an unknown option, or a value that it does not take.
    """
    hints = get_type_hints(kind)
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    for name in given:
        if name not in names:
            raise InvalidArgument(f"options: expected {', '.join(names) or 'none'}, got {name!r}")
    return kind(**{name: _option(name, value, hints[name]) for name, value in given.items()})


def packages(argument: str, extra: str, *names: str) -> Any:
    """Import packages that an extra of secateur brings, and return the last.

    Raises:
        InvalidArgument: some are not installed; the text names them and the command that installs them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        command = f"pip install 'secateur[{extra}]'"
        raise InvalidArgument(f"{argument}: expected {', '.join(missing)} to be installed ({command}), got none")
    return [import_module(name) for name in names][-1]


def _option(name: str, value: Any, kind: Any) -> Any:
    if kind is Any:  # a class since Python 3.11, but no one's
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InvalidArgument(f"{name}: expected one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
    elif get_origin(kind) is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
            raise InvalidArgument(f"{name}: expected a sequence of numbers, got {value!r}")
        return tuple(_option(name, each, get_args(kind)[0]) for each in value)
    elif kind is float:
        return number(name, value, low=-math.inf)
    elif kind is int:
        return integer(name, value, 0)
    elif kind is not Any and isinstance(kind, type) and not isinstance(value, kind):
        raise InvalidArgument(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


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
