"""The command line starts without torch, and every option says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer
from launch import run_script
from secateur.anatomy.kinds import KINDS
from secateur.cli import lazy
from secateur.cli.app import app

COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}
# What takes seconds to import.
HEAVY = ("torch", "timm", "numpy", "secateur._core")
REPORT = "import json, sys; sys.stderr.write(json.dumps(sorted(sys.modules)))"


def imported(code: str) -> set[str]:
    """What a new interpreter has imported after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr))


def test_help_and_version_import_no_torch() -> None:
    """Of the whole, and of every command, in one process: none needs what another has imported."""
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    found = imported(f"from secateur.cli import main\nfor call in {calls}: assert main(call) == 0, call")
    assert "secateur.cli.plan" in found
    assert found.isdisjoint(HEAVY), found.intersection(HEAVY)


def test_importing_the_package_imports_no_torch_until_a_name_is_used() -> None:
    found = imported("import secateur")
    assert found.isdisjoint(HEAVY)
    used = imported("import secateur\nassert callable(secateur.inspect)")
    assert {"torch", "secateur.families.registry"} <= used
    # Where torch and timm are there already, as they are after the import above.
    code, _, report = run_script(f"import secateur\nassert callable(secateur.data.loader)\n{REPORT}", fresh=True)
    assert code == 0, report
    assert "secateur.data.loader" in json.loads(report)


@pytest.mark.parametrize(
    "imports", ["secateur, timm", "timm, secateur", "timm.models, secateur", "secateur, timm.models"]
)
def test_timm_knows_the_entry_points_where_both_are_imported(imports: str) -> None:
    """In any order, once, and timm's module is what it is without secateur."""
    code = (
        f"import {imports}, importlib, sys\n"
        "assert timm.list_models('secateur_*') == ['secateur_cnn', 'secateur_swin', 'secateur_vit']\n"
        "importlib.reload(secateur)\n"
        "assert type(timm.models.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "assert len([each for each in sys.meta_path if type(each).__module__.startswith('secateur')]) == 1\n"
    )
    found = imported(f"import warnings\nwarnings.simplefilter('error', UserWarning)\n{code}")
    assert "secateur.exports.timm_entry" not in found


def test_names_for_later_are_there_when_they_are_asked_for() -> None:
    assert sorted(lazy._MODULES) == lazy.__all__
    for name in lazy.__all__:
        assert getattr(lazy, name) is not None
    with pytest.raises(AttributeError, match=r"^module 'secateur.cli.lazy' has no attribute 'nothing'$"):
        lazy.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_has_one_line_of_help(name: str) -> None:
    command = typer.main.get_command(app).commands[name]
    assert command.help.partition("\n")[0].endswith(".")
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        text = parameter.help
        assert text, parameter.name
        assert text.endswith((".", "...")), text
        assert "\n" not in text
        assert text[0].isupper() or text.startswith(("exact", "scores")), text


def test_the_groups_that_help_lists_are_all_kinds() -> None:
    for name in ("plan", "search"):
        (groups,) = [each for each in typer.main.get_command(app).commands[name].params if each.name == "groups"]
        assert groups.help.endswith(f": {', '.join(KINDS)}.")
