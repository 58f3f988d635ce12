from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import secateur
import secateur.cli.digits as module
import timm
from launch import run_script
from rich.console import Console
from secateur.cli.app import main
from secateur.errors import Error, InvalidArgument
from secateur.latency.bench import Benchmark
from secateur.training.evaluate import Evaluation, evaluate
from torch import nn


def params(depth: int) -> int:
    """Of the demo's model with so many blocks."""
    block = 2 * 384 + 192 * 576 + 576 + 192 * 192 + 192 + 2 * 192 * 768 + 768 + 192
    return 48 * 192 + 192 + 64 * 192 + depth * block + 384 + 192 * 10 + 10


def test_quick_demo_does_the_whole_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a third of its blocks: what the jobs do with each is tested elsewhere."""
    assert sum(parameter.numel() for parameter in module._vit().parameters()) == params(6)

    def shallow(name: str, **arguments: object) -> nn.Module:
        return timm.create_model(name, **{**arguments, "depth": 2})

    monkeypatch.setattr(module, "timm", SimpleNamespace(create_model=shallow))
    # On one thread the processor's time is that of the work, whatever else the machine does.
    clock = SimpleNamespace(perf_counter=time.process_time)
    monkeypatch.setattr(importlib.import_module("secateur.latency.stopwatch"), "time", clock)
    assert main(["demo", "--quick", "--threads", "1", "--out", str(tmp_path / "demo"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = secateur.load(found["file"])
    anatomy = secateur.inspect(model)
    dense, pruned = found["params"]
    assert pruned == anatomy.params == sum(parameter.numel() for parameter in model.parameters())
    assert dense == params(2)
    assert found["macs"][1] == anatomy.macs
    assert 0.47 < found["macs"][1] / found["macs"][0] <= 0.5
    assert found["finetune_steps"] <= found["steps"] / 5
    # Sixty steps are few, but well above chance; what counts is that the file holds what was measured.
    assert found["trained"]["top1"] > 25
    assert found["reloaded"] == found["finetuned"][1]
    assert found["reloaded"]["images"] == 192
    assert found["benchmark"]["batch_size"] == 32
    assert found["benchmark"]["speedup"] > 1
    assert found["file_bytes"] == Path(found["file"]).stat().st_size < 4.2 * pruned + 100_000
    assert [item.name for item in (tmp_path / "demo").iterdir()] == ["pruned.safetensors"]


def figures() -> module.Demo:
    evaluations = [Evaluation(top1, 99.0, 0.1, 899) for top1 in (98.0, 50.0, 98.25, 97.5)]
    benchmark = Benchmark(
        images_per_second=900.0,
        milliseconds=35.0,
        quartiles=(34.0, 36.0),
        reference_images_per_second=450.0,
        reference_milliseconds=70.0,
        reference_quartiles=(69.0, 71.0),
        speedup=2.0,
        speedup_quartiles=(1.9, 2.1),
        batch_size=32,
        input_size=(3, 32, 32),
        repeats=15,
        threads=2,
        device="cpu",
    )
    return module.Demo(
        params=(2_700_000, 1_350_000),
        macs=(180_000_000, 90_000_000),
        steps=290,
        finetune_steps=58,
        trained=evaluations[0],
        pruned=evaluations[1],
        finetuned=(evaluations[2], evaluations[3]),
        reloaded=evaluations[3],
        benchmark=benchmark,
        file=Path("demo/pruned.safetensors"),
        file_bytes=5_410_000,
        seconds=200.0,
    )


def test_table_has_every_figure_in_its_place() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(figures().table())
    console.file.close()
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    rows = {" ".join(line) for line in lines}
    for row in (
        "dense pruned",
        "parameters 2.70 M 1.35 M 50.0%",
        "MACs 180.0 M 90.0 M 50.0%",
        "accuracy, trained 290 steps 98.00 %",
        "accuracy, pruned 50.00 % -48.00 points",
        "accuracy, fine-tuned 58 steps 98.25 % 97.50 % -0.75 points",
        "accuracy, reloaded in a new process 97.50 % same bits",
        "images/s, batch 32, 2 threads 450 900 2.00x",
        "file 5.41 MB",
        "demo/pruned.safetensors, all in 200 s",
    ):
        assert row in rows, rows


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the demo's new process forked from one that has torch: above, the whole job starts an interpreter."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        _, option, script, *arguments = command
        assert option == "-c"
        code, out, errors = run_script(script, *arguments, fresh=True)
        return SimpleNamespace(returncode=code, stdout=out, stderr=errors)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))


def test_a_reload_with_other_bits_fails(digits_model: object, tmp_path: Path, forked: None) -> None:
    secateur.save(digits_model, tmp_path / "model.safetensors")
    with pytest.raises(
        Error, match=r"^demo: expected the reloaded model to give the same logits to the bit, got others$"
    ):
        module._reload(tmp_path / "model.safetensors", "0" * 64, 40)
    held_out = module._held_out(digits_model, 40)
    expected = module.logits_digest(digits_model, held_out)
    assert module._reload(tmp_path / "model.safetensors", expected, 40) == evaluate(digits_model, held_out)


def test_a_file_that_does_not_load_fails(tmp_path: Path, forked: None) -> None:
    with pytest.raises(Error, match=r"^demo: expected the saved file to load in a new process, got .*InvalidArgument"):
        module._reload(tmp_path / "none.safetensors", "", 1)


def test_a_target_that_is_missed_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A planner that keeps more than it was told to.
    plan = module.plan
    monkeypatch.setattr(module, "finetune", lambda *_, **__: None)
    monkeypatch.setattr(module, "plan", lambda *arguments, **_: plan(*arguments, target=secateur.Target(macs=0.6)))
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("secateur: demo: expected at most 50% of the MACs, got 5")


def test_fine_tuning_is_at_most_a_fifth(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^finetune_steps: expected from 1 to a fifth of 20 steps, got 5$"):
        module.demo(tmp_path, steps=20, finetune_steps=5)


def test_arguments_are_refused_before_the_work(tmp_path: Path) -> None:
    for arguments, text in (
        ({"steps": "20"}, "steps: expected an integer of at least 5, got '20'"),
        ({"finetune_steps": 0}, "finetune_steps: expected an integer of at least 1, got 0"),
        ({"repeats": 1.5}, "repeats: expected an integer of at least 1, got 1.5"),
        ({"max_images": 0}, "max_images: expected an integer of at least 1, got 0"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{text}$"):
            module.demo(tmp_path / "demo", **arguments)
    assert not (tmp_path / "demo").exists()
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/demo"):
        with pytest.raises(InvalidArgument, match=r"^folder: expected a folder, .*, got .*file"):
            module.demo(tmp_path / folder)
