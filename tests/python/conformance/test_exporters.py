"""Every exporter that is registered: what it writes is read again, and computes what the model does."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from engines import installed
from secateur.exports.base import exporters

ALL = exporters.names()
NAMES = [name for name in ALL if installed(name)]
# These build the model by classes of their own, whose layers are alike.
ALIKE = {"timm", "transformers"}


def size_of(file):
    return sum(each.stat().st_size for each in (file, *file.rglob("*")) if each.is_file())


def is_near(report, batch_sizes):
    """Whether outputs were compared and are the same; or not compared, where the engine is on macOS alone."""
    if report.difference is None:
        return report.format == "coreml" and report.batch_sizes == () and "not run here" in str(report)
    return report.batch_sizes == batch_sizes and 0 <= report.difference < 1e-4


def file_of(name, folder, stem="model"):
    """A name that the engine takes."""
    return folder / f"{stem}{exporters.named(name).suffix or '.file'}"


def below(folder):
    """All files, also those of a format that is a folder of files."""
    return sorted(each for each in folder.rglob("*") if each.is_file())


def pruned(dense, layout="exact"):
    """Unequal queries and values, a head less, fewer channels, and one layer gone."""
    model = copy.deepcopy(dense)
    ratios = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "heads": 0.34, "width": 0.2, "blocks.1.attn": 1}
    sc.prune(model, sc.plan(model, method="magnitude", ratios=ratios), layout=layout)
    return model


@pytest.fixture
def made(make_digits_model):
    dense = make_digits_model()
    return {"dense": dense, "exact": pruned(dense), "stock": pruned(dense, "stock")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["dense", "exact", "stock"])
def test_a_transformer_is_exported_and_checked(name, which, made, tmp_path):
    model = made[which].train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = file_of(name, tmp_path)
    if name in ALIKE and which != "dense":
        with pytest.raises(sc.Unsupported, match=r"^blocks\.[01]\.attn: expected"):
            sc.export(model, file, format=name)
        assert not list(tmp_path.iterdir())
        return
    report = sc.export(model, file, format=name, batch_sizes=(1, 3))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert report.format == name
    if not exporters.named(name).folder:
        assert report.files[0] == file
    assert below(tmp_path) == sorted(each for file in report.files for each in (below(file) or [file]))
    assert report.size == sum(size_of(file) for file in report.files)
    assert is_near(report, (1, 3))
    assert json.loads(json.dumps(report.to_dict()))["format"] == name
    assert report.files[0].name in str(report)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIKE])
@pytest.mark.parametrize("architecture", ["resnet18", "mobilenetv2_100"])
def test_a_convolutional_network_is_exported_and_checked(name, architecture, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=7).eval()
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    sc.prune(model, sc.plan(model, method="magnitude", ratios={"conv": 0.4, "width": 0.2}))
    report = sc.export(model, file_of(name, tmp_path), format=name, batch_sizes=(2, 5))
    assert is_near(report, (2, 5))


@pytest.mark.parametrize("name", NAMES)
def test_options_are_documented_and_checked(name, made, tmp_path):
    options = exporters.named(name).Options
    assert is_dataclass(options)
    assert all(field.metadata["help"] for field in fields(options))
    for given, text in (
        ({"colour": "red"}, "^options: expected .*, got 'colour'$"),
        ({"batch_sizes": ()}, r"^batch_sizes: expected a sequence of numbers, got \(\)$"),
        ({"batch_sizes": (0,)}, "^batch_sizes: expected an integer of at least 1, got 0$"),
    ):
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.export(made["dense"], file_of(name, tmp_path), format=name, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_what_differs_is_an_error_and_leaves_no_new_file(name, made, tmp_path, monkeypatch):
    """The model's own answers change between the two: stands for an engine that computes something else."""
    if name == "coreml" and sys.platform != "darwin":
        pytest.skip("Core ML is on macOS alone")
    model, drift = made["dense" if name in ALIKE else "exact"], iter(np.linspace(1, 2, 99))
    monkeypatch.setattr(type(model), "forward_head", lambda self, x: self.head(x[:, 0]) + next(drift))
    with pytest.raises(sc.Error):
        sc.export(model, file_of(name, tmp_path), format=name)
    assert name == "native" or not list(tmp_path.iterdir())


def test_bad_input_is_one_clear_line(made, tmp_path):
    model = made["dense"]
    with pytest.raises(sc.InvalidArgument, match=f"^format: expected one of {', '.join(ALL)}, got 'tflite'$"):
        sc.export(model, tmp_path / "x", format="tflite")
    with pytest.raises(sc.InvalidArgument, match="^path: expected a file in an existing folder, got .*none"):
        sc.export(model, tmp_path / "none" / "x")
    with pytest.raises(sc.InvalidArgument, match="^model: expected an nn.Module, got str$"):
        sc.export("vit", tmp_path / "x")
    with pytest.raises(sc.InvalidArgument, match="^model: expected a model with weights, got one on the meta device$"):
        sc.export(copy.deepcopy(model).to("meta"), tmp_path / "x")
