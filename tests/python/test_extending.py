"""What docs/extending.md shows runs as it stands: after an import, and through an entry point alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import secateur as sc
from launch import run_script

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
def test_an_example_runs(code, name, use, entry, by, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(code)
    if by == "import":
        use = f"import {name}\n{use}"
    else:
        group, key, value = re.match(r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "([\w.:]+)"', entry).groups()
        metadata = tmp_path / "outside-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{key} = {value}\n")
    monkeypatch.chdir(tmp_path)
    # What is run is this package, wherever it was imported from.
    folders = [str(tmp_path), str(Path(sc.__file__).parents[1])]
    start = f"import sys\nsys.path[:0] = {folders}\nassert 'secateur' not in sys.modules\n"
    done, _, errors = run_script(f"{start}import torch\ntorch.set_num_threads(1)\n{use}", fresh=True)
    assert done == 0, errors
