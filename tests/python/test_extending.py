"""What docs/extending.md shows runs as it stands: after an import, and through an entry point alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import secateur as sc

PAGE = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text()
EXAMPLES = re.findall(
    r'```python\n("""(\w+)\.py""".*?)```\n+```python\n(.*?)```\n+```toml\n(\[project\.entry-points.*?)```',
    PAGE,
    re.DOTALL,
)


def test_there_are_examples_of_a_readable_length():
    assert [name for _, name, _, _ in EXAMPLES] == ["outside_method", "outside_family", "outside_exporter"]
    for code, _, _, _ in EXAMPLES:
        assert 20 <= len([line for line in code.splitlines() if line.strip()]) <= 40


@pytest.mark.parametrize("by", ["import", "entry point"])
@pytest.mark.parametrize(("code", "name", "use", "entry"), EXAMPLES, ids=[name for _, name, _, _ in EXAMPLES])
def test_an_example_runs(code, name, use, entry, by, tmp_path):
    (tmp_path / f"{name}.py").write_text(code)
    if by == "import":
        use = f"import {name}\n{use}"
    else:
        group, key, value = re.match(r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "([\w.:]+)"', entry).groups()
        metadata = tmp_path / "outside-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{key} = {value}\n")
    (tmp_path / "use.py").write_text(use)
    # What is run is this package, wherever it was imported from.
    folders = [str(tmp_path), str(Path(sc.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
