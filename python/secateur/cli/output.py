"""What a command says: text for people or one JSON object, and the option that a file was named by."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import Error, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Output", "collected", "named"]


class Output:
    """Either text for people or one JSON object."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.fields: dict[str, Any] = {}
        self._lines: list[Any] = []

    def show(self, *lines: Any, **fields: Any) -> None:
        """Add lines for people (strings, or what rich prints) and fields for JSON."""
        self._lines += lines
        self.fields |= fields

    def flush(self) -> None:
        """Print one or the other on stdout."""
        # Of several ranks one speaks.
        if not self.fields and not self._lines:
            return
        if self._as_json:
            sys.stdout.write(json.dumps(self.fields) + "\n")
            return
        console = Console()
        for line in self._lines:
            console.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))


@contextlib.contextmanager
def collected(as_json: bool) -> Iterator[Output]:
    """Collect what a command has to say, and print it at the end; what a library prints meanwhile goes to stderr."""
    output = Output(as_json)
    with contextlib.redirect_stdout(sys.stderr):
        yield output
    output.flush()


@contextlib.contextmanager
def named(option: str) -> Iterator[None]:
    """Name the option of a file that cannot be read.

    Raises:
        InvalidArgument: the block raised an `Error` or an OSError.
    """
    try:
        yield
    except (Error, OSError) as error:
        raise InvalidArgument(f"{option}: {str(error).removeprefix('path: ')}") from error
