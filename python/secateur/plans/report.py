"""The report of what a cut changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from ..anatomy.show import render


@dataclass(frozen=True)
class Report:
    """What a cut changed: each pair is (before, after); ``groups`` is by name, with sizes per head where they apply."""

    params: tuple[int, int]
    macs: tuple[int, int]
    groups: Mapping[str, tuple[int, int]]

    @property
    def blocks(self) -> list[dict[str, tuple[int, int]]]:
        """For each block, kind to (before, after)."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, pair in self.groups.items():
            block, _, kind = name.rpartition(".")
            if block:
                found.setdefault(block, {})[kind] = pair
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "params": list(self.params),
            "macs": list(self.macs),
            "groups": {name: list(pair) for name, pair in self.groups.items()},
        }

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE)
        for column in ("", "before", "after", "kept"):
            table.add_column(column, justify="right" if column else "left")
        for name, (before, after) in (("parameters", self.params), ("MACs", self.macs)):
            table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
        for name, (before, after) in self.groups.items():
            if before == after and name.endswith((".heads", ".attn", ".mlp", ".tokens")):
                continue
            table.add_row(name, str(before), str(after), f"{after / before:.1%}")
        return render(table)
