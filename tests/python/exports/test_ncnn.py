"""ncnn's files."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from small_vits import small_vit
from torch import nn

CUT = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2, "blocks.1.attn": 1}


@pytest.fixture
def ncnn():
    """The engine; it and its converter are no part of the `test` extra."""
    pytest.importorskip("pnnx")
    return pytest.importorskip("ncnn")


def network(ncnn, param):
    """Loaded as a user would, in float32."""
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    assert net.load_param(str(param)) == 0
    assert net.load_model(str(param.with_suffix(".bin"))) == 0
    return net


def single(ncnn, net, image):
    """What it computes of one image, in three axes, as C++ programs have it."""
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(image.numpy()).clone())
    return torch.from_numpy(np.array(extractor.extract("out0")[1]))


def batched(ncnn, net, images):
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(images.numpy(), batch_index=0).clone())
    return torch.from_numpy(extractor.extract("out0")[1].numpy(batch_index=0).copy())


@pytest.mark.parametrize("layout", ["dense", "exact", "stock"])
def test_both_layouts_run_with_fused_attention(layout, digits_model, digits_images, ncnn, tmp_path, capfd):
    """timm's own attention makes tensors of five axes, which ncnn cannot; the model is as before afterwards."""
    if layout != "dense":
        sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=CUT), layout=layout)
    before = [(type(each), dict(vars(each))) for each in digits_model.modules()]
    capfd.readouterr()
    report = sc.export(digits_model, tmp_path / "m.ncnn.param", format="ncnn", batch_sizes=(1, 3))
    assert capfd.readouterr() == ("", "")
    for (kind, attributes), module in zip(before, digits_model.modules(), strict=True):
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
    assert [each.name for each in report.files] == ["m.ncnn.param", "m.ncnn.bin"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.ncnn.bin", "m.ncnn.param"]
    attention = 3 if layout == "dense" else 2
    assert (report.details["attention_fused"], report.details["attention_not_fused"]) == (attention, 0)
    with torch.no_grad():
        expected = digits_model(digits_images)
    net = network(ncnn, report.files[0])
    for index in (0, 5):
        assert torch.allclose(single(ncnn, net, digits_images[index]), expected[index], rtol=0, atol=1e-4)
    for batch in (1, 2, 33):
        found = batched(ncnn, net, digits_images[:batch])
        assert torch.allclose(found, expected[:batch], rtol=0, atol=1e-4)
    # Not the 16 bits that pnnx makes of them by itself.
    assert report.files[1].stat().st_size > 3.9 * sum(p.numel() for p in digits_model.parameters())


@pytest.mark.parametrize("more", [{"qk_norm": True}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}])
def test_other_vits(more, ncnn, tmp_path):
    model = small_vit(**more)
    sc.prune(model, sc.plan(model, method="magnitude", ratios={"qk": 0.3, "v": 0.3, "ffn": 0.2}))
    report = sc.export(model, tmp_path / "x.param", format="ncnn", batch_sizes=(2,))
    image = torch.randn(3, 12, 12)
    with torch.no_grad():
        expected = model(image[None])[0]
    assert torch.allclose(single(ncnn, network(ncnn, report.files[0]), image), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("ncnn")
def test_what_ncnn_cannot_is_named(tmp_path):
    swin = {"img_size": 32, "patch_size": 4, "window_size": 4, "depths": (2, 2), "num_heads": (1, 2), "embed_dim": 8}
    merged = small_vit()
    stats = sc.calibrate(merged, [torch.randn(32, 3, 12, 12)])
    sc.prune(merged, sc.plan(merged, stats, method="project", ratios={"blocks.1.tokens": 0.5}))
    for model, text in (
        (timm.models.swin_transformer.SwinTransformer(**swin).eval(), r"Tensor\.reshape .* in layers\.0\.blocks\.0; "),
        (small_vit(global_pool="map", class_token=False), r"Tensor\.reshape .* in attn_pool; pnnx: reshape has unsupp"),
        (merged, r"Tensor\.slice .*; pnnx: slice with step 2 is not supported$"),
    ):
        with pytest.raises(sc.Unsupported, match=f"^model: expected operators that ncnn has, got .*{text}"):
            sc.export(model, tmp_path / "x.param", format="ncnn")
    with pytest.raises(sc.Unsupported, match="^dtype: expected float32 for ncnn, got float16$"):
        sc.export(small_vit().half(), tmp_path / "x.param", format="ncnn")
    assert not list(tmp_path.iterdir())


class Drifting(nn.Module):
    """Computes something else where it is converted: stands for an engine that is wrong."""

    def forward(self, x):
        return x * 1.1 if torch.jit.is_tracing() else x


@pytest.mark.usefixtures("ncnn")
def test_the_module_that_differs_is_named_and_older_files_stay(tmp_path):
    model = small_vit()
    model.blocks[1].mlp.drop1 = Drifting()
    for name in ("x.param", "x.bin"):
        (tmp_path / name).write_text("older")
    with pytest.raises(sc.Error, match=r"; the first module that differs is blocks\.1\.mlp\.drop1 \(by [0-9.]+\)$"):
        sc.export(model, tmp_path / "x.param", format="ncnn", batch_sizes=(2,))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.bin", "x.param"]
    assert all(each.read_text() == "older" for each in tmp_path.iterdir())


# Programs that stand for the converter and the engine, so that what goes wrong in them can be had anywhere.
CONVERTER = """#!{python}
import sys
print("log of the converter", file=sys.stderr)
if {writes!r}:
    open("model.ncnn.param", "w").write("7767517\\n2 2\\nInput in0 0 1 in0\\n" + {writes!r})
    open("model.ncnn.bin", "w").write("weights")
sys.exit({status})
"""
ENGINE = """
import os
import sys
import numpy as np

__version__ = "1.0"


def layer_to_index(kind):
    return 7 if kind in ("Input", "Gemm", "SDPA", "Softmax") else -1


class Mat:
    def __init__(self, array, batch_index):
        self.array = array

    def clone(self):
        return self

    def numpy(self, batch_index):
        return self.array


class Net:
    opt = type("Option", (), {{}})()

    def load_param(self, path):
        if {does!r} == "does not load":
            print("layer not registered", file=sys.stderr)
            return -1
        return 0

    def load_model(self, path):
        return 0

    def output_names(self):
        return ["out0"]

    def create_extractor(self):
        return self

    def input(self, name, images):
        if {does!r} == "dies":
            os.abort()
        self.images = images.array
        return 0

    def extract(self, name):
        if {does!r} == "fails":
            return -100, None
        return 0, Mat(np.full((len(self.images), 5), {number}, np.float32), 0)
"""


class Constant(nn.Module):
    """A model of five outputs, all the same: the standing engine computes it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.pretrained_cfg = self.default_cfg = {"input_size": (3, 4, 4)}

    def forward(self, x):
        return self.weight * torch.ones(len(x), 5) + 0 * x.sum()


def stand_in(folder, monkeypatch, writes="Gemm gemm 1 1 in0 out0\n", status=0, does="runs", number=1.0):
    """Let the fake converter and engine be what is imported, here and in processes that are started."""
    folder.mkdir()
    program = folder / "converter"
    program.write_text(CONVERTER.format(python=sys.executable, writes=writes, status=status))
    program.chmod(0o755)
    (folder / "pnnx.py").write_text(f"EXEC_PATH = {str(program)!r}\n__version__ = '7'\n")
    (folder / "ncnn.py").write_text(ENGINE.format(does=does, number=number))
    monkeypatch.syspath_prepend(str(folder))
    for name in ("pnnx", "ncnn"):
        # Forgotten afterwards, or what it was before.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.param"


def test_what_the_report_says(tmp_path, out, monkeypatch):
    layers = "Gemm a 1 1 in0 1\nSDPA b 3 1 1 1 1 2\nSoftmax c 1 1 2 3\nGemm d 1 1 3 out0\n"
    stand_in(tmp_path / "fake", monkeypatch, writes=layers)
    report = sc.export(Constant().eval(), out, format="ncnn", batch_sizes=(2, 5))
    assert report.difference == 0
    assert (report.engine, report.version, report.batch_sizes) == ("ncnn 1.0", "pnnx 7", (2, 5))
    assert report.details == {"attention_fused": 1, "attention_not_fused": 1, "operators": 4}
    assert [each.name for each in report.files] == ["x.param", "x.bin"]
    assert report.size == sum(each.stat().st_size for each in out.parent.iterdir())


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ({"writes": ""}, sc.Unsupported, "^model: expected one that pnnx converts, got log of the converter$"),
        ({"status": 3}, sc.Unsupported, "^model: expected one that pnnx converts, got log of the converter$"),
        (
            {"writes": "Tensor.flip a 1 1 in0 1\nTensor.flip b 1 1 1 out0\n"},
            sc.Unsupported,
            r"^model: expected operators that ncnn has, got Tensor\.flip \(2\)$",
        ),
        ({"does": "does not load"}, sc.Error, "to take a batch of 1, got a file that it does not load: layer not reg"),
        ({"does": "dies"}, sc.Error, "to take a batch of 1, got a process that ended by signal 6$"),
        ({"does": "fails"}, sc.Error, r"to take a batch of 1, got ncnn computes no out0 \(status -100\)$"),
        (
            {"number": 1.1},
            sc.Error,
            "^export: expected ncnn 1.0 to compute what the model does, got a differ",
        ),
    ],
)
def test_converters_and_engines_that_fail(fault, kind, text, tmp_path, out, monkeypatch):
    """A converter that ends well without a file that loads; an engine that ends its process."""
    stand_in(tmp_path / "fake", monkeypatch, **fault)
    for name in ("x.param", "x.bin"):
        (out.parent / name).write_text("older")
    with pytest.raises(kind, match=text):
        sc.export(Constant().eval(), out, format="ncnn")
    assert sorted(each.name for each in out.parent.iterdir()) == ["x.bin", "x.param"]
    assert all(each.read_text() == "older" for each in out.parent.iterdir())


@pytest.mark.parametrize("package", ["pnnx", "ncnn"])
def test_a_missing_package_is_named_with_what_installs_it(package, tmp_path, out, monkeypatch):
    stand_in(tmp_path / "fake", monkeypatch)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    text = rf"^format: expected {package} to be installed \(pip install 'secateur\[ncnn\]'\), got none$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.export(Constant().eval(), out, format="ncnn")
    with pytest.raises(sc.InvalidArgument, match=r"^path: expected a name that ends in \.param for ncnn, got x\.bin$"):
        sc.export(Constant().eval(), out.with_name("x.bin"), format="ncnn")
    assert not list(out.parent.iterdir())
