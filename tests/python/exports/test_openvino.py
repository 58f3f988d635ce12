"""OpenVINO's files."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from small_vits import small_vit
from torch import nn

openvino = pytest.importorskip("openvino")
VERSION = openvino.__version__.split("-")[0]


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine threads wait for each other."""
    torch.set_num_threads(1)


def outputs(file, images):
    """What the file computes in float32, loaded as a user would."""
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(np.array(compiled(images.numpy())[0]))


def even_vit():
    """Heads of 8, width 24 and 48 channels: groups of 8 divide every layer's inputs."""
    return small_vit(embed_dim=24, mlp_ratio=2)


def test_batches_of_any_size_and_what_the_report_says(tmp_path):
    model = small_vit()
    report = sc.export(model, tmp_path / "model.xml", format="openvino", batch_sizes=(1, 3))
    assert [file.name for file in report.files] == ["model.xml", "model.bin"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert report.engine == f"OpenVINO {VERSION}"
    (version,) = re.findall(r'<net name="[^"]*" version="(\d+)"', (tmp_path / "model.xml").read_text()[:500])
    assert report.version == f"IR {version}"
    assert report.details["attention_fused"] + report.details["attention_not_fused"] == 3
    assert f"converted from {report.details['converted_from']}" in str(report)
    read = openvino.Core().read_model(tmp_path / "model.xml")
    assert str(read.inputs[0].partial_shape) == "[?,3,12,12]"
    assert (read.inputs[0].names, read.outputs[0].names) == ({"images"}, {"output"})
    for batch in (1, 5, 33):
        images = torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            assert torch.allclose(outputs(tmp_path / "model.xml", images), model(images), rtol=0, atol=1e-5)
    # Not the 16 bits that OpenVINO would make of them.
    assert report.files[1].stat().st_size >= 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("source", ["onnx", "torch"])
def test_both_ways_fuse_attention_of_unequal_sizes(source, digits_model, digits_images, tmp_path):
    """Queries of other sizes than values, a narrower stream, and a layer less."""
    ratios = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2, "blocks.1.attn": 1}
    sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=ratios))
    assert all(block.attn.fused_attn for block in digits_model.blocks if hasattr(block.attn, "fused_attn"))
    report = sc.export(digits_model, tmp_path / "x.xml", format="openvino", source=source, batch_sizes=(2,))
    assert all(block.attn.fused_attn for block in digits_model.blocks if hasattr(block.attn, "fused_attn"))
    assert report.details["converted_from"] == source
    assert (report.details["attention_fused"], report.details["attention_not_fused"]) == (2, 0)
    with torch.no_grad():
        assert torch.allclose(outputs(tmp_path / "x.xml", digits_images), digits_model(digits_images), atol=1e-4)


def test_of_both_ways_the_one_with_fewer_operators_is_taken(digits_model, tmp_path):
    sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios={"qk": 0.4, "v": 0.2}))
    found = {
        source: sc.export(digits_model, tmp_path / f"{source}.xml", format="openvino", source=source).details
        for source in ("onnx", "torch", "auto")
    }
    assert found["onnx"]["operators"] < found["torch"]["operators"]
    assert found["auto"] == found["onnx"]


def test_merged_tokens(digits_model, digits_images, tmp_path):
    stats = sc.calibrate(digits_model, [digits_images[:32]])
    plan = sc.plan(digits_model, stats, method="project", ratios={"blocks.1.tokens": 0.25, "ffn": 0.2})
    whole = digits_model(digits_images).detach()
    sc.prune(digits_model, plan)
    sc.export(digits_model, tmp_path / "x.xml", format="openvino", batch_sizes=(1, 3))
    with torch.no_grad():
        expected = digits_model(digits_images)
    assert torch.allclose(outputs(tmp_path / "x.xml", digits_images), expected, rtol=0, atol=1e-4)
    assert float((expected - whole).abs().max()) > 1e-2


@pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "mobilenetv2_100"])
def test_other_families(architecture, tmp_path):
    torch.manual_seed(0)
    more = {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (3, 6)} if "swin" in architecture else {}
    model = timm.create_model(architecture, num_classes=7, **more).eval()
    if not more:
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    ratios = {"qk": 0.3, "v": 0.4, "ffn": 0.3} if more else {"conv": 0.4, "width": 0.2}
    sc.prune(model, sc.plan(model, method="magnitude", ratios=ratios))
    sc.export(model, tmp_path / "x.xml", format="openvino", batch_sizes=(1, 3))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    assert torch.allclose(
        outputs(tmp_path / "x.xml", images), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


class Drifting(nn.Module):
    """Computes something else where it is exported: stands for an engine that is wrong."""

    def forward(self, x):
        return x * 1.1 if torch.compiler.is_exporting() else x


def test_the_module_that_differs_is_named_and_older_files_stay(tmp_path):
    model = small_vit()
    model.blocks[1].mlp.drop1 = Drifting()
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("older")
    with pytest.raises(sc.Error, match=r"; the first module that differs is blocks\.1\.mlp\.drop1 \(by [0-9.]+\)$"):
        sc.export(model, tmp_path / "model.xml", format="openvino")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert all(file.read_text() == "older" for file in tmp_path.iterdir())


@pytest.mark.parametrize("package", ["openvino", "onnx", "onnxscript", "nncf"])
def test_a_missing_package_is_named_with_what_installs_it(package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    text = rf"^format: expected {package} to be installed \(pip install 'secateur\[openvino\]'\), got none$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.export(even_vit(), tmp_path / "x.xml", format="openvino", int4=package == "nncf", group_size=8)
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path):
    model, images = even_vit(), [torch.randn(2, 3, 12, 12)]
    dividing = "expected an even divisor of every linear layer's inputs, got"
    odd = small_vit()  # width 27, 59 channels
    for net, name, given, text in (
        (model, "x.onnx", {}, r"^path: expected a name that ends in \.xml for openvino, got x\.onnx$"),
        (model, "x.xml", {"source": "jit"}, "^source: expected one of auto, onnx, torch, got 'jit'$"),
        (model, "x.xml", {"int8": True, "int4": True}, "^int8, int4: expected one of them, got both$"),
        (model, "x.xml", {"int8": True}, "^loader: expected batches of images to calibrate int8 on, got None$"),
        (model, "x.xml", {"loader": images}, "^loader: expected None without int8 or int4, got one$"),
        (even_vit().double(), "x.xml", {}, "^dtype: expected float32 or float16 for openvino, got float64$"),
    ):
        with pytest.raises(sc.Error, match=text):
            sc.export(net, tmp_path / name, format="openvino", **given)
    pytest.importorskip("nncf")
    model = even_vit()
    for net, given, text in (
        (
            model,
            {},
            f"^group_size: {dividing} 32 where blocks.0.attn.qkv and .* more have 24; 2, 4, 6, 8, 12, 24, 0 would do$",
        ),
        (model, {"group_size": 3}, rf"^group_size: {dividing} 3 \(odd\); 2, 4, 6, 8, 12, 24, 0 would do$"),
        (odd, {"group_size": 0}, f"^group_size: {dividing} 0 where .* have 27; none would do: plan with round_to=32"),
        (even_vit().half(), {"group_size": 8}, "^dtype: expected float32 for int4, got float16$"),
    ):
        with pytest.raises(sc.Error, match=text):
            sc.export(net, tmp_path / "x.xml", format="openvino", int4=True, **given)
    assert not list(tmp_path.iterdir())


def test_int8_of_a_trained_model(digits_model, digits_images, tmp_path, capfd):
    """Integer weights of linear layers alone: the sums that they are added to stay float32."""
    pytest.importorskip("nncf")
    capfd.readouterr()
    report = sc.export(
        digits_model, tmp_path / "x.xml", format="openvino", int8=True, loader=digits_images.split(20), max_images=50
    )
    out, err = capfd.readouterr()
    assert out == ""
    assert "INFO" not in err  # NNCF's own; torch may miss a compiler
    with torch.no_grad():
        expected = digits_model(digits_images)
    found = outputs(tmp_path / "x.xml", digits_images)
    assert 0.001 < float((found - expected).norm() / expected.norm()) < 0.08
    with torch.no_grad():
        first = float((found[:50] - expected[:50]).norm() / expected[:50].norm())
    assert report.details["relative_error"] == pytest.approx(first, rel=0.02)
    agree = float((found[:50].argmax(1) == expected[:50].argmax(1)).double().mean())
    assert report.details["agreement"] == pytest.approx(agree)
    assert (report.details["weights"], report.details["images"]) == ("int8", 50)
    read = openvino.Core().read_model(tmp_path / "x.xml")
    quantized = [each for each in read.get_ops() if each.get_type_name() == "FakeQuantize"]
    assert quantized
    for each in quantized:  # what takes 8 bits is what has weights, or changes no number
        for taken in each.outputs()[0].get_target_inputs():
            assert taken.get_node().get_type_name() in ("MatMul", "Convolution", "ShapeOf")
    assert report.files[1].stat().st_size < 0.35 * 4 * sum(p.numel() for p in digits_model.parameters())


def test_int4(tmp_path):
    pytest.importorskip("nncf")
    model = even_vit()
    images = torch.randn(9, 3, 12, 12)
    for size in (8, 0):
        report = sc.export(
            model, tmp_path / "x.xml", format="openvino", int4=True, group_size=size, loader=[images], batch_sizes=(2,)
        )
        found = outputs(tmp_path / "x.xml", images)
        with torch.no_grad():
            expected = model(images)
        error = float((found - expected).norm() / expected.norm())
        assert 0 < error < 0.4
        assert report.details["relative_error"] == pytest.approx(error, rel=0.02)
        assert (report.details["weights"], report.details["group_size"]) == ("int4", size)


def test_a_file_that_computes_something_else_than_its_integers_say(tmp_path, monkeypatch):
    """Here what they are compared with are the float weights: they stand for an engine that reads integers wrongly."""
    pytest.importorskip("nncf")
    from secateur.exports import openvino as exporter

    compress, kept = exporter.in_int4, []
    monkeypatch.setattr(exporter, "in_int4", lambda model, size: kept.append(model) or compress(model, size))
    monkeypatch.setattr(exporter, "decompressed", lambda _: kept[0])
    with pytest.raises(sc.Error, match="to compute what the integers of its file say, got a difference of .* of 3$"):
        sc.export(even_vit(), tmp_path / "x.xml", format="openvino", int4=True, group_size=8, batch_sizes=(3,))
    assert not list(tmp_path.iterdir())
