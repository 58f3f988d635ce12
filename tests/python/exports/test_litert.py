"""LiteRT's files."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import secateur as sc
import timm
import torch
from small_vits import small_vit
from torch import nn

CUT = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2, "blocks.1.attn": 1}


@pytest.fixture
def litert():
    """The engine's interpreter; it and its converter are no part of the `test` extra."""
    # The converter itself refers to what torch and jax will remove.
    pytest.importorskip("ai_edge_litert")
    if importlib.util.find_spec("litert_torch") is None:
        pytest.skip("litert_torch is not installed")
    return importlib.import_module("ai_edge_litert.interpreter").Interpreter


def outputs(litert, file, signature, images):
    """What the file computes, loaded as a user would."""
    runner = litert(model_path=str(file), num_threads=1).get_signature_runner(signature)
    (name,) = runner.get_input_details()
    (found,) = runner(**{name: images.numpy()}).values()
    return torch.from_numpy(found)


@pytest.mark.parametrize("layout", ["dense", "exact", "stock"])
def test_both_layouts_and_a_signature_for_each_batch(layout, digits_model, digits_images, litert, tmp_path, capfd):
    if layout != "dense":
        sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=CUT), layout=layout)
    one = sc.export(digits_model, tmp_path / "one.tflite", format="litert")
    capfd.readouterr()
    report = sc.export(digits_model, tmp_path / "x.tflite", format="litert", batch_sizes=(3, 1, 3))
    assert capfd.readouterr() == ("", "")
    assert (one.batch_sizes, report.batch_sizes) == ((1,), (3, 1))
    assert report.details["signatures"] == "serving_default, batch_1"
    assert report.details["attention_not_fused"] == (3 if layout == "dense" else 2)
    assert report.size < 1.3 * one.size  # both use the same weights
    with torch.no_grad():
        expected = digits_model(digits_images)
    for file, signature, batch in (
        (one.files[0], "serving_default", 1),
        (report.files[0], "serving_default", 3),
        (report.files[0], "batch_1", 1),
    ):
        found = outputs(litert, file, signature, digits_images[:batch])
        assert torch.allclose(found, expected[:batch], rtol=0, atol=1e-4)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one.tflite", "x.tflite"]


def test_windows(litert, tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "depths": (2, 2), "num_heads": (1, 2), "embed_dim": 8}
    model = timm.models.swin_transformer.SwinTransformer(**sizes, num_classes=5).eval()
    sc.prune(model, sc.plan(model, method="magnitude", ratios={"qk": 0.3, "v": 0.4, "ffn": 0.3}))
    sc.export(model, tmp_path / "x.tflite", format="litert", batch_sizes=(2,))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    assert torch.allclose(outputs(litert, tmp_path / "x.tflite", "serving_default", images), expected, atol=1e-5)


class Drifting(nn.Module):
    """Computes something else where it is exported: stands for an engine that is wrong."""

    def forward(self, x):
        return x * 1.1 if torch.compiler.is_exporting() else x


@pytest.mark.usefixtures("litert")
def test_the_module_that_differs_is_named_and_older_files_stay(tmp_path):
    model = small_vit()
    model.blocks[1].mlp.drop1 = Drifting()
    (tmp_path / "x.tflite").write_text("older")
    with pytest.raises(sc.Error, match=r"; the first module that differs is blocks\.1\.mlp\.drop1 \(by [0-9.]+\)$"):
        sc.export(model, tmp_path / "x.tflite", format="litert")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["older"]


@pytest.mark.usefixtures("litert")
def test_what_litert_torch_does_not_convert(tmp_path):
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.pretrained_cfg = self.default_cfg = {"input_size": (3, 4, 4)}

        def forward(self, x):
            return self.weight * x[x > 0]

    with pytest.raises(sc.Unsupported, match="^model: expected one that litert-torch converts, got .+"):
        sc.export(Dynamic().eval(), tmp_path / "x.tflite", format="litert")
    assert not list(tmp_path.iterdir())


