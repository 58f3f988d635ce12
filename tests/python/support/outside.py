"""Packages of someone else's, as pip would install them, and what docs/extending shows of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from launch import run_script

DOCS = next(parent for parent in Path(__file__).parents if parent.name == "tests").parent / "docs" / "extending"


def installed(folder: Path, modules: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]]) -> Path:
    """A folder for sys.path with these modules and the metadata of a package that has these entry points by group."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    metadata = folder / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return folder


def documented(page: str) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The module of a page of docs/extending, and the entry point that it shows."""
    text = (DOCS / page).read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if block.startswith('"""'))
    name = re.match(r'"""(\w+)\.py"""', code)
    shown = re.search(r'```toml\n\[project\.entry-points\."([\w.]+)"\]\n"?([\w.]+)"? = "([\w.:]+)"\n```', text)
    assert name is not None
    assert shown is not None
    group, entry, value = shown.groups()
    return {name[1]: code}, {group: {entry: value}}


def run(folder: Path, script: str) -> None:
    """Run a script in a process of its own, with the folder on its path."""
    text = f"import sys\nsys.path.insert(0, sys.argv[1])\n{textwrap.dedent(script)}"
    code, _, errors = run_script(text, folder, fresh=True)
    assert code == 0, errors
