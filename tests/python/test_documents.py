"""What the README and the documents say is true: examples run, names exist, figures are the tests'."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import secateur as sc
from secateur.cli import app as cli
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs/api.md").read_text()


def test_the_readme_example_runs_as_it_stands(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "MACs at 3x32x32" in run.stdout
    assert "top-1" in run.stdout
    assert (tmp_path / "pruned.safetensors").is_file()


def test_the_readme_command_lines_are_understood():
    """Every option named in the README is one of its command's."""
    commands = [shlex.split(line) for line in README.splitlines() if line.startswith("secateur ")]
    assert len(commands) == 5
    for words in commands:
        shown = CliRunner().invoke(cli.app, [words[1], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{words[1]} {option}"


@pytest.mark.parametrize(
    "name", sorted(set(sc.__all__) - {"Error", "InvalidArgument", "NumericalError", "Unsupported"})
)
def test_every_public_name_is_documented(name):
    assert re.search(rf"`(?:sc\.)?{name}\b", API), f"docs/api.md does not name {name}"
    assert inspect.getdoc(getattr(sc, name))


@pytest.mark.parametrize(
    "function", [sc.calibrate, sc.plan, sc.prune, sc.save, sc.load, sc.finetune, sc.bench, sc.search]
)
def test_every_argument_is_documented(function):
    documented = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^\s+\**{name}:", documented, re.MULTILINE), f"{function.__name__} does not describe {name}"


def test_every_promise_names_a_test_that_is_there():
    text = (ROOT / "docs/guarantees.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, test in named:
        sources = [path.read_text() for path in (ROOT / "tests/python").rglob(file)]
        assert any(f"def {test or 'test_'}" in source for source in sources), f"{file} has no {test}"


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`(tests/[\w/]+\.py)`", README):
        assert (ROOT / path).is_file(), path
