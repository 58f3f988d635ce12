"""What the documents say is true: examples run, commands, names, tests and links exist, the reference is the code's."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shlex
from pathlib import Path

import pytest
import secateur as sc
import torch
from launch import run_script
from secateur.cli import app as cli
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [page for page in DOCS if page.parent.name != "reference"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/RESULTS.md", *DOCS]
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
GENERATOR = ROOT / "docs/generate.py"
ERRORS = {"Error", "InvalidArgument", "NumericalError", "Unsupported"}


def named(page):
    return str(page.relative_to(ROOT))


def blocks(text, language):
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text):
    """The text without fenced code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """Commands of secateur in fenced shell code, as words; lines that end in a backslash go on."""
    lines = (line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines())
    found = [shlex.split(line, comments=True) for line in lines]
    words = [line[line.index("secateur") :] for line in found if "secateur" in line and "pip" not in line]
    return [line for line in words if len(line) > 1]


def anchors(text):
    """What GitHub makes of the headings."""
    seen, found = {}, set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


# --- Examples ---------------------------------------------------------------------------------------------------------


FEWER_DIGITS = """
import sklearn.datasets
every = sklearn.datasets.load_digits
sklearn.datasets.load_digits = lambda **arguments: tuple(array[::24] for array in every(**arguments))
"""


def test_the_readme_example_runs_as_it_stands(tmp_path, monkeypatch):
    """In a process that has not imported secateur; on every 24th digit, for what it prints is not about accuracy."""
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(README, "python")
    code, out, errors = run_script(FEWER_DIGITS + example, fresh=True)
    assert code == 0, errors
    assert "MACs at 3x32x32" in out
    assert "top-1" in out
    assert (tmp_path / "pruned.safetensors").is_file()


def test_the_readme_has_its_five_commands_and_fits_on_two_screens():
    assert [words[1] for words in commands(README)] == ["inspect", "calibrate", "plan", "prune", "bench"]
    assert len(README.splitlines()) <= 120


