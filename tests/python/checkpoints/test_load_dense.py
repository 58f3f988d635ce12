"""load_dense: checkpoints in the forms in which training programs leave them, and what is refused."""

from __future__ import annotations

import argparse
import json
import pickle
from collections import OrderedDict

import pytest
import secateur as sc
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def make(classes=7, **more):
    torch.manual_seed(3)
    return timm.create_model(NAME, num_classes=classes, **SMALL | more).eval()


def same(found, expected):
    assert type(found) is type(expected)
    assert not found.training
    state = expected.state_dict()
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    x = torch.randn(2, *sc.inspect(expected).input_size)
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))


def prefixed(state, prefix):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: prefixed(state, "module."),
        lambda state: {"state_dict": prefixed(state, "_orig_mod.")},
        lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
        lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 0.1}},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".ckpt", ".bin"])
def test_forms(wrap, suffix, tmp_path):
    expected, path = make(), tmp_path / f"model{suffix}"
    torch.save(wrap(expected.state_dict()), path)
    same(sc.load_dense(path, model=NAME, **SMALL), expected)


@pytest.mark.parametrize("use_ema", [False, True])
def test_what_timm_writes(use_ema, tmp_path):
    """Its arguments say the model, the classes and the size."""
    plain, ema = make(), make()
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(1.5)
    args = argparse.Namespace(model=NAME, num_classes=7, img_size=32, model_kwargs=SMALL, lr=0.1)
    states = {"state_dict": plain.state_dict(), "state_dict_ema": ema.state_dict()}
    torch.save(
        {"epoch": 1, "arch": NAME, "version": 2, "args": args, "metric": 3.0, **states}, tmp_path / "best.pth.tar"
    )
    same(sc.load_dense(tmp_path / "best.pth.tar", use_ema=use_ema), ema if use_ema else plain)


def test_no_average_where_none_is(tmp_path):
    torch.save({"state_dict": make().state_dict()}, tmp_path / "last.pth")
    with pytest.raises(sc.InvalidArgument, match="ema"):
        sc.load_dense(tmp_path / "last.pth", model=NAME, use_ema=True, **SMALL)


def test_safetensors_and_folders(tmp_path):
    expected = make()
    save_file(expected.state_dict(), tmp_path / "state.safetensors")
    same(sc.load_dense(tmp_path / "state.safetensors", model=NAME, **SMALL), expected)
    save_for_hf(expected, tmp_path / "folder", model_config={"num_classes": 7}, model_args=SMALL)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architecture"] == NAME
    same(sc.load_dense(tmp_path / "folder"), expected)
    same(sc.load_dense(f"local-dir:{tmp_path / 'folder'}"), expected)


def test_a_file_of_secateurs_says_the_model(tmp_path):
    expected = make()
    torch.save(expected.state_dict(), tmp_path / "state.pth")
    stats = sc.calibrate(expected, [torch.rand(8, 3, 32, 32) * 2 - 1])
    stats.save(tmp_path / "stats.st")
    for said in (stats, tmp_path / "stats.st", str(tmp_path / "stats.st")):
        same(sc.load_dense(tmp_path / "state.pth", model=said), expected)


class Harmless:
    """What a pickle may ask for: that a function is called."""

    ran = 0

    def __reduce__(self):
        return touch, ()


def touch():
    Harmless.ran += 1


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_file_is_run(protocol, tmp_path):
    torch.save({"state_dict": make().state_dict(), "extra": Harmless()}, tmp_path / "bad.pth", pickle_protocol=protocol)
    with pytest.raises(sc.InvalidArgument, match="expected") as error:
        sc.load_dense(tmp_path / "bad.pth", model=NAME, **SMALL)
    assert "\n" not in str(error.value)
    assert Harmless.ran == 0


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_whole_model_is_refused_with_a_line_that_converts_it(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = make()
    torch.save(expected, "whole.pth", pickle_protocol=protocol)
    with pytest.raises(sc.InvalidArgument, match="state_dict") as error:
        sc.load_dense("whole.pth", model=NAME, **SMALL)
    line = str(error.value)
    exec(line[line.index("import torch") : line.index(".state.pth')") + len(".state.pth')")], {})
    same(sc.load_dense("whole.state.pth", model=NAME, **SMALL), expected)


def test_a_later_protocol_is_refused_with_a_line_that_converts_it(tmp_path, monkeypatch):
    """torch's weights_only reads protocol 2 alone, whatever the file holds."""
    monkeypatch.chdir(tmp_path)
    expected = make()
    torch.save({"state_dict": expected.state_dict(), "epoch": 1}, "late.pth", pickle_protocol=5)
    with pytest.raises(sc.InvalidArgument, match="protocol 5") as error:
        sc.load_dense("late.pth", model=NAME, **SMALL)
    line = str(error.value)
    exec(line[line.index("import torch") : line.index(".state.pth')") + len(".state.pth')")], {})
    same(sc.load_dense("late.state.pth", model=NAME, **SMALL), expected)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", pickle.dumps([1, 2])])
def test_damaged_files(content, tmp_path):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(sc.InvalidArgument) as error:
        sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)
    assert "\n" not in str(error.value)


def test_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(make().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(sc.InvalidArgument, match="expected"):
        sc.load_dense(path, model=NAME, **SMALL)
    with pytest.raises(sc.InvalidArgument, match="expected"):
        sc.load_dense(tmp_path / "none.pth", model=NAME, **SMALL)


def test_names_that_do_not_fit_are_counted(tmp_path):
    state = make().state_dict()
    gone = sorted(name for name in state if name.startswith("blocks.1."))
    for name in gone:
        del state[name]
    state |= {f"decoder.{index}.weight": torch.ones(2) for index in range(7)}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(sc.InvalidArgument) as error:
        sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)
    text = str(error.value)
    assert "\n" not in text
    assert str(len(gone)) in text
    assert "blocks.1." in text
    assert "7" in text
    assert "decoder." in text


def test_a_model_that_nobody_says(tmp_path):
    torch.save(make().state_dict(), tmp_path / "model.pth")
    with pytest.raises(sc.InvalidArgument, match="model"):
        sc.load_dense(tmp_path / "model.pth")
    with pytest.raises(sc.InvalidArgument, match="model"):
        sc.load_dense(tmp_path / "model.pth", model="no_such_vit")


def test_classes_are_what_the_classifier_has(tmp_path):
    expected = make(4)
    torch.save(expected.state_dict(), tmp_path / "model.pth")
    same(sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL), expected)
    with pytest.raises(sc.InvalidArgument, match="head"):
        sc.load_dense(tmp_path / "model.pth", model=NAME, num_classes=9, **SMALL)


def test_whole_models_of_secateurs_own(tmp_path):
    model = make()
    sc.save(model, tmp_path / "model.st")
    same(sc.load_dense(tmp_path / "model.st"), model)


def test_a_stem_of_another_kernel_is_told(tmp_path):
    """A convolutional stem has no grid of patches to derive a size from."""
    state = timm.create_model("resnet18", num_classes=3).state_dict()
    state["conv1.weight"] = torch.ones(64, 3, 3, 3)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(sc.InvalidArgument, match=r"conv1\.weight \(64, 3, 3, 3\) for \(64, 3, 7, 7\)"):
        sc.load_dense(tmp_path / "model.pth", model="resnet18", num_classes=3)