class Constant(nn.Module):
    """A model of five outputs, all the same: the standing engine computes it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.pretrained_cfg = self.default_cfg = {"input_size": (3, 4, 4)}

    def forward(self, x):
        return self.weight * torch.ones(len(x), 5) + 0 * x.sum()


def stand_in(monkeypatch, writes=True, fault=None, loads=True, number=1.0):
    """Let modules that stand for the converter and the engine be what is imported."""
    made = {name: ModuleType(name) for name in ("litert_torch", "ai_edge_litert", "ai_edge_litert.interpreter")}
    asked = []

    class Converter:
        def signature(self, name, model, example):
            asked.append((name, tuple(example[0].shape)))
            return self

        def convert(self):
            print("chatter")
            if fault:
                raise RuntimeError(fault)
            return self

        def export(self, path):
            if writes:
                with open(path, "w") as file:  # noqa: PTH123
                    file.write("weights")

    class Runner:
        def get_input_details(self):
            return {"args_0": None}

        def __call__(self, args_0):
            return {"output_0": torch.full((len(args_0), 5), number).numpy()}

    class Interpreter:
        def __init__(self, model_path, num_threads):
            if not loads:
                raise ValueError("not a flatbuffer")

        def get_signature_runner(self, name):
            return Runner()

    made["litert_torch"].signature = lambda *rest: Converter().signature(*rest)
    made["ai_edge_litert.interpreter"].Interpreter = Interpreter
    made["ai_edge_litert"].interpreter = made["ai_edge_litert.interpreter"]
    for name, module in made.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    from secateur.exports import litert as exporter

    monkeypatch.setattr(exporter, "version", lambda name: "7")
    monkeypatch.setattr(exporter, "_operators", lambda path: exporter.Counter(SOFTMAX=2, ADD=5))
    return asked


def test_what_the_report_says(tmp_path, monkeypatch, capfd):
    asked = stand_in(monkeypatch)
    report = sc.export(Constant().eval(), tmp_path / "x.tflite", format="litert", batch_sizes=(4, 2))
    assert asked == [("serving_default", (4, 3, 4, 4)), ("batch_2", (2, 3, 4, 4))]
    assert (report.difference, report.engine, report.version) == (0, "LiteRT 7", "litert-torch 7")
    assert report.details == {"signatures": "serving_default, batch_2", "attention_not_fused": 2, "operators": 7}
    assert [each.name for each in tmp_path.iterdir()] == ["x.tflite"]
    assert capfd.readouterr() == ("", "")
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ({"writes": False}, sc.Error, "^export: expected litert-torch to write x.tflite, got no file$"),
        (
            {"fault": "no lowering\nmore"},
            sc.Unsupported,
            "^model: expected one that litert-torch converts, got no lo",
        ),
        ({"loads": False}, sc.Error, "^export: expected a file that LiteRT loads, got not a flatbuffer$"),
        (
            {"number": 1.1},
            sc.Error,
            "^export: expected LiteRT 7 to compute what the model does, got a differ",
        ),
    ],
)
def test_converters_and_engines_that_fail(fault, kind, text, tmp_path, monkeypatch):
    stand_in(monkeypatch, **fault)
    (tmp_path / "x.tflite").write_text("older")
    with pytest.raises(kind, match=text):
        sc.export(Constant().eval(), tmp_path / "x.tflite", format="litert")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize("package", ["litert_torch", "ai_edge_litert"])
def test_a_missing_package_is_named_with_what_installs_it(package, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    text = rf"^format: expected {package} to be installed \(pip install 'secateur\[litert\]'\), got none$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.export(Constant().eval(), tmp_path / "x.tflite", format="litert")
    monkeypatch.undo()
    stand_in(monkeypatch)
    with pytest.raises(sc.Unsupported, match="^dtype: expected float32 for litert, got float64$"):
        sc.export(Constant().eval().double(), tmp_path / "x.tflite", format="litert")
    assert not list(tmp_path.iterdir())
