"""Names that register themselves, from this package and from the packages of others."""

from __future__ import annotations

import itertools
import sys
import textwrap

import pytest
from secateur.errors import InvalidArgument
from secateur.registry import Registry

_NUMBERS = itertools.count()


class Tree:
    """An importable package of two modules, and distributions beside it with entry points."""

    def __init__(self, folder, monkeypatch):
        self.folder, number = folder, next(_NUMBERS)
        self.package, self.group = f"trees{number}", f"trees{number}.kinds"
        monkeypatch.syspath_prepend(str(folder))
        self.module(
            f"{self.package}/__init__",
            f"""
            from secateur.registry import Registry
            KINDS = Registry("tree", "{self.package}", "{self.group}", members=("grow",))
            """,
        )
        for name in ("oak", "elm"):
            self.module(f"{self.package}/{name}", self.kind(name))

    def kind(self, name):
        return f"""
            import {self.package}
            @{self.package}.KINDS.register
            class {name.title()}:
                name = "{name}"
                def grow(self): return "{name}"
            """

    def module(self, path, text):
        file = self.folder / f"{path}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(text))

    def distribution(self, name, **entries):
        folder = self.folder / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{entry} = {value}" for entry, value in entries.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{self.group}]", *lines]))

    @property
    def kinds(self) -> Registry:
        return __import__(self.package).KINDS


@pytest.fixture
def tree(tmp_path, monkeypatch):
    yield (made := Tree(tmp_path, monkeypatch))
    for name in [name for name in sys.modules if name.startswith(made.package)]:
        del sys.modules[name]


def test_modules_are_imported_when_the_first_name_is_asked_for(tree):
    kinds = tree.kinds
    assert f"{tree.package}.oak" not in sys.modules
    assert kinds.names() == ["elm", "oak"]
    assert kinds.named("oak").grow() == "oak"
    assert kinds.named("oak") is kinds.named("oak")
    assert sorted(each.name for each in kinds) == ["elm", "oak"]


@pytest.mark.parametrize("name", ["ash", 3, None, ["oak"]])
def test_an_unknown_name_is_refused_with_those_there_are(tree, name):
    with pytest.raises(InvalidArgument) as caught:
        tree.kinds.named(name)
    assert str(caught.value) == f"tree: expected one of elm, oak, got {name!r}"


def test_a_class_from_outside_is_found(tree):
    @tree.kinds.register
    class Ash:
        name = "ash"

        def grow(self):
            return "ash"

    assert tree.kinds.names() == ["ash", "elm", "oak"]
    assert type(tree.kinds.named("ash")) is Ash


@pytest.mark.parametrize("first", [True, False])
def test_a_name_that_is_taken_is_refused(tree, first):
    if first:
        tree.kinds.names()

    class Oak:
        name = "oak"

        def grow(self):
            return "another"

    with pytest.raises(InvalidArgument, match=r"tree: expected one class named 'oak', got .*Oak and .*\.oak\.Oak"):
        tree.kinds.register(Oak)
    assert tree.kinds.named("oak").grow() == "oak"


def test_a_class_defined_again_replaces_itself(tree):
    for answer in ("young", "old"):

        class Ash:
            name = "ash"
            said = answer

            def grow(self):
                return self.said

        tree.kinds.register(Ash)
    assert tree.kinds.named("ash").grow() == "old"


class Nameless:
    def grow(self):
        pass


class Numbered(Nameless):
    name = 3


class Barren:
    name = "barren"


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Nameless, r"tree: expected a class with a name, got .*Nameless whose name is None"),
        (Numbered, r"tree: expected a class with a name, got .*Numbered whose name is 3"),
        (Barren, r"tree: expected a class with grow, got .*Barren without"),
        (Nameless(), r"tree: expected a class to register, got <.*Nameless object"),
    ],
)
def test_what_is_no_such_class_is_refused(tree, cls, text):
    with pytest.raises(InvalidArgument, match=text):
        tree.kinds.register(cls)
    assert tree.kinds.names() == ["elm", "oak"]


@pytest.mark.parametrize("value", ["{}_outside", "{}_outside:Ash"])
def test_an_entry_point_is_listed_and_imported_when_it_is_asked_for(tree, value):
    outside = f"{tree.package}_outside"
    tree.module(outside, tree.kind("ash"))
    tree.distribution("outside", ash=value.format(tree.package))
    assert tree.kinds.names() == ["ash", "elm", "oak"]
    assert outside not in sys.modules
    assert tree.kinds.named("ash").grow() == "ash"
    assert tree.kinds.named("ash") is tree.kinds.named("ash")
    assert [each.name for each in tree.kinds][-1] == "ash"


def test_an_entry_point_may_name_a_class_that_no_decorator_registers(tree):
    tree.module(f"{tree.package}_outside", "class Ash:\n    name = 'ash'\n    def grow(self): return 'ash'")
    tree.distribution("outside", ash=f"{tree.package}_outside:Ash")
    assert tree.kinds.named("ash").grow() == "ash"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name", r"to be importable, got ModuleNotFoundError: No module named 'nothing_of_"),
        ("raise ValueError('no')", "to be importable, got ValueError: no"),
        ("", "to register 'ash', got none of this name"),
    ],
)
def test_a_broken_entry_point_breaks_nothing_else(tree, text, reason):
    tree.module(f"{tree.package}_outside", text)
    tree.distribution("outside", ash=f"{tree.package}_outside")
    assert tree.kinds.named("oak").grow() == "oak"
    assert tree.kinds.names() == ["ash", "elm", "oak"]
    with pytest.raises(InvalidArgument, match=rf"tree: expected \w+ in the entry points {tree.group} {reason}"):
        tree.kinds.named("ash")


def test_an_entry_point_of_a_name_that_is_taken_is_refused(tree):
    tree.module(f"{tree.package}_outside", "class Oak:\n    name = 'oak'\n    def grow(self): return 'another'")
    tree.distribution("outside", oak=f"{tree.package}_outside:Oak")
    assert tree.kinds.named("elm").grow() == "elm"
    with pytest.raises(InvalidArgument, match="tree: expected one class named 'oak', got "):
        tree.kinds.named("oak")


def test_two_entry_points_of_one_name_are_refused(tree):
    tree.distribution("one", ash="one:Ash")
    tree.distribution("two", ash="two:Ash")
    with pytest.raises(InvalidArgument, match=r"tree: expected one entry point named 'ash' in .*, got .*:Ash and .*"):
        tree.kinds.names()


def test_a_module_that_fails_is_not_taken_for_imported(tree):
    tree.module(f"{tree.package}/elm", "raise RuntimeError('broken')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            tree.kinds.names()
