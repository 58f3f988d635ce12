"""`secateur methods`, and --option NAME=VALUE where flags stood."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import secateur as sc
import timm
import torch
from secateur.cli.app import main
from secateur.cli.method_options import options_of, parsed

Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Options:
    """Options of every type that a method may have."""

    norm: Literal["l1", "l2"] = field(default="l2", metadata={"help": "The norm of a row."})
    order: Literal[1, 2] = 2
    seed: int = 0
    share: float = 0.5
    signed: bool = False
    name: str = "none"
    limit: int | None = None


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A method whose options are of every type, by the name "typed"."""
    method = SimpleNamespace(Options=Options)
    registry = importlib.import_module("secateur.methods.registry")
    monkeypatch.setattr(registry, "method_named", {"typed": method}.__getitem__)
    return method


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.replace("│", " ").split())

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model with heads of 5 and its statistics, saved."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=10, num_heads=2, depth=2, num_classes=10
    ).eval()
    sc.save(model, folder / "model.safetensors")
    sc.calibrate(model, [2 * torch.rand(8, 3, 8, 8) - 1 for _ in range(4)]).save(folder / "stats.safetensors")
    return folder / "model.safetensors", folder / "stats.safetensors"


@pytest.fixture
def planned(run: Run, files: tuple[Path, Path], tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any] | str]]:
    """Run ``plan`` at fixed ratios: its plan file's content, or its error."""

    def call(*arguments: str) -> tuple[int, dict[str, Any] | str]:
        model, stats = files
        out = tmp_path / "plan.json"
        common = ["--checkpoint", model, "--stats", stats, "--ratios", '{"qk": 0.4, "ffn": 0.3}', "--out", out]
        code, _, error = run("plan", *common, *arguments)
        return code, sc.Plan.load(out).to_dict() if code == 0 else error

    return call


def expected(files: tuple[Path, Path], **arguments: str) -> dict[str, Any]:
    model, stats = sc.load(files[0]), sc.Statistics.load(files[1])
    return sc.plan(model, stats, ratios={"qk": 0.4, "ffn": 0.3}, **arguments).to_dict()


