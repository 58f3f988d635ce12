"""ONNX files."""

from __future__ import annotations

import importlib.util

import onnx
import onnxruntime
import pytest
import secateur as sc
import torch
from small_vits import small_vit
from torch import nn


def test_one_file_of_the_opset_that_was_asked_for(tmp_path):
    model = small_vit()
    for opset in (18, 20):
        report = sc.export(model, tmp_path / f"{opset}.onnx", opset=opset)
        found = onnx.load(tmp_path / f"{opset}.onnx")
        onnx.checker.check_model(found)
        assert [each.version for each in found.opset_import if each.domain == ""] == [opset]
        assert report.version == f"opset {opset}"
        assert report.engine == f"onnxruntime {onnxruntime.__version__}"


def test_any_batch_size_runs(tmp_path):
    model = small_vit()
    sc.export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 5, 33):
        images = torch.randn(batch, 3, 12, 12)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert float((torch.from_numpy(found) - model(images)).abs().max()) < 1e-5


def test_weights_in_a_second_file(tmp_path):
    report = sc.export(small_vit(), tmp_path / "model.onnx", external_data=True)
    assert [file.name for file in report.files] == ["model.onnx", "model.onnx.data"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in report.files:
        file.rename(moved / file.name)
    onnxruntime.InferenceSession(str(moved / "model.onnx"))


def test_an_older_file_stays_where_the_export_fails(tmp_path):
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, images):
            if images.sum() > 0:  # depends on the values
                return images * self.scale
            return images

    file = tmp_path / "model.onnx"
    file.write_text("older")
    with pytest.raises(sc.Unsupported, match="^model: expected one that torch exports to ONNX, got "):
        sc.export(Sorted().eval(), file)
    assert file.read_text() == "older"
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    with pytest.raises(
        sc.InvalidArgument, match=r"expected onnxscript to be installed \(pip install 'secateur\[onnx\]'\)"
    ):
        sc.export(small_vit(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("opset", "text"),
    [
        (17, "^opset: expected an integer of at least 18, got 17$"),
        (99, "^opset: expected torch .* to write 99, got"),
    ],
)
def test_an_opset_that_is_not_written_is_an_error(tmp_path, opset, text, caplog):
    """torch itself logs a traceback and writes opset 18."""
    with pytest.raises(sc.Error, match=text):
        sc.export(small_vit(), tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR", "CRITICAL")]
