from __future__ import annotations

import gc
import json
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import secateur
import timm
import torch
from launch import run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from secateur.checkpoints import contents
from secateur.cli.app import main
from secateur.cli.model import model_from
from secateur.data.loader import loader
from secateur.training.evaluate import evaluate
from torch import nn

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 93, "num_heads": 3, "depth": 3}
MODEL = ["--model", NAME, "--model-kwargs", json.dumps(KWARGS), "--num-classes", "10"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., dict[str, object]]:
    """Run a command that must succeed with --json, and parse all of its stdout."""

    def call(*arguments: object) -> dict[str, object]:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    return call


@pytest.fixture
def state(digits_model: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "digits.safetensors"
    save_file(digits_model.state_dict(), path)
    return path


@pytest.fixture
def dense(digits_model: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "dense.safetensors"
    secateur.save(digits_model, path)
    return path


def test_the_whole_way(
    run_json: Callable[..., dict[str, object]], state: Path, tmp_path: Path, digits_model: nn.Module
) -> None:
    """calibrate, plan, prune, evaluate, finetune, evaluate, bench: from files to files."""
    model = [*MODEL, "--checkpoint", state]
    stats, plan, pruned, tuned = (tmp_path / name for name in ("s.st", "p.json", "pruned.st", "tuned.st"))

    found = run_json("calibrate", *model, "--data", "digits", "--max-images", 96, "--gamma", 4, "--out", stats)
    saved = secateur.Statistics.load(stats)
    assert saved.images == 96
    assert found == {"images": 96, "images_needed": saved.images_needed(), "file": str(stats)}

    found = run_json("plan", *model, "--stats", stats, "--target-macs", 0.7, "--round-to", 1, "--out", plan)
    assert found["method"] == "project"
    assert found["macs"][1] <= 0.7 * found["macs"][0]
    # The same by the functions, on the same images in the same order.
    images = loader("digits", digits_model, split="train", batch_size=64, max_images=96, shuffle=True)
    expected = secateur.plan(
        digits_model,
        secateur.calibrate(digits_model, images, max_images=96, gamma=4),
        method="project",
        target=secateur.Target(macs=0.7),
        round_to=1,
    )
    assert secateur.Plan.load(plan).to_dict() == expected.to_dict()

    found = run_json("prune", *model, "--plan", plan, "--out", pruned)
    report = secateur.prune(digits_model, expected)
    assert found == {**report.to_dict(), "file": str(pruned)}

    found = run_json("evaluate", "--checkpoint", pruned, "--data", "digits", "--max-images", 128)
    held_out = loader("digits", digits_model, max_images=128, shuffle=True)
    assert found["images"] == 128
    assert found["top1"] == evaluate(digits_model, held_out).top1

    training = ["--data", "digits", "--steps", 6, "--lr", 1e-3, "--batch-size", 32, "--max-images", 96]
    teacher = [
        "--teacher",
        state,
        "--teacher-model",
        NAME,
        "--teacher-kwargs",
        json.dumps({**KWARGS, "num_classes": 10}),
    ]
    resume = ["--resume", tmp_path / "run.st", "--checkpoint-every", 3]
    # One image is enough to see that validation is done, and on which image.
    folder = tmp_path / "images"
    (folder / "0").mkdir(parents=True)
    Image.new("RGB", (40, 40), (250, 120, 10)).save(folder / "0" / "0.png")
    found = run_json(
        "finetune", "--checkpoint", pruned, *training, *teacher, *resume, "--val-data", folder, "--out", tuned
    )
    assert found["steps"] == 6
    assert [entry["step"] for entry in found["history"]] == [3, 6]
    validated = run_json("evaluate", "--checkpoint", tuned, "--data", folder)
    assert found["history"][-1]["val_loss"] == validated["loss"]

    found = run_json("bench", "--checkpoint", tuned, "--reference", pruned, "--repeats", 2, "--batch-size", 2)
    assert found["repeats"] == 2
    assert found["reference_images_per_second"] > 0
    assert (found["batch_size"], found["input_size"]) == (2, [3, 32, 32])


@pytest.mark.parametrize("way", ["by block", "one shot", "only selects", "sizes of a plan"])
def test_prune_for_a_budget(
    run_json: Callable[..., dict[str, object]], dense: Path, tmp_path: Path, digits_model: nn.Module, way: str
) -> None:
    """One command, and the same by the functions."""
    ratios = {"qk": 0.5, "v": 0.25, "ffn": 0.5}
    budget: list[object] = ["--ratios", json.dumps(ratios)]
    images = loader("digits", digits_model, split="train", batch_size=32, max_images=80, shuffle=True)
    if way == "by block":
        budget += ["--resume", tmp_path / "run", "--streams", "recompute"]
        report = secateur.prune_sequential(digits_model, images, ratios=ratios)
    elif way == "one shot":
        budget += ["--one-shot", "--method", "refit", "--option", "selection=energy"]
        stats = secateur.calibrate(digits_model, images)
        plan = secateur.plan(digits_model, stats, method="refit", ratios=ratios, selection="energy")
        report = secateur.prune(digits_model, plan)
    elif way == "only selects":
        budget += ["--method", "magnitude"]
        report = secateur.prune(digits_model, secateur.plan(digits_model, method="magnitude", ratios=ratios))
    else:
        plan = secateur.plan(digits_model, method="magnitude", ratios=ratios)
        plan.save(tmp_path / "plan.json")
        budget = ["--plan", tmp_path / "plan.json", "--method", "refit"]
        report = secateur.prune_sequential(digits_model, images, "refit", sizes_of=plan)
    reading = ["--data", "digits", "--batch-size", 32, "--max-images", 80]
    found = run_json("prune", "--checkpoint", dense, *reading, *budget, "--out", tmp_path / "out.st")
    assert found == {**report.to_dict(), "file": str(tmp_path / "out.st")}
    pruned = secateur.load(tmp_path / "out.st").state_dict()
    assert all(torch.equal(value, pruned[name]) for name, value in digits_model.state_dict().items())
    assert (tmp_path / "run").exists() == (way == "by block")


def test_prune_in_the_stock_layout(
    run: Run, run_json: Callable[..., dict[str, object]], dense: Path, tmp_path: Path, digits_model: nn.Module
) -> None:
    """--layout is prune's: the file holds timm's own attention, the report counts its padding."""
    images = loader("digits", digits_model, split="train", max_images=32)
    stats = secateur.calibrate(digits_model, images)
    wanted = secateur.plan(digits_model, stats, ratios={"qk": 0.5, "v": 0.3})
    plan, pruned = tmp_path / "p.json", tmp_path / "pruned.st"
    wanted.save(plan)
    found = run_json("prune", "--checkpoint", dense, "--plan", plan, "--layout", "stock", "--out", pruned)
    assert found == {**secateur.prune(digits_model, wanted, layout="stock").to_dict(), "file": str(pruned)}
    model = secateur.load(pruned)
    assert type(model.blocks[0].attn) is timm.layers.Attention
    assert model.state_dict().keys() == digits_model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in digits_model.state_dict().items())
    pruned.unlink()
    error = failure(run, "prune", "--checkpoint", dense, "--plan", plan, "--layout", "flat", "--out", pruned)
    assert error == "secateur: layout: expected one of exact, stock, auto, got 'flat'\n"
    assert not pruned.exists()


@pytest.mark.parametrize("way", ["plan", "at once", "by block"])
def test_prune_in_the_layout_of_an_engine(
    run: Run, run_json: Callable[..., dict[str, object]], dense: Path, tmp_path: Path, way: str
) -> None:
    """--engine is prune's, whichever function cuts."""
    ratios = '{"qk": 0.5, "v": 0.3}'
    given: list[object] = ["--data", "digits", "--max-images", 40, "--ratios", ratios, "--method", "magnitude"]
    if way == "by block":
        given[-1] = "project"
    elif way == "plan":
        model = secateur.load(dense)
        secateur.plan(model, method="magnitude", ratios=json.loads(ratios)).save(tmp_path / "p.json")
        given = ["--plan", tmp_path / "p.json"]
    files = [tmp_path / "auto.st", tmp_path / "stock.st"]
    for file, how in zip(files, (["auto", "--engine", "timm"], ["stock"]), strict=True):
        run_json("prune", "--checkpoint", dense, *given, "--layout", *how, "--out", file)
    assert type(secateur.load(files[0]).blocks[0].attn) is timm.layers.Attention
    found, wanted = (secateur.load(file).state_dict() for file in files)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    for how, text in (
        (["auto", "--engine", "tpu"], "expected one of coreml, .*, transformers, got 'tpu'"),
        (["stock", "--engine", "onnx"], "expected none unless layout is 'auto', got 'onnx' with 'stock'"),
    ):
        error = failure(run, "prune", "--checkpoint", dense, *given, "--layout", *how, "--out", tmp_path / "no.st")
        assert re.fullmatch(f"secateur: engine: {text}\n", error)
    assert not (tmp_path / "no.st").exists()


def test_inspect_is_for_people_and_machines(run: Run, dense: Path, digits_model: nn.Module) -> None:
    code, out, err = run("inspect", "--checkpoint", dense)
    assert (code, err) == (0, "")
    assert str(secateur.inspect(digits_model)).strip() in out
    code, out, _ = run("inspect", *MODEL, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(secateur.inspect(digits_model).to_dict()))


def test_json_is_alone_on_stdout(run: Run, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect = secateur.inspect

    def talkative(model: nn.Module) -> secateur.Anatomy:
        print("a library has something to say")
        return inspect(model)

    monkeypatch.setattr(secateur, "inspect", talkative)
    code, out, err = run("inspect", "--checkpoint", dense, "--json")
    assert code == 0
    assert json.loads(out)["params"] > 0
    assert "a library has something to say" in err


def test_ratios_groups_and_limits_reach_the_plan(
    run_json: Callable[..., dict[str, object]], dense: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "s.st"
    run_json("calibrate", "--checkpoint", dense, "--data", "digits", "--max-images", 8, "--out", stats)
    common = ["plan", "--checkpoint", dense, "--stats", stats, "--out", tmp_path / "p.json"]
    kept = run_json(*common, "--ratios", '{"qk": 0.5, "ffn": 0.25}')["kept"]
    assert {name: size for name, size in kept.items() if name.endswith("qk")} == {
        f"blocks.{i}.qk": 15 for i in range(3)
    }
    assert {name.rpartition(".")[2] for name in kept} == {"qk", "ffn"}
    kept = run_json(*common, "--ratios", '{"ffn": 0.5}', "--freeze", "blocks.0.*", "--min-keep", '{"ffn": 300}')["kept"]
    assert kept == {"blocks.1.ffn": 300, "blocks.2.ffn": 300}
    kept = run_json(*common, "--target-params", 0.8, "--groups", "ffn", "--round-to", '{"ffn": 4}')["kept"]
    assert {size % 4 for size in kept.values()} == {0}
    ratios = tmp_path / "ratios.json"
    ratios.write_text('{"ffn": 0.5}')
    code = main([*map(str, common), "--ratios", str(ratios)])
    assert code == 1  # a per-block file names every block


def test_options_of_the_images(run_json: Callable[..., dict[str, object]]) -> None:
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 1, "depth": 1, "num_classes": 10}
    common = ["evaluate", "--model", NAME, "--model-kwargs", json.dumps(small), "--no-pretrained", "--data", "digits"]
    options = ([], ["--split", "train"], ["--max-images", 50, "--batch-size", 7])
    assert [run_json(*common, *each)["images"] for each in options] == [899, 898, 50]


def test_threads_are_set(run: Run, dense: Path) -> None:
    code, *_ = run("evaluate", "--checkpoint", dense, "--data", "digits", "--max-images", 2, "--threads", 2)
    assert code == 0
    assert torch.get_num_threads() == 2  # tests of commands start with one


def failure(run: Run, *arguments: object) -> str:
    code, out, err = run(*arguments)
    assert code == 1
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_failures_are_one_line(run: Run, dense: Path, state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert failure(run, "evaluate", "--checkpoint", tmp_path / "none", "--data", "digits").startswith(
        "secateur: --checkpoint: expected a checkpoint, got "
    )
    assert "source: expected an image folder" in failure(run, "evaluate", "--checkpoint", dense, "--data", "nowhere")
    assert "got timm.models.vgg.VGG" in failure(run, "inspect", "--model", "vgg11")
    assert "expected a model that timm can build, got 'no_such_vit'" in failure(
        run, "inspect", "--model", "no_such_vit"
    )
    assert "--checkpoint: model: expected a timm name (--model NAME), since digits.safetensors names none" in failure(
        run, "inspect", "--checkpoint", state
    )
    assert "checkpoint: expected a plain state dict with --model, --num-classes," in failure(
        run, "inspect", *MODEL, "--checkpoint", dense
    )
    assert f"checkpoint: expected the parameters of {NAME!r}, got others" in failure(
        run, "inspect", "--model", NAME, "--checkpoint", state
    )
    weights = load_file(state)
    save_file({name: tensor for name, tensor in weights.items() if name != "norm.bias"}, tmp_path / "short")
    assert "norm.bias" in failure(run, "inspect", *MODEL, "--checkpoint", tmp_path / "short")
    assert "checkpoint: expected a checkpoint of torch.save or a .safetensors file" in failure(
        run, "inspect", *MODEL, "--checkpoint", __file__
    )
    assert "secateur" in failure(run, "prune", "--checkpoint", dense, "--plan", state, "--out", out)
    assert "collect" in failure(
        run, "calibrate", "--checkpoint", dense, "--data", "digits", "--collect", "some", "--out", out
    )
    assert not out.exists()


def state_of(model: nn.Module, path: Path, metadata: object, padding: int = 0) -> Path:
    """A state dict as another program may write it: the header's metadata may be anything."""
    data, entries = b"", {} if metadata is None else {"__metadata__": metadata}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy().tobytes()
        entries[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(entries, ensure_ascii=False).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    ("metadata", "padding"),
    [
        (None, 0),
        ({}, 5),
        ({"format": "pt"}, 8),
        ({"format": "flax", "größe": 'a "quotation", a \\ and \n 家 😀', "": ""}, 0),
        ({"config": json.dumps({"lr": -1.5e-3, "layers": [1, None, True]}), "notes": "x" * (1 << 20)}, 3),
    ],
)
def test_a_state_dict_from_elsewhere(tmp_path: Path, metadata: dict[str, str] | None, padding: int) -> None:
    expected = timm.create_model(NAME, num_classes=10, **KWARGS)
    path = state_of(expected, tmp_path / "state", metadata, padding)
    assert load_file(path).keys() == expected.state_dict().keys()  # safetensors takes it
    found = model_from(NAME, path, None, 10, json.dumps(KWARGS))
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_a_state_dict_that_is_damaged(run: Run, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "state", state.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    long = size + (9 << 20)
    for damaged, text in (
        (b"", "it is empty"),
        (whole[:-4], "where the header says"),
        (struct.pack("<Q", long) + whole[8 : 8 + size] + b" " * (9 << 20) + whole[8 + size :], "a header of"),
        (whole[:8] + b"[" + whole[9:], "it is neither"),
    ):
        path.write_bytes(damaged)
        found = failure(run, "inspect", *MODEL, "--checkpoint", path)
        assert found.startswith(
            f"secateur: --checkpoint: expected a checkpoint of torch.save or a .safetensors file, got '{path}' ("
        )
        assert text in found
    assert "expected neither model nor use_ema" in failure(run, "inspect", *MODEL, "--checkpoint", tmp_path)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert "expected a little-endian machine" in failure(run, "inspect", *MODEL, "--checkpoint", state)


def test_nothing_is_kept_of_a_state_dict(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(50)])
    save_file(model.state_dict(), tmp_path / "state")
    tracemalloc.start()
    try:
        held = []
        for reads in (5, 50):
            for _ in range(reads):
                contents.read(tmp_path / "state")
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] < 50 * 100 * 4


def test_files_that_cannot_be_written_are_refused_before_the_work(
    run: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.cli.model.loaded", lambda *_: pytest.fail("work was done"))
    nowhere = tmp_path / "none" / "file"
    data = ["--checkpoint", dense, "--data", "digits"]
    for command in (
        ["calibrate", *data],
        ["plan", "--checkpoint", dense, "--stats", dense, "--ratios", "{}"],
        ["prune", "--checkpoint", dense, "--plan", dense],
        ["finetune", *data],
    ):
        for path in (nowhere, tmp_path):
            expected = f"secateur: --out: expected a file in an existing folder, got {path}\n"
            assert failure(run, *command, "--out", path) == expected
    for name in ("calibrate", "finetune"):
        expected = f"secateur: --resume: expected a file in an existing folder, got {nowhere}\n"
        assert failure(run, name, *data, "--out", tmp_path / "out", "--resume", nowhere) == expected


def test_images_that_cannot_be_decoded_are_left_out_by_every_command(
    run: Run, run_json: Callable[..., dict[str, object]], state: Path, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    for number in range(12):
        file = data / str(number % 2) / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (250, 9 * number, 10)).save(file)
    for name in ("0/04.png", "1/05.png"):
        (data / name).write_bytes(b"no image at all")
    model, stats, out = [*MODEL, "--checkpoint", state], tmp_path / "s.st", tmp_path / "o.st"
    source = ["--data", data, "--batch-size", 4]
    cuts = ["--params", 0.95, "--rounds", 1, "--method", "snp", "--round-to", 1, "--finetune", '{"epochs": 1}']
    commands = {
        "calibrate": [*source, "--out", stats],
        "evaluate": source,
        "finetune": [*source, "--val-data", data, "--out", out],
        "search": [*source, "--stats", stats, *cuts, "--out", out],
    }
    for name, arguments in commands.items():
        if name != "search":  # which needs the statistics
            for limit, text in (([], "a readable image"), (["--max-unreadable", 1], "at most 1 unreadable images")):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert f"source: expected {text}, got" in failure(run, name, *model, *arguments, *limit)
        with pytest.warns(UserWarning, match="left out an image"):
            found = run_json(name, *model, *arguments, "--max-unreadable", 2)
        assert found.get("images", 10) == 10
        if name == "finetune":
            assert [(entry["images"], entry["unreadable"]) for entry in found["history"]] == [(10, 2)]


def test_failures_name_the_option(run: Run, dense: Path, state: Path, tmp_path: Path) -> None:
    out, none = ["--out", tmp_path / "out"], tmp_path / "none"
    model = ["--checkpoint", dense]
    data = ["--data", "digits", "--max-images", "2"]
    for option, command in (
        ("--stats", ["plan", *model, "--target-macs", 0.5, *out, "--stats", none]),
        ("--stats", ["plan", *model, "--target-macs", 0.5, *out, "--stats", state]),
        ("--plan", ["prune", *model, *out, "--plan", none]),
        ("--teacher", ["finetune", *model, *data, *out, "--teacher", none]),
        ("--teacher", ["finetune", *model, *data, *out, "--teacher-model", NAME, "--teacher", none]),
        ("--reference", ["bench", *model, "--reference", none]),
    ):
        assert failure(run, *command).startswith(f"secateur: {option}: "), command
    for command in (["calibrate", *data, *out], ["evaluate", *data], ["finetune", *data, *out], ["bench"]):
        found = failure(run, *command, *model, "--device", "gpu")
        assert found.startswith("secateur: device: expected one that is there, got 'gpu' (")
    assert not (tmp_path / "out").exists()


def test_random_weights_are_the_same_in_every_command(
    run_json: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    model = [*MODEL, "--no-pretrained"]
    generator = torch.get_rng_state()
    run_json("calibrate", *model, "--data", "digits", "--max-images", 4, "--out", tmp_path / "s.st")
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)
    arguments = ["--stats", tmp_path / "s.st", "--target-macs", 0.7, "--out", tmp_path / "p.json"]
    assert run_json("plan", *model, *arguments)["method"] == "project"


def test_a_mistake_of_ours_is_one_line_too_and_a_traceback_on_request(
    run: Run, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(secateur, "inspect", broken)
    assert failure(run, "inspect", "--checkpoint", dense) == "secateur: RuntimeError: first line second line\n"
    monkeypatch.setenv("SECATEUR_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        run("inspect", "--checkpoint", dense)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect"], "expected --checkpoint FILE or --model NAME"),
        (["evaluate", "--data", "digits", *MODEL], "expected --checkpoint FILE or --pretrained"),
        (["evaluate", "--checkpoint", "x"], "Missing option '--data'"),
        (["inspect", "--model", NAME, "--use-ema"], "--use-ema needs --checkpoint"),
        (["inspect", "--model", NAME, "--model-kwargs", "{"], "expected a JSON object"),
        (["inspect", "--model", NAME, "--model-kwargs", "[1]"], "expected a JSON object"),
        (["inspect", "--model", NAME, "--checkpoint", "x", "--pretrained"], "got both"),
        (["plan", "--stats", "s", "--out", "o", "--checkpoint", "x"], "expected either --ratios, or --target-macs"),
        (
            ["plan", "--stats", "s", "--out", "o", "--checkpoint", "x", "--ratios", "{}", "--target-macs", "0.5"],
            "expected either --ratios, or --target-macs",
        ),
        *(
            (
                ["plan", "--stats", "s", "--out", "o", "--checkpoint", "x", "--target-macs", "0.5", "--groups", groups],
                "expected --groups of kinds or groups, got none",
            )
            for groups in ("", " , ")
        ),
        (["finetune", "--data", "digits", "--out", "o", "--epochs", "1", "--steps", "1"], "got both"),
        (["evaluate", "--data", "digits", "--batch-size", "0"], "--batch-size"),
        (["prune", "--checkpoint", "x", "--out", "o"], "expected --plan FILE, or --data and a budget, got neither"),
        (["prune", "--checkpoint", "x", "--out", "o", "--data", "digits"], "expected --data with --plan, --ratios, or"),
        (
            ["prune", "--checkpoint", "x", "--out", "o", "--plan", "p", "--target-macs", "0.5"],
            "expected --plan or a budget, got both --plan and --target-macs",
        ),
        (
            ["prune", "--checkpoint", "x", "--out", "o", "--plan", "p", "--data", "digits", "--one-shot"],
            "expected --plan without --data for --one-shot, got both",
        ),
        (["shear"], "No such command 'shear'"),
        (["inspect", "--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str], text: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    flat = " ".join(err.replace("│", " ").split())  # typer draws a box round it
    assert text in flat


def test_random_weights_are_taken_when_asked_for(run_json: Callable[..., dict[str, object]]) -> None:
    found = run_json("evaluate", *MODEL, "--no-pretrained", "--data", "digits", "--max-images", 8)
    assert found["images"] == 8


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"secateur {secateur.__version__}\n", "")
    code, folder, _ = run("--cmake-dir")
    assert code == 0
    assert (Path(folder.strip()) / "secateurConfig.cmake").is_file()
    code, out, _ = run("--help")
    assert code == 0
    for command in ("inspect", "calibrate", "plan", "prune", "evaluate", "finetune", "bench", "demo"):
        assert command in out
        assert run(command, "--help")[0] == 0


def test_cmake_dir_of_a_build_without_library(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secateur.core.bindings._core, "__file__", str(tmp_path / "_core.so"))
    expected = (
        f"cmake_dir: expected a package built with SECATEUR_INSTALL=ON, got none in {tmp_path}/lib/cmake/secateur"
    )
    assert run("--cmake-dir") == (1, "", f"secateur: {expected}\n")


def test_as_a_module_in_its_own_process(dense: Path) -> None:
    command = [sys.executable, "-m", "secateur", "inspect", "--checkpoint", str(dense), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["params"] > 0
    module = "import runpy; runpy.run_module('secateur', run_name='__main__', alter_sys=True)"
    code, out, errors = run_script(module, *command[3:-2], "nowhere", fresh=True)
    assert (code, out) == (1, "")
    assert errors.startswith("secateur: --checkpoint: expected a checkpoint, got nowhere")


def test_the_installed_command() -> None:
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="secateur")
    assert command.load() is main


def test_search(
    run_json: Callable[..., dict[str, object]],
    run: Run,
    dense: Path,
    tmp_path: Path,
    digits_model: nn.Module,
) -> None:
    """The answer is the function's; history and plot are written; a finished search is not done again."""
    stats, out, resume = (tmp_path / name for name in ("s.st", "found.st", "search.st"))
    model = ["--checkpoint", dense]
    run_json("calibrate", *model, "--data", "digits", "--max-images", 64, "--out", stats)
    arguments = [*model, "--stats", stats, "--data", "digits", "--max-images", 128, "--out", out, "--method", "snp"]
    arguments += ["--rounds", 2, "--step", 0.2, "--round-to", 1, "--resume", resume]
    files = ["--history", tmp_path / "h.json", "--plot", tmp_path / "p.svg"]
    found = run_json("search", *arguments, "--macs", 0.8, *files)
    expected = secateur.search(
        digits_model,
        secateur.Statistics.load(stats),
        objective=secateur.LatencySensitive(macs=0.8),
        loader=loader("digits", digits_model, batch_size=64, max_images=128, shuffle=True),
        method="snp",
        rounds=2,
        step=0.2,
        round_to=1,
    )
    assert found == {**json.loads(json.dumps(expected.to_dict())), "file": str(out)}
    saved = secateur.load(out).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in expected.model.state_dict().items())
    assert json.loads((tmp_path / "h.json").read_text())["history"] == found["history"]
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    code, text, _ = run("search", *arguments, "--macs", 0.8)
    assert code == 0
    assert "is the answer" in text

    tuned = run_json(
        "search", *arguments[:-2], "--params", 0.9, "--rounds", 1, "--finetune", '{"steps": 2, "lr": 1e-5}'
    )  # fmt: skip
    assert len(tuned["history"]) == 2

    for wrong, message, expected_code in (
        ([], "expected one of --max-drop, --params, --macs and --latency, got none", 2),
        (["--macs", 0.5, "--max-drop", 1], "got --max-drop and --macs", 2),
        (["--macs", 0.5, "--finetune", "3"], "expected a JSON object", 2),
        (["--macs", 0.7], "resume: expected the file of this search", 1),
        (["--macs", 0.5], "rounds: expected at least 3 to remove 0.5", 1),
        (["--macs", 0.8, "--plot", tmp_path / "p.gif"], "expected a .pdf, .png, .svg file", 1),
    ):
        code, _, err = run("search", *arguments, *wrong)
        assert code == expected_code, err
        assert message in " ".join(err.replace("│", " ").split())


def test_rounding_by_the_steps_of_a_table(
    run: Run, run_json: Callable[..., dict[str, object]], state: Path, tmp_path: Path
) -> None:
    """plan, prune and search --round-to auto: the same sizes as with the table's numbers."""
    model = [*MODEL, "--checkpoint", state]
    table, stats, plan = (tmp_path / name for name in ("table.json", "s.st", "p.json"))
    assert run("bench", *model, "--table", table, "--groups", "ffn", "--repeats", 1)[0] == 0
    measured = secateur.LatencyTable.load(table)
    assert measured.steps is not None
    replace(measured, steps={"ffn": 20}).save(table)
    run_json("calibrate", *model, "--data", "digits", "--max-images", 8, "--collect", "scores", "--out", stats)
    auto = ["--round-to", "auto", "--latency-table", table]
    data = ["--data", "digits", "--max-images", 16]
    cut = ["--groups", "ffn", "--method", "snp", "--out", plan]
    for how in (
        ["plan", *model, "--stats", stats, "--target-macs", 0.6, *cut],
        ["prune", *model, *data, "--target-macs", 0.6, *cut],
        ["prune", *model, *data, "--target-macs", 0.6, "--one-shot", *cut],
        ["search", *model, *data, "--stats", stats, "--macs", 0.6, "--step", 0.4, "--rounds", 1, *cut],
    ):
        found, expected = run_json(*how, *auto), run_json(*how, "--round-to", '{"ffn": 20}')
        assert found == expected
    run_json("plan", *model, "--stats", stats, "--target-macs", 0.6, *cut, *auto)
    chosen = secateur.Plan.load(plan)
    assert chosen.options["round_to"] == {"ffn": 20}
    assert chosen.keep
    assert all(kept.shape[1] % 20 == 0 for kept in chosen.keep.values())
    for wrong, text in (
        (["--round-to", "auto"], 'round_to: expected latency_table= with "auto"'),
        (auto[2:], "--round-to auto"),
    ):
        code, _, err = run("plan", *model, "--stats", stats, "--target-macs", 0.6, *cut, *wrong)
        assert code in (1, 2)
        assert text in " ".join(err.replace("│", " ").split())


def test_a_budget_in_time(
    run: Run, run_json: Callable[..., dict[str, object]], state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bench --table, plan --target-latency: what is measured is taken as the table has it."""
    model = [*MODEL, "--checkpoint", state]
    table, stats, plan = (tmp_path / name for name in ("table.json", "s.st", "p.json"))
    found = run_json("bench", *model, "--table", table, "--batch-size", 3, "--groups", "ffn", "--repeats", 1)
    assert found["file"] == str(table)
    loaded = secateur.LatencyTable.load(table)
    assert (loaded.batch_size, loaded.machine.to_dict()) == (3, found["machine"])
    monkeypatch.setattr("secateur.plans.on_the_clock.measured_ratio", lambda *_: (0.98, (0.97, 0.99)))
    run_json("calibrate", *model, "--data", "digits", "--max-images", 8, "--collect", "scores", "--out", stats)
    budget = ["--target-latency", 0.99, "--latency-table", table, "--groups", "ffn", "--method", "snp"]
    found = run_json("plan", *model, "--stats", stats, *budget, "--out", plan)
    assert found["latency"]["measured"] == 0.98
    assert found["latency"] == secateur.Plan.load(plan).to_dict()["latency"]
    code, _, err = run("plan", *model, "--stats", stats, *budget, "--batch-size", 4, "--out", plan)
    assert code == 1
    assert "latency_table: expected one measured at batch_size 4, got one at 3" in err
    for wrong in (
        ["plan", *model, "--stats", stats, "--target-macs", 0.5, "--latency-table", table, "--out", plan],
        ["bench", *model, "--groups", "ffn"],
        ["bench", *model, "--table", table, "--input-size", 64],
    ):
        assert run(*wrong)[0] == 2
