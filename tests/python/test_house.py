"""The rules of the house that a reader can check by grep; levels and circles are for `lint-imports`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import secateur as sc

PACKAGE = Path(sc.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
# All knowledge of model code is in families, and methods are tables by kind.
ELSEWHERE = {name: text for name, text in MODULES.items() if not name.startswith(("families/", "methods/"))}


def found(pattern, texts):
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in sorted(texts.items())
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_there_is_something_to_search():
    assert len(MODULES) > 100
    assert found(r"qkv", MODULES)
    assert found(r"class HeadNorm", MODULES)


@pytest.mark.parametrize("word", ["qkv", "PrunedAttention", "HeadNorm", r"blocks\.\d"])
def test_no_module_of_a_model_is_named_outside_its_family(word):
    assert not found(word, {name: re.sub(r'"""(.|\n)*?"""', "", text) for name, text in ELSEWHERE.items()})


def test_no_kind_is_compared_outside_tables():
    assert not found(r"""\.kind *(==|!=|in|not in) *[(\[{]?["']""", ELSEWHERE)


def test_no_module_is_long():
    assert not [name for name, text in MODULES.items() if len(text.splitlines()) > 400]


def test_nothing_is_imported_within_the_package_inside_a_function():
    """Where it would hide a circle; what is imported when asked for is the public names, by the package itself."""
    inside = found(r"^ {4,}(from \.|from secateur|import secateur)", MODULES)
    typed = [line for line in inside if not _only_for_types(line)]
    assert not typed


def _only_for_types(line):
    name, number, _ = line.split(":", 2)
    before = MODULES[name].splitlines()[: int(number) - 1]
    block = next(each for each in reversed(before) if each and not each.startswith(" "))
    return block.startswith("if TYPE_CHECKING")


def test_no_package_offers_something_else_by_the_name_of_its_module():
    """Once the module is imported, as the registries do late, its name means the module."""
    clashes = []
    for name, text in MODULES.items():
        if name.endswith("/__init__.py"):
            folder = Path(name).parent
            offered = re.findall(r'"(\w+)"', text.partition("__all__")[2])
            late = [each for each in offered if f"{folder}/{each}.py" in MODULES and f"from .{each} " not in text]
            clashes += [f"{folder}: {each}" for each in late]
    assert not clashes
    assert any(name.endswith("measurements/divergence.py") for name in MODULES)