def test_the_tutorial_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """Its commands in one folder, in their order, then its Python; and the accuracy is what it is about."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    accuracy = []
    for words in commands(TUTORIAL):
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
        accuracy += map(float, re.findall(r"^top-1 ([\d.]+) %", capsys.readouterr().out, re.MULTILINE))
    dense, pruned, tuned = accuracy
    assert dense > 90
    assert pruned > dense - 3
    assert tuned > dense - 3
    with pytest.raises(sc.InvalidArgument, match="the least these groups reach"):
        sc.plan(sc.load("dense.safetensors"), sc.Statistics.load("stats.safetensors"), target=sc.Target(macs=0.1))
    (script,) = blocks(TUTORIAL, "python")
    exec(compile(script, "tutorial.md", "exec"), {})
    assert "tensor([" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_understood(page):
    """Every command of secateur in a document is one, with options that it has."""
    for words in commands(page.read_text()):
        if words[1].startswith("--"):
            words.insert(1, "")
        arguments = [words[1], "--help"] if words[1] else ["--help"]
        shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, words
        for option in (word for word in words[2:] if word.startswith("--")):
            assert re.search(rf"{option}\b", shown.output), f"{named(page)}: {words[1]} {option}"


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_python_is_python_and_its_names_exist(page):
    """Examples parse, and what they take of secateur is public and has these arguments."""
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sc":
                assert node.attr in sc.__all__, f"{named(page)}: sc.{node.attr}"
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("sc."):
                continue
            function = sc
            for name in ast.unparse(node.func).split(".")[1:]:
                function = getattr(function, name)
            parameters = inspect.signature(function).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                unknown = {keyword.arg for keyword in node.keywords} - set(parameters)
                assert not unknown, f"{named(page)}: {ast.unparse(node.func)} does not take {unknown}"


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(sc.__all__) - ERRORS))
def test_every_public_name_is_documented(name):
    assert inspect.getdoc(getattr(sc, name))
    written = {page: page.read_text() for page in WRITTEN}
    pattern = rf"\b(?:sc\.)?{name}\b"
    assert any(re.search(pattern, text) for page, text in written.items()), f"no guide names {name}"


@pytest.mark.parametrize(
    "function", [sc.calibrate, sc.plan, sc.prune, sc.save, sc.load, sc.finetune, sc.bench, sc.search]
)
def test_every_argument_is_documented(function):
    documented = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^\s+\**{name}:", documented, re.MULTILINE), f"{function.__name__} does not describe {name}"


def test_every_method_has_a_place():
    index = (ROOT / "docs/methods/index.md").read_text()
    for name in sc.methods():
        assert re.search(rf"^\| \[`{name}`\]", index, re.MULTILINE), f"docs/methods/index.md has no {name}"


# --- The reference ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated():
    """The pages by their places, on a narrow terminal."""
    spec = importlib.util.spec_from_file_location("generate", GENERATOR)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        return module.pages()


def test_the_reference_is_what_the_code_says(generated):
    for path, text in generated.items():
        assert path.read_text() == text, f"{path.name} is out of date: run python docs/generate.py"


def test_the_reference_has_every_name_and_option(generated):
    api, shown = (text for _, text in sorted(generated.items()))
    for name in sc.__all__:
        assert re.search(rf"^## (?:(?:class|exception|module) {name}|{name}\(\))$", api, re.MULTILINE), name
    for name in (*sc.core.__all__, *sc.data.__all__):
        assert re.search(rf"^### (?:class )?\w+\.{name}\b", api, re.MULTILINE), name
    for words in commands(README):
        section = shown.partition(f"\n## secateur {words[1]}\n")[2].partition("\n## ")[0]
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"^\| `{option}\b", section, re.MULTILINE), f"{words[1]} {option}"


# --- Tests, files, links ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_tests_that_are_named_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("it also names what is gone")
    sources = {path.name: path for path in (ROOT / "tests").rglob("*") if path.is_file()}
    text = page.read_text()
    for file, test in re.findall(r"`(?:[\w/]+/)?(test_\w+\.py)(?:::(\w+))?", text):
        assert file in sources, f"{named(page)}: there is no {file}"
        assert f"def {test or 'test_'}" in sources[file].read_text(), f"{named(page)}: {file} has no {test}"
    for file in re.findall(r"`(\w+_test\.cc)", text):
        assert file in sources, f"{named(page)}: there is no {file}"
    for path in re.findall(r"[`\s]((?:tests|benchmarks|examples|csrc|docs|python|\.ci)/[\w./-]*\w)", text):
        assert (ROOT / path).exists() or "build/" in path, f"{named(page)}: there is no {path}"


def test_every_promise_names_a_test():
    text = (ROOT / "docs/guarantees.md").read_text()
    assert len(re.findall(r"`test_\w+\.py(?:::\w+)?`", text)) > 20
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"`test_\w+\.py", section), section.splitlines()[0]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page.read_text())):
        path, _, anchor = target.partition("#")
        found = Path(os.path.normpath(page.parent / path)) if path else page
        assert found.exists(), f"{named(page)} -> {target}"
        if anchor:
            assert anchor in anchors(found.read_text()), f"{named(page)} -> {target}"


def test_every_page_can_be_found():
    """From the index on, by links."""
    start = ROOT / "docs/index.md"
    seen, queue = {start}, [start]
    while queue:
        page = queue.pop()
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", page.read_text()):
            found = Path(os.path.normpath(page.parent / target))
            if found not in seen:
                seen.add(found)
                queue.append(found)
    assert set(PAGES) <= seen


def test_the_changelog_has_one_line_an_entry():
    for line in CHANGELOG.splitlines():
        label = re.fullmatch(r"[A-Z]\S*( \S+){0,3}", line)
        assert not line or label or line.startswith(("#", "- ")), line
        assert len(line) <= 120, line
    groups = re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)
    assert set(groups) <= {"Added", "Changed", "Fixed", "Performance", "Removed"}
