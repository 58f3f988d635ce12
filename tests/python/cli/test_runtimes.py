"""--runtime: the engine that bench, plan and search time on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import secateur as sc
import timm
import torch
from secateur.cli.app import main
from secateur.latency.runtimes.registry import RUNTIMES, register
from torch import nn

Run = Callable[..., tuple[int, str, str]]


class Spy:
    """An engine that counts what it runs."""

    name = "spy"
    version = "1"
    ran = 0

    def prepare(self, module: nn.Module, example: torch.Tensor) -> Callable[[torch.Tensor], object]:
        twin = copy.deepcopy(module)

        def run(x: torch.Tensor) -> object:
            Spy.ran += 1
            return twin(x)

        return run


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    RUNTIMES.names()
    monkeypatch.setattr(RUNTIMES, "_found", dict(RUNTIMES._found))
    monkeypatch.setattr(Spy, "ran", 0)
    register(Spy)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.replace("│", " ").split())

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model and its statistics, saved."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=10, num_heads=2, depth=2, num_classes=10
    ).eval()
    sc.save(model, folder / "model.safetensors")
    sc.calibrate(model, [2 * torch.rand(8, 3, 8, 8) - 1 for _ in range(4)]).save(folder / "stats.safetensors")
    return folder / "model.safetensors", folder / "stats.safetensors"


def test_bench_times_the_engine(run: Run, files: tuple[Path, Path]) -> None:
    common = ["bench", "--checkpoint", files[0], "--batch-size", 2, "--repeats", 1, "--json"]
    code, out, error = run(*common, "--runtime", "spy")
    assert code == 0, error
    assert json.loads(out)["runtime"] == "spy"
    assert Spy.ran > 0
    Spy.ran = 0
    assert json.loads(run(*common)[1])["runtime"] == "torch"
    assert Spy.ran == 0


def test_tables_are_measured_on_the_engine(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    common = ["bench", "--checkpoint", files[0], "--groups", "ffn", "--table", table, "--repeats", 1]
    code, _, error = run(*common, "--runtime", "spy")
    assert code == 0, error
    assert sc.LatencyTable.load(table).runtime == "spy"
    assert Spy.ran > 0


def test_plan_and_search_measure_on_the_engine(
    run: Run, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def plan(*_: object, runtime: str | None, **__: object) -> None:
        asked.append(runtime)
        raise sc.Error("enough")

    def search(*_: object, objective: sc.LatencySensitive, **__: object) -> None:
        assert objective.latency == 0.5
        asked.append(objective.runtime)
        raise sc.Error("enough")

    monkeypatch.setattr(sc, "plan", plan)
    monkeypatch.setattr(sc, "search", search)
    common = ["--checkpoint", files[0], "--stats", files[1], "--out", tmp_path / "out"]
    for command in (["plan", "--target-latency", 0.5], ["search", "--data", "digits", "--latency", 0.5]):
        for more in (["--runtime", "spy"], []):
            assert run(*command, *common, *more) == (1, "", "secateur: enough")
    assert asked == ["spy", None, "spy", "torch"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "--compile", "--runtime", "torch"], "expected --compile or --runtime, got both"),
        (["plan", "--out", "o", "--target-macs", "0.5", "--runtime", "torch"], "--runtime need --target-latency"),
        (
            ["search", "--data", "digits", "--stats", "s", "--out", "o", "--macs", "0.5", "--runtime", "torch"],
            "--runtime needs --latency",
        ),
    ],
)
def test_engines_without_anything_to_time(arguments: list[str], text: str, run: Run) -> None:
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert text in error


def test_an_engine_that_is_not_there(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    model, stats = files
    data = ["--stats", stats, "--out", tmp_path / "o"]
    for command in (
        ["bench"],
        ["plan", *data, "--target-latency", 0.5],
        ["search", *data, "--data", "digits", "--latency", 0.5],
    ):
        code, out, error = run(*command, "--checkpoint", model, "--runtime", "none")
        assert (code, out) == (1, "")
        assert error.startswith("secateur: runtime: expected one of ")
        assert error.endswith(", got 'none'")
