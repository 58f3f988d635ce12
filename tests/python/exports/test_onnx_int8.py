"""ONNX files with linear layers of 8 bits."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import onnx
import onnxruntime
import pytest
import secateur as sc
import torch
from onnx.numpy_helper import to_array
from onnx.reference import ReferenceEvaluator
from small_vits import small_vit


def outputs(file, images):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("static", [False, True])
def test_a_trained_model(static, digits_model, digits_images, tmp_path, capfd, caplog):
    file = tmp_path / "x.onnx"
    report = sc.export(
        digits_model, file, int8=True, static=static, loader=digits_images.split(20), max_images=50, batch_sizes=(1, 3)
    )
    assert "".join(capfd.readouterr()) == ""
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR", "CRITICAL")]
    assert list(tmp_path.iterdir()) == [file]
    with torch.no_grad():
        expected = digits_model(digits_images)
    # One by one: without static, the range of activations is that of a batch.
    found = torch.cat([outputs(file, image) for image in digits_images[:50].split(1)])
    assert 0.001 < relative(found, expected[:50]) < 0.03
    assert report.details["relative_error"] == pytest.approx(relative(found, expected[:50]), rel=0.02)
    agree = float((found.argmax(1) == expected[:50].argmax(1)).double().mean())
    assert report.details["agreement"] == pytest.approx(agree)
    # Of each block qkv, proj, fc1 and fc2, and the head.
    assert (report.details["weights"], report.details["images"], report.details["linear_layers"]) == ("int8", 50, 13)
    assert 0.001 < report.difference < 0.05 * float(expected.abs().max())
    assert relative(outputs(file, digits_images[:33]), expected[:33]) < 0.03
    assert file.stat().st_size < 0.5 * 4 * sum(p.numel() for p in digits_model.parameters())


@pytest.mark.parametrize("static", [False, True])
def test_only_what_linear_layers_take_is_rounded(static, digits_model, digits_images, tmp_path):
    """The integers are the layers' weights, each column with a scale of its own; residual sums stay float32."""
    file = tmp_path / "x.onnx"
    sc.export(digits_model, file, int8=True, static=static, loader=[digits_images] if static else None)
    read = onnx.load(file)
    onnx.checker.check_model(read)
    assert {each.domain for each in read.opset_import} <= {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
    assert max(each.version for each in read.opset_import if each.domain == "") == 20
    nodes, held = read.graph.node, {each.name: to_array(each) for each in read.graph.initializer}
    made_by = {name: node for node in nodes for name in node.output}
    rounds = [node for node in nodes if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")]
    # Each takes what a norm, an activation, attention or the choice of a token gives; no sum.
    assert {made_by[node.input[0]].op_type for node in rounds} <= {
        "LayerNormalization",
        "Gelu",
        "Reshape",
        "Gather",
        "Slice",
    }
    products = [node for node in nodes if node.op_type in ("MatMul", "Gemm", "MatMulInteger")]
    rounded = [node for node in products if node.op_type == "MatMulInteger"]
    if static:
        rounded = [node for node in products if made_by.get(node.input[1], node).op_type == "DequantizeLinear"]
    assert (len(products), len(rounded)) == (19, 13)
    fc1 = digits_model.blocks[1].mlp.fc1.weight.detach().numpy().T
    step = (np.maximum(fc1.max(0), 0) - np.minimum(fc1.min(0), 0)) / 255
    kept = [name for name, value in held.items() if value.dtype == np.uint8 and value.shape == fc1.shape]
    closest = []
    for name in kept:
        stem = name.removesuffix("_quantized")
        weights = (held[name].astype(np.float32) - held[f"{stem}_zero_point"]) * held[f"{stem}_scale"]
        closest.append(float((np.abs(weights - fc1) / step).max()))
    assert min(closest) < 1.01  # a step, since the zero is rounded too


@pytest.mark.parametrize("static", [False, True])
def test_onnxruntime_multiplies_the_integers_without_saturating(static, digits_model, digits_images, tmp_path):
    """As onnx's own evaluator does. Of signed integers, processors without VNNI make another 0.026."""
    file = tmp_path / "x.onnx"
    sc.export(digits_model, file, int8=True, static=static, loader=[digits_images] if static else None)
    images = digits_images[:4]
    (found,) = ReferenceEvaluator(str(file)).run(None, {"images": images.numpy()})
    assert relative(outputs(file, images), torch.from_numpy(found)) < 0.006
    assert {each.data_type for each in onnx.load(file).graph.initializer if len(each.dims) == 2} <= {1, 2}  # no int8


def test_static_ranges_are_those_of_the_images_that_are_read(digits_model, digits_images, tmp_path):
    taken = []
    # A norm's output has about the same range for any images.
    digits_model.blocks[0].mlp.act.register_forward_hook(lambda _module, _given, output: taken.append(output))
    with torch.no_grad():
        digits_model(digits_images[:20])
    digits_model.blocks[0].mlp.act._forward_hooks.clear()
    loader = [digits_images]  # of which the others reach 7 % further
    sc.export(digits_model, tmp_path / "x.onnx", int8=True, static=True, loader=loader, max_images=20)
    graph = onnx.load(tmp_path / "x.onnx").graph
    held = {each.name: to_array(each) for each in graph.initializer}
    activated = next(node.output[0] for node in graph.node if node.op_type == "Gelu")
    (first,) = (node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == activated)
    wanted = float(taken[0].max() - taken[0].min()) / 255
    assert float(held[first.input[1]]) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_and_weights_in_a_second_file(static, opset, tmp_path):
    model, images = small_vit(), torch.randn(9, 3, 12, 12)
    more = {"static": True, "loader": [images]} if static else {}
    file = tmp_path / "x.onnx"
    with pytest.warns(UserWarning, match="^opset: ") if opset == 23 else nullcontext():
        report = sc.export(model, file, int8=True, opset=opset, external_data=True, **more)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    assert [each.name for each in report.files] == ["x.onnx", "x.onnx.data"]
    with torch.no_grad():
        assert 0.0001 < relative(outputs(file, images), model(images)) < 0.05
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("Attention") == (3 if opset == 23 else 0)
    assert [each.version for each in onnx.load(file).opset_import if each.domain in ("", "ai.onnx")] == [opset]


def test_int8_that_loses_the_output_is_refused(tmp_path):
    """A channel of the residual stream that is 100,000 times as large as the others, as large ViTs have some."""
    model, images = small_vit(), torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[3] *= 1e5
                norm.bias[3] *= 1e5
                layer.weight[:, 3] /= 1e5
    (tmp_path / "x.onnx").write_text("older")
    with pytest.raises(
        sc.Error, match="^export: expected int8 to keep the outputs, got a relative error of .* on random im"
    ):
        sc.export(model, tmp_path / "x.onnx", int8=True)
    with pytest.raises(
        sc.Error, match="^export: expected int8 to keep the outputs, got a relative error of .* on 5 im"
    ):
        sc.export(model, tmp_path / "x.onnx", int8=True, static=True, loader=[images])
    assert (tmp_path / "x.onnx").read_text() == "older"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.onnx"]


def test_a_channel_that_is_large_costs_much_and_is_no_fault_of_the_engine(tmp_path):
    """As some are in large ViTs: 8 bits for the range of all channels leave the others a few steps."""
    model = small_vit()
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[3] *= 100
                layer.weight[:, 3] /= 100
        images = torch.randn(5, 3, 12, 12)
        expected = model(images)
    report = sc.export(model, tmp_path / "x.onnx", int8=True, loader=[images])
    assert 0.05 < report.details["relative_error"] < 0.5
    found = torch.cat([outputs(tmp_path / "x.onnx", image) for image in images.split(1)])
    assert report.details["relative_error"] == pytest.approx(relative(found, expected), rel=1e-3)


def test_outputs_of_zero_are_kept(tmp_path):
    """Heads are zero before they are trained."""
    model = small_vit()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    assert sc.export(model, tmp_path / "x.onnx", int8=True).difference == 0


def test_a_file_that_computes_something_else_than_its_integers_say(tmp_path, monkeypatch):
    """Here what they are compared with is shifted: stands for an engine that reads integers wrongly."""
    from secateur.exports import onnx as exporter

    session = exporter._session

    def shifted(path, optimized=True):
        engine, run = session(path, optimized)
        return engine, run if optimized else lambda images: run(images) + 50

    monkeypatch.setattr(exporter, "_session", shifted)
    with pytest.raises(sc.Error, match="to compute what the integers of its file say, got a difference of .* of 3$"):
        sc.export(
            small_vit(),
            tmp_path / "x.onnx",
            int8=True,
            static=True,
            loader=[torch.randn(4, 3, 12, 12)],
            batch_sizes=(3,),
        )
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path):
    model, images = small_vit(), [torch.randn(2, 3, 12, 12)]
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).eval()
    convolution.pretrained_cfg = {"input_size": (3, 12, 12)}
    for net, given, text in (
        (model, {"static": True}, "^static: expected False without int8, got True$"),
        (model, {"int8": True, "static": True}, "^loader: expected batches of images to calibrate int8 on, got None$"),
        (model, {"loader": images}, "^loader: expected None without int8, got one$"),
        (model, {"int8": True, "loader": []}, "^loader: expected images, got none$"),
        (model, {"int8": True, "loader": images, "max_images": 0}, "^max_images: expected an integer of at least 1"),
        (small_vit().half(), {"int8": True}, "^dtype: expected float32 for int8, got float16$"),
        (convolution, {"int8": True}, "^int8: expected a model with linear layers, got none in its file$"),
    ):
        with pytest.raises(sc.Error, match=text):
            sc.export(net, tmp_path / "x.onnx", **given)
    assert not list(tmp_path.iterdir())
