"""Files that are valid and unusual, and files that are none: every tensor is read, or one line says why not."""

from __future__ import annotations

import argparse
import collections
import gzip
import io
import json
import pathlib
import pickle
import re
import shlex
import zipfile

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from secateur.cli.app import main
from torch import nn

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 21, "depth": 2, "num_heads": 3}


def make(**more):
    torch.manual_seed(4)
    return timm.create_model(NAME, **{"num_classes": 5, **SMALL, **more}).eval()


def holds(found, state):
    """The model has these values, in the type that a new model has."""
    got = found.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in got.items())
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}


# --- Wrappers and prefixes --------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module of somebody's own, or Lightning's, around the model."""

    def __init__(self, path, model):
        super().__init__()
        first, _, rest = path.partition(".")
        setattr(self, first, Holder(rest, model) if rest else model)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled and parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "in a Sequential": nn.Sequential,
    **{
        f"as {path}": lambda model, path=path: Holder(path, model)
        for path in ("model", "backbone", "encoder", "net", "model.backbone.vit", "module.student")
    },
    # Modules of the model itself have these names.
    **{f"as {path}": lambda model, path=path: Holder(path, model) for path in ("head", "blocks", "model.norm")},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_that_a_wrapper_gave(wrapper, tmp_path):
    model = make()
    torch.save({"state_dict": WRAPPERS[wrapper](model).state_dict(), "epoch": 2}, tmp_path / "last.ckpt")
    holds(sc.load_dense(tmp_path / "last.ckpt", model=NAME, **SMALL), model.state_dict())


def test_a_part_of_a_model_is_no_wrapped_one(tmp_path):
    """Its names all begin alike, too."""
    state = make().state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("blocks.")}, tmp_path / "part.pth")
    with pytest.raises(sc.InvalidArgument, match=r"8 missing \(cls_token, pos_embed, .*\); pass the name and all"):
        sc.load_dense(tmp_path / "part.pth", model=NAME, **SMALL)


def test_what_a_module_around_the_model_has_besides_is_named(tmp_path):
    """Lightning's: the weights of a loss and a metric's counts. The line that it says makes a file that is read."""
    model = make()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"loss.weight": torch.ones(5), "val_acc.tp": torch.zeros(5)}
    torch.save({"state_dict": state, "hyper_parameters": {"model_name": NAME, **SMALL}}, tmp_path / "last.ckpt")
    with pytest.raises(sc.InvalidArgument, match=r"32 names begin with 'model\.'") as error:
        sc.load_dense(tmp_path / "last.ckpt")
    text = str(error.value)
    assert "34 unexpected" in text
    assert "loss.weight, val_acc.tp" in text
    line = text[text.index("torch.save(") :].replace("FILE", "file")
    eval(line, {"torch": torch, "state": state, "file": tmp_path / "model.pth"})
    holds(sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL), model.state_dict())


# --- Values -----------------------------------------------------------------------------------------------------------


def tied(state):
    state["blocks.1.mlp.fc2.weight"] = state["blocks.0.mlp.fc2.weight"]
    return state


VALUES = {
    "bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
    "float16": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "float64": lambda state: {name: tensor.double() for name, tensor in state.items()},
    "mixed": lambda state: {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in state.items()},
    "transposed": lambda state: {n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in state.items()},
    "channels last": lambda state: {
        n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in state.items()
    },
    "views": lambda state: {name: torch.cat([tensor, tensor])[len(tensor) :] for name, tensor in state.items()},
    "tied": tied,
    "parameters": lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()},
    "not a number": lambda state: {
        name: tensor * float("nan") if "1" in name else tensor for name, tensor in state.items()
    },
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("zipped", [True, False])
def test_values(values, zipped, tmp_path):
    state = VALUES[values](make().state_dict())
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    found = sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)
    expected = {name: tensor.nan_to_num(7.0) for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.nan_to_num_(7.0)
    holds(found, expected)
    # No parameter shares memory with another: a later cut of one would change both.
    places = [parameter.untyped_storage().data_ptr() for parameter in found.parameters()]
    assert len({*places}) == len(places)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensor: tensor.int(), "32 of another type"),
        (lambda tensor: tensor.to(torch.complex64), "32 of another type"),
        (lambda tensor: tensor.to("meta"), "expected a dense tensor with values"),
        (lambda tensor: tensor[:1].clone().expand(tensor.shape), "that repeats fewer"),
    ],
)
def test_values_that_are_no_weights(change, text, tmp_path):
    torch.save({name: change(tensor) for name, tensor in make().state_dict().items()}, tmp_path / "model.pth")
    with pytest.raises(sc.InvalidArgument, match=text) as error:
        sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)
    assert "\n" not in str(error.value)


# --- What else is in the file -----------------------------------------------------------------------------------------


