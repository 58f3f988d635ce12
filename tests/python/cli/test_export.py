"""`secateur export`: from a model file to another engine's, with a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from PIL import Image
from secateur.cli.app import main
from secateur.exports.base import exporters

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.replace("│", " ").split())

    return call


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose heads and channels are cut to odd sizes, saved."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=14, num_heads=2, depth=2, num_classes=5
    ).eval()
    sc.prune(model, sc.plan(model, method="magnitude", ratios={"qk": 0.3, "v": 0.5, "ffn": 0.4}))
    path = tmp_path_factory.mktemp("models") / "pruned.safetensors"
    sc.save(model, path)
    return path


def test_onnx(run: Run, pruned: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.onnx"
    command = ["export", "--checkpoint", pruned, "--format", "onnx", "--out", out, "--batch-sizes", "1,3"]
    code, text, error = run(*command, "--option", "opset=18", "--json")
    assert code == 0, error
    found = json.loads(text)
    assert (found["format"], found["files"], found["size"]) == ("onnx", [str(out)], out.stat().st_size)
    assert (found["version"], found["batch_sizes"]) == ("opset 18", [1, 3])
    images = torch.randn(5, 3, 8, 8)
    (logits,) = onnxruntime.InferenceSession(str(out)).run(None, {"images": images.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(logits, sc.load(pruned)(images).numpy(), atol=1e-5)


def test_native(run: Run, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    code, text, error = run("export", "--checkpoint", pruned, "--format", "native", "--out", out)
    assert code == 0, error
    assert text.startswith("native")
    assert out.name in text
    expected = sc.load(pruned).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in sc.load(out).state_dict().items())


def test_what_is_refused(run: Run, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    common = ["export", "--checkpoint", pruned, "--out", out]
    for more, code, text in (
        (["--format", "gif"], 1, f"secateur: format: expected one of {', '.join(exporters.names())}, got 'gif'"),
        (["--option", "level=3"], 1, "int8, static, loader, max_images, got 'level'"),
        (["--batch-sizes", "1;2"], 2, "expected integers with commas between them for --option batch_sizes, got '1;2'"),
        (["--batch-sizes", "2", "--option", "batch-sizes=3"], 2, "expected --option batch_sizes once, got it twice"),
        (["--option", "opset=new"], 2, "expected an integer for --option opset, got 'new'"),
        (["--batch-sizes", "0"], 1, "secateur: batch_sizes: expected an integer of at least 1, got 0"),
    ):
        found, printed, error = run(*common, *more)
        assert (found, printed) == (code, "")
        assert text in error
    code, _, error = run("export", "--checkpoint", pruned, "--out", tmp_path / "none" / "model.onnx")
    assert code == 1
    assert error.startswith("secateur: --out: expected a file in an existing folder")
    assert not out.exists()


def test_int8_with_images_of_a_folder(run: Run, pruned: Path, tmp_path: Path) -> None:
    """The ranges come from the folder's images, as many as are asked for."""
    pytest.importorskip("onnxruntime")
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    command = ["export", "--checkpoint", pruned, "--out", tmp_path / "x.onnx", "--data", tmp_path / "images"]
    code, text, error = run(*command, "--option", "int8=true", "--option", "static=true", "--max-images", 7, "--json")
    assert code == 0, error
    details = json.loads(text)["details"]
    assert (details["weights"], details["images"]) == ("int8", 7)
    assert 0 < details["relative_error"] < 0.2
    code, text, error = run(*command, "--json")
    assert (code, text) == (1, "")
    assert error.startswith("secateur: loader: expected None without int8, got one")
    command = ["export", "--checkpoint", pruned, "--format", "native", "--out", tmp_path / "x", "--data", tmp_path]
    code, text, error = run(*command)
    assert (code, text) == (2, "")
    assert "expected no --data for native, which has no fewer bits" in error


def test_a_folder_is_new_or_empty(run: Run, pruned: Path, tmp_path: Path) -> None:
    common = ["export", "--checkpoint", pruned, "--format", "hub", "--out"]
    (tmp_path / "empty").mkdir()
    assert run(*common, tmp_path / "empty")[0] == 0
    held = sorted(each.name for each in (tmp_path / "empty").iterdir())
    assert held == ["config.json", "model.safetensors"]
    code, _, error = run(*common, tmp_path / "empty")
    assert code == 1
    assert error.startswith("secateur: --out: expected a new or empty folder in an existing one, got ")
