"""JSON documents: read within a bound of memory, and written the same way each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .container import _MAX_TEXT, parse


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, in memory of at most its size and 64 MiB.

    Raises:
        ValueError: it is no JSON, or too large or nested too deeply to be a file of secateur's; or no UTF-8 text.
    """
    size = path.stat().st_size
    if size > _MAX_TEXT:
        raise ValueError(f"one of {size:,} bytes, more than {_MAX_TEXT:,}")
    data = path.read_bytes()
    # One wide character makes all of a string wide. secateur's own files are ASCII.
    if len(data) > _MAX_TEXT // 10 and not data.isascii():
        raise ValueError(f"one of {size:,} bytes with characters beyond ASCII")
    return parse(data.decode())