PLACES = {
    "model_state": lambda state: {"model_state": state, "optimizer_state": {"state": {}}},
    "net": lambda state: {"net": state, "acc": 91.0},
    "a name of its own": lambda state: {"vit": state, "epoch": 1},
    "number": lambda state: {0: state},
    "Namespace": lambda state: argparse.Namespace(state_dict=state, epoch=3),
    "state in a Namespace": lambda state: {"state_dict": argparse.Namespace(**state)},
    "besides torch's own": lambda state: {
        "state_dict": state,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "size": torch.Size([1]),
        "set": {1, 2},
        "counter": collections.Counter("abc"),
        "rng": torch.get_rng_state(),
    },
    "first of several": lambda state: {"state_dict": state, "model": {"other": torch.ones(1)}},
    "and an average": lambda state: {"vit": state, "model_ema": {"other": torch.ones(1)}, "epoch": 2},
}


@pytest.mark.parametrize("place", PLACES)
def test_places(place, tmp_path):
    state = make().state_dict()
    torch.save(PLACES[place](state), tmp_path / "model.pth")
    if place == "and an average":  # which of the two is meant, only a usual name says
        with pytest.raises(sc.InvalidArgument, match=r"only vit, model_ema, epoch; .*pass use_ema=True"):
            sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)
        return
    holds(sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL), state)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict", "ema"])
def test_averages(key, tmp_path):
    """The average, wrapped as it may be, and not the weights."""
    state = make().state_dict()
    average = {f"module.{name}": 3 * tensor for name, tensor in state.items()}
    torch.save({"model": state, key: average}, tmp_path / "model.pth")
    holds(sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL), state)
    expected = {name: 3 * tensor for name, tensor in state.items()}
    holds(sc.load_dense(tmp_path / "model.pth", model=NAME, use_ema=True, **SMALL), expected)
    torch.save({key: average}, tmp_path / "average.pth")
    with pytest.raises(sc.InvalidArgument, match=rf"no state dict, only {key}; .*use_ema=True \(--use-ema\)"):
        sc.load_dense(tmp_path / "average.pth", model=NAME, **SMALL)


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({}, "only nothing"),
        (None, "a NoneType"),
        (torch.ones(3), "a Tensor"),
        ([1], "a list"),
        ({"a": torch.ones(1), "epoch": 3}, "only a, epoch"),
        ({"generator": {"a": torch.ones(1)}, "critic": {"a": torch.ones(1)}}, "only generator, critic"),
        ({"state_dict": {}, "epoch": 3}, "only state_dict, epoch"),
        ({1: torch.ones(1)}, "only 1"),
    ],
)
def test_no_state_dict(held, text, tmp_path):
    torch.save(held, tmp_path / "model.pth")
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)


NEEDS = {
    "numpy.dtype": lambda: np.float64(93.1),
    "numpy.ndarray": lambda: np.ones(3),
    "pathlib.PosixPath": lambda: pathlib.PosixPath("runs"),
    "collections.defaultdict": lambda: collections.defaultdict(list),
    "torch.nn.modules.linear.Linear": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("needed", NEEDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_needs_more_is_refused_with_the_line_that_converts_it(needed, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make().state_dict()
    args = argparse.Namespace(lr=0.1, extra=NEEDS[needed]())
    torch.save({"state_dict": state, "args": args}, "it's.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(sc.InvalidArgument, match="convert it: import torch; ") as error:
        sc.load_dense("it's.pth.tar", model=NAME, **SMALL)
    text = str(error.value)
    assert "\n" not in text
    # An older file is read up to the first class that is not let in.
    assert needed in text or not zipped
    assert needed.partition(".")[0] in text
    (saved,) = exec_line(text)
    holds(sc.load_dense(saved, model=NAME, **SMALL), state)


def exec_line(text):
    """Run the line that an error says, and return the files that it made."""
    before = {*pathlib.Path().iterdir()}
    exec(text[text.index("import torch; ") : text.rindex("))") + 1], {})
    return {*pathlib.Path().iterdir()} - before


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_protocols_of_pickles(protocol, zipped, tmp_path, monkeypatch):
    """torch reads back some by weights_only: these are read, and the line converts the others."""
    monkeypatch.chdir(tmp_path)
    state, arguments = make().state_dict(), {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"state_dict": state}, "model.pth", **arguments)
    if protocol in (2, 3):
        holds(sc.load_dense("model.pth", model=NAME, **SMALL), state)
        return
    with pytest.raises(sc.InvalidArgument, match=f"protocol {protocol}") as error:
        sc.load_dense("model.pth", model=NAME, **SMALL)
    (saved,) = exec_line(str(error.value))
    holds(sc.load_dense(saved, model=NAME, **SMALL), state)


# --- Other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"num_classes": 0},
        {"in_chans": 1},
        {"img_size": 48},
        {"patch_size": 8},
        {"patch_size": 8, "img_size": 16},  # as many positions
        {"depth": 3},
        {"img_size": 80, "in_chans": 4, "num_classes": 2, "depth": 1},
        {"img_size": 40, "patch_size": 8, "in_chans": 2},
    ],
)
def test_what_is_said_to_pass_fits(other, tmp_path):
    """By Python and by the command line, which has one option for classes."""
    state = make(**other).state_dict()
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(sc.InvalidArgument, match="; pass ") as error:
        sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)
    said, options = re.fullmatch(r".*; pass ([\w=, ]+) \((.*)\)", str(error.value)).groups()
    arguments = {name: int(value) for name, value in (each.split("=") for each in said.split(", "))}
    holds(sc.load_dense(tmp_path / "model.pth", model=NAME, **{**SMALL, **arguments}), state)
    words = shlex.split(options)
    given = json.loads(words[words.index("--model-kwargs") + 1]) if "--model-kwargs" in words else {}
    if "--num-classes" in words:
        given["num_classes"] = int(words[words.index("--num-classes") + 1])
    assert given == arguments