def test_values_are_of_the_options_types(typed: SimpleNamespace) -> None:
    given = ["norm=l1", "order=1", "seed=-7", "share=1e-3", "signed=True", "name=a=b", "limit=3"]
    found = parsed("typed", given)
    assert found == {
        "norm": "l1",
        "order": 1,
        "seed": -7,
        "share": 0.001,
        "signed": True,
        "name": "a=b",
        "limit": 3,
    }
    assert [type(value) for value in found.values()] == [str, int, int, float, bool, str, int]
    assert parsed("typed", ["limit=none", "name=none", " signed = false "]) == {
        "limit": None,
        "name": "none",
        "signed": False,
    }
    assert parsed("typed", None) == {}
    # A choice that is none is for the method to refuse, in its own words.
    assert parsed("typed", ["norm=l3"]) == {"norm": "l3"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("seed=1.5", "expected an integer for --option seed, got '1.5'"),
        ("share=half", "expected a number for --option share, got 'half'"),
        ("signed=yes", "expected true or false for --option signed, got 'yes'"),
        ("limit=", "expected an integer, or none for --option limit, got ''"),
        ("seed", "expected --option NAME=VALUE, got 'seed'"),
        ("=3", "expected --option NAME=VALUE, got '=3'"),
    ],
)
def test_values_of_another_type_are_wrong_usage(
    given: str, text: str, typed: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    arguments = ["--stats", "s", "--out", tmp_path / "o", "--checkpoint", "m", "--method", "typed", "--option", given]
    for command in (["plan", "--target-macs", 0.5], ["search", "--macs", 0.5, "--data", "digits"]):
        code, out, error = run(*command, *arguments)
        assert (code, out) == (2, "")
        assert text in error


def test_options_reach_the_plan(planned: Callable[..., tuple[int, dict[str, Any]]], files: tuple[Path, Path]) -> None:
    assert planned() == (0, expected(files, method="project"))
    refit = expected(files, method="refit", selection="energy")
    assert planned("--method", "refit", "--option", "selection=energy") == (0, refit)
    assert refit != expected(files, method="refit")
    snp = expected(files, method="snp", similarity="activations", head_score="neurons")
    options = ["--option", "similarity=activations", "--option", "head-score=neurons"]
    assert planned("--method", "snp", *options) == (0, snp)


def test_the_flags_of_before_still_work_and_are_hidden(
    run: Run, planned: Callable[..., tuple[int, dict[str, Any]]], files: tuple[Path, Path]
) -> None:
    assert planned("--method", "refit", "--selection", "energy", "--head-score", "neurons") == planned(
        "--method", "refit", "--option", "selection=energy", "--option", "head_score=neurons"
    )
    assert planned("--method", "snp", "--similarity", "activations")[1]["options"]["similarity"] == "activations"
    shown = run("plan", "--help")[1]
    assert "--option" in shown
    assert not any(flag in shown for flag in ("--similarity", "--selection", "--head-score"))


def test_options_that_a_method_does_not_have(planned: Callable[..., tuple[int, str]]) -> None:
    text = "secateur: options: expected head_score, got 'similarity'"
    assert planned("--option", "similarity=weights") == (1, text)
    assert planned("--similarity", "weights") == (1, text)
    code, error = planned("--method", "snp", "--option", "similarity=angles")
    assert (code, error) == (1, "secateur: similarity: expected one of weights, activations, got 'angles'")
    code, error = planned("--method", "none")
    assert code == 1
    assert error.startswith("secateur: method: expected one of ")
    for twice in (["--selection", "energy"], ["--option", "selection=energy"]):
        code, error = planned("--method", "refit", "--option", "selection=snp", *twice)
        assert code == 2
        assert "expected --option selection once, got it twice" in error


def test_search_takes_options(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    model, stats = files
    common = ["--checkpoint", model, "--stats", stats, "--data", "digits", "--max-images", 8, "--macs", 0.9]
    common += ["--rounds", 1, "--round-to", 1, "--out", tmp_path / "out", "--resume", tmp_path / "search"]
    assert run("search", *common, "--method", "refit", "--option", "selection=energy")[0] == 0
    # Another search's file is refused, and options are part of a search.
    code, _, error = run("search", *common, "--method", "refit", "--option", "selection=snp")
    assert code == 1
    assert error.startswith("secateur: resume: expected the file of this search")


def test_statistics_are_for_methods_that_need_them(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    common = ["plan", "--checkpoint", files[0], "--ratios", '{"ffn": 0.3}', "--out", tmp_path / "plan.json"]
    assert run(*common, "--method", "magnitude")[0] == 0
    assert sc.Plan.load(tmp_path / "plan.json").method == "magnitude"
    code, out, error = run(*common)
    assert (code, out) == (2, "")
    assert "expected --stats FILE for the method project, which needs moments" in error


def test_methods_are_listed(run: Run) -> None:
    code, out, error = run("methods")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == sc.methods()
    assert len({line.index(line.split()[1]) for line in lines}) == 1
    found = json.loads(run("methods", "--json")[1])["methods"]
    assert [each["name"] for each in found] == sc.methods()
    assert all(each["summary"] in line for each, line in zip(found, lines, strict=True))


@pytest.mark.parametrize("name", sc.methods())
def test_every_method_is_described(name: str, run: Run) -> None:
    code, out, _ = run("methods", name)
    assert code == 0
    found = json.loads(run("methods", name, "--json")[1])
    assert found["name"] == name
    for option in found["options"]:
        assert f"{option['name']} " in out
        assert option["values"] is None or set(map(str, option["values"])) <= set(
            out.replace(",", " ").replace(";", " ").replace("(", " ").split()
        )


def test_a_method_that_is_not_there(run: Run) -> None:
    code, out, error = run("methods", "none")
    assert (code, out) == (1, "")
    assert error.startswith("secateur: method: expected one of ")


def test_options_are_described(typed: SimpleNamespace) -> None:
    found = {option.name: option for option in options_of(typed)}
    assert [option.values for option in found.values()] == [
        "l1, l2",
        "1, 2",
        "an integer",
        "a number",
        "true or false",
        "a text",
        "an integer, or none",
    ]
    assert found["norm"].help == "The norm of a row."
    assert [option.default for option in found.values()] == ["l2", 2, 0, 0.5, False, "none", None]
