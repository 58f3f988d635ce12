"""JSON documents: read within a limit on memory, and always written in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .container import _MAX_TEXT, parse


def read_json(path: Path) -> Any:
    """Return the values in a JSON file, using at most its size and 64 MiB of memory.

    Raises:
        ValueError: it is not UTF-8 text, not JSON, or too large or nested too deeply for a secateur file.
    """
    size = path.stat().st_size
    if size > _MAX_TEXT:
        raise ValueError(f"one of {size:,} bytes, more than {_MAX_TEXT:,}")
    data = path.read_bytes()
    # One wide character makes every character of a string wide. secateur's own files are ASCII.
    if len(data) > _MAX_TEXT // 10 and not data.isascii():
        raise ValueError(f"one of {size:,} bytes with characters beyond ASCII")
    return parse(data.decode())