def test_sizes_that_nothing_fits(tmp_path):
    """Not square, wider, without a class token: no guess is made, and what differs is counted."""
    for other, text in (
        ({"img_size": (32, 48)}, r"1 of another shape \(pos_embed \(1, 7, 21\) for \(1, 5, 21\)\); pass the name and"),
        ({"embed_dim": 24}, r"31 of another shape \(cls_token \(1, 1, 24\) for \(1, 1, 21\), .*, \.\.\.\); pass the"),
        ({"class_token": False, "global_pool": "avg"}, r"3 missing .*2 unexpected .*1 of another shape"),
    ):
        torch.save(make(**other).state_dict(), tmp_path / "model.pth")
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.load_dense(tmp_path / "model.pth", model=NAME, **SMALL)


# --- No checkpoints at all --------------------------------------------------------------------------------------------


def archive(**records):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", records.pop("how", zipfile.ZIP_STORED)) as found:
        for name, content in records.items():
            found.writestr(name.replace("__", "/"), content)
    return file.getvalue()


def written(**more):
    file = io.BytesIO()
    torch.save(make().state_dict(), file, **more)
    return file.getvalue()


def compressed():
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(written())) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.infolist():
            new.writestr(each.filename, old.read(each))
    return file.getvalue()


def scripted():
    """What torch.jit.save writes, as far as names tell: it is about to be removed from torch."""
    return archive(m__data__pkl=b"", **{"m/constants.pkl": b"", "m/data.pkl": b"", "m/code/a.py": b"pass"})


NONE = {
    "empty": (lambda: b"", "it is empty"),
    "a text": (lambda: b"epoch,top1\n1,93\n", "it is neither"),
    "a pointer to a large file": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n",
        "it is neither",
    ),
    "a page": (lambda: b"<!DOCTYPE html><html></html>", "it is neither"),
    "JSON": (lambda: b'{"architecture": "vit_tiny_patch16_224"}', "it is neither"),
    "zeros": (lambda: bytes(100), "it is neither"),
    "compressed": (lambda: gzip.compress(written()), "it is neither"),
    "an archive": (lambda: archive(a=b"hi"), "that torch.save did not write"),
    "an archive without tensors": (
        lambda: archive(m__data=b"", **{"m/data.pkl": pickle.dumps({}, 2)}),
        "no file of torch.save",
    ),
    "a compressed archive": (compressed, "compressed"),
    "a program": (scripted, "TorchScript archive"),
    "a pickle": (lambda: pickle.dumps({"a": 1}, 2), "a pickle that torch.save did not write"),
    "a later pickle": (lambda: pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "a byte": (lambda: b"\x80", "truncated"),
    "half a zip": (lambda: written()[: len(written()) // 2], "truncated or damaged"),
    "most of a zip": (lambda: written()[:-1], "truncated or damaged"),
    "half of an older file": (lambda: written(_use_new_zipfile_serialization=False)[:70_000], "truncated"),
    "a header alone": (lambda: (5).to_bytes(8, "little") + b"{", "where a header and its size are expected"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize("kind", NONE)
def test_files_that_are_no_checkpoints(kind, suffix, tmp_path, capsys):
    """One line, whether the model is named or not, from Python and the command line."""
    content, text = NONE[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content())
    for model in ({"model": NAME, **SMALL}, {}):
        with pytest.raises(sc.InvalidArgument) as error:
            sc.load_dense(path, **model)
        said = str(error.value)
        assert "\n" not in said
        assert said.startswith(f"path: expected a checkpoint of torch.save or a .safetensors file, got {str(path)!r} (")
        assert text in said or (suffix == ".safetensors" and text == "it is neither")
    assert main(["inspect", "--checkpoint", str(path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"secateur: --checkpoint: {said.removeprefix('path: ')}\n")


def test_secateurs_own_files_that_are_no_model(tmp_path, capsys):
    model = make()
    stats = sc.calibrate(model, [torch.rand(8, 3, 32, 32) * 2 - 1])
    stats.save(tmp_path / "stats.st")
    sc.plan(model, stats, ratios={"ffn": 0.5}).save(tmp_path / "plan.json")
    for name in ("stats.st", "plan.json"):
        with pytest.raises(sc.InvalidArgument) as error:
            sc.load_dense(tmp_path / name)
        assert "\n" not in str(error.value)
        assert main(["inspect", "--checkpoint", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    sc.save(model, tmp_path / "model.st")
    (tmp_path / "model.st").write_bytes((tmp_path / "model.st").read_bytes()[:-1])
    with pytest.raises(sc.InvalidArgument, match="where the header says"):
        sc.load_dense(tmp_path / "model.st")
