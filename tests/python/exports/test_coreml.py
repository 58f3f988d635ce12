"""Core ML's packages; what they compute is read from their files, since Core ML itself is on macOS."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import mil
import pytest
import secateur as sc
import torch
from small_vits import small_vit
from torch import nn

CUT = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2, "blocks.1.attn": 1}


@pytest.fixture
def coreml():
    """The package; it is no part of the `test` extra."""
    return pytest.importorskip("coremltools")


@pytest.fixture
def on_macos(monkeypatch, coreml):
    """As if Core ML were here: it computes what the files say, `calls` holds which of them."""
    from secateur.exports import coreml as exporter

    calls = []

    def running(path):
        calls.append(path)
        return lambda images: mil.outputs(path, images)

    here = SimpleNamespace(platform="darwin")
    monkeypatch.setattr(exporter, "sys", here)
    monkeypatch.setattr(exporter, "platform", SimpleNamespace(mac_ver=lambda: ("15.1", ("", "", ""), "arm64")))
    monkeypatch.setattr(exporter, "_running", running)
    return calls


def close(package, model, images):
    (found,) = mil.outputs(package, images)
    with torch.no_grad():
        expected = model(images)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["dense", "exact", "stock"])
def test_batches_of_any_size_with_fused_attention(layout, digits_model, digits_images, coreml, tmp_path, capfd):
    """Core ML's operator has torch's own scale alone: that of heads which were cut goes into the queries."""
    if layout != "dense":
        plan = sc.plan(digits_model, method="magnitude", ratios=CUT)
        sc.prune(digits_model, plan, layout=layout)
    capfd.readouterr()
    package = tmp_path / "model.mlpackage"
    report = sc.export(digits_model, package, format="coreml", max_batch=9)
    assert capfd.readouterr() == ("", "")
    assert (report.difference, report.batch_sizes) == (None, ())
    assert report.engine == "not run here: Core ML needs macOS"
    assert report.engine in str(report)
    attention = 3 if layout == "dense" else 2
    assert (report.details["attention_fused"], report.details["attention_not_fused"]) == (attention, 0)
    assert report.size == sum(each.stat().st_size for each in package.rglob("*") if each.is_file())
    assert sorted(each.name for each in package.iterdir()) == ["Data", "Manifest.json"]
    for batch in (1, 2, 9):
        assert close(package, digits_model, digits_images[:batch])
    described = coreml.models.MLModel(str(package), skip_model_load=True).get_spec().description
    assert [each.name for each in (*described.input, *described.output)] == ["images", "output"]
    (taken,) = described.input
    sizes = taken.type.multiArrayType.shapeRange.sizeRanges
    assert [(each.lowerBound, each.upperBound) for each in sizes] == [(1, 9), (3, 3), (32, 32), (32, 32)]


def test_a_fixed_shape_in_halves(digits_model, digits_images, coreml, tmp_path):
    sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=CUT))
    package = tmp_path / "model.mlpackage"
    more = {"max_batch": 1, "batch_sizes": (1,)}
    single = sc.export(digits_model, package, format="coreml", **more)
    assert close(package, digits_model, digits_images[:1])
    package = tmp_path / "half.mlpackage"
    half = sc.export(digits_model, package, format="coreml", precision="float16", **more)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["half.mlpackage", "model.mlpackage"]
    described = coreml.models.MLModel(str(package), skip_model_load=True).get_spec().description
    assert list(described.input[0].type.multiArrayType.shape) == [1, 3, 32, 32]
    assert half.size < 0.7 * single.size
    assert (half.details["attention_fused"], half.details["max_batch"]) == (2, 1)


@pytest.mark.usefixtures("on_macos")
def test_where_core_ml_is_the_package_is_compared(tmp_path):
    report = sc.export(small_vit(), tmp_path / "x.mlpackage", format="coreml", batch_sizes=(1, 3))
    assert (report.engine, report.batch_sizes) == ("Core ML of macOS 15.1", (1, 3))
    assert 0 < report.difference < 1e-5


class Drifting(nn.Module):
    """Computes something else where it is exported: stands for an engine that is wrong."""

    def forward(self, x):
        return x * 1.1 if torch.compiler.is_exporting() else x


@pytest.mark.usefixtures("on_macos")
def test_the_module_that_differs_is_named_and_no_package_is_left(tmp_path):
    model = small_vit()
    model.blocks[1].mlp.drop1 = Drifting()
    with pytest.raises(sc.Error, match=r"; the first module that differs is blocks\.1\.mlp\.drop1 \(by [0-9.]+\)$"):
        sc.export(model, tmp_path / "x.mlpackage", format="coreml", batch_sizes=(2,))
    assert not list(tmp_path.iterdir())


def test_a_package_without_a_loadable_model(coreml, tmp_path, monkeypatch):
    """Stands for a converter that ends well."""

    def wrong(self, path):
        Path(path).mkdir()
        (Path(path) / "Manifest.json").write_text("{}")

    monkeypatch.setattr(coreml.models.MLModel, "save", wrong)
    with pytest.raises(sc.Error, match="^export: expected a package that coremltools reads, got "):
        sc.export(small_vit(), tmp_path / "x.mlpackage", format="coreml")
    monkeypatch.setattr(coreml.models.MLModel, "save", lambda self, path: None)
    with pytest.raises(sc.Error, match="^export: expected coremltools to write x.mlpackage, got no package$"):
        sc.export(small_vit(), tmp_path / "x.mlpackage", format="coreml")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("coreml")
def test_what_is_refused(tmp_path):
    other = tmp_path / "other.mlpackage"
    other.mkdir()
    (other / "mine").write_text("mine")
    for net, name, given, text in (
        (small_vit(), "x.xml", {}, r"^path: expected a name that ends in \.mlpackage for coreml, got x\.xml$"),
        (small_vit(), "other.mlpackage", {}, "^path: expected a new or empty folder in an existing one, got "),
        (small_vit(), "x.mlpackage", {"max_batch": 3}, r"^batch_sizes: expected at most max_batch \(3\), got 1, 2, 7$"),
        (small_vit().half(), "x.mlpackage", {}, r"^dtype: expected float32 for coreml \(.*\), got float16$"),
        (
            small_vit(),
            "x.mlpackage",
            {"precision": "int8"},
            "^precision: expected one of float32, float16, got",
        ),
    ):
        with pytest.raises(sc.Error, match=text):
            sc.export(net, tmp_path / name, format="coreml", **given)
    swin = sc_swin()
    with pytest.raises(sc.Unsupported, match="^model: expected one that coremltools converts, got .*rank 6 tensor"):
        sc.export(swin, tmp_path / "x.mlpackage", format="coreml")
    assert [each.name for each in tmp_path.iterdir()] == ["other.mlpackage"]
    assert (other / "mine").read_text() == "mine"


def sc_swin():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "depths": (2, 2), "num_heads": (1, 2)}
    return SwinTransformer(**sizes, embed_dim=8, num_classes=5).eval()


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "coremltools" else find(name, *rest)
    )
    text = r"^format: expected coremltools to be installed \(pip install 'secateur\[coreml\]'\), got none$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.export(small_vit(), tmp_path / "x.mlpackage", format="coreml")
    (tmp_path / "x.mlpackage").write_text("a file")
    with pytest.raises(
        sc.InvalidArgument, match="^path: expected a new or empty folder in an existing one, got .*x.mlpackage$"
    ):
        sc.export(small_vit(), tmp_path / "x.mlpackage", format="coreml")
