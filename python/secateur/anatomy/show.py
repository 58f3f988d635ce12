"""Formats counts and tables as text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def units(count: int) -> str:
    """Format a count in thousands, millions or billions, with at least three digits."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.{3 if unit == 'G' else 2}f} {unit}"
    return str(count)


def render(table: Table) -> str:
    """Draw a rich table as plain text."""
    console = Console(file=io.StringIO(), width=120, color_system=None, legacy_windows=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
