"""Models in timm's folders and on a hub: timm writes them, and huggingface_hub finds them in a filled cache."""

from __future__ import annotations

import json

import pytest
import secateur as sc
import timm
import torch
from huggingface_hub import constants
from timm.models import save_for_hf

NAME = "vit_tiny_patch16_224"
COMMIT = "0123456789" * 4


def make(**more):
    """Not square, five channels, heads of 7."""
    torch.manual_seed(5)
    arguments = {"img_size": (32, 48), "embed_dim": 21, "depth": 2, "num_heads": 3, "in_chans": 5, "num_classes": 4}
    return timm.create_model(NAME, **arguments | more).eval()


def same(found, expected):
    assert type(found) is type(expected)
    assert not found.training
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    assert found.num_classes == expected.num_classes
    x = torch.randn(2, *sc.inspect(expected).input_size)
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that puts a model into the cache of a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name, model, *, safe=False, revision="main", **more):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / revision).write_text(COMMIT)
        save_for_hf(model, folder / "snapshots" / COMMIT, safe_serialization=safe, **more)
        return folder / "snapshots" / COMMIT

    return put


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_a_name_on_a_hub(safe, hub):
    expected = make()
    hub("someone/vit", expected, safe=safe)
    hub("someone/late", expected, safe=safe, revision="v2")
    for name in ("hf-hub:someone/vit", "hf_hub:someone/vit", "HF-HUB:someone/vit", "hf-hub:someone/late@v2"):
        same(sc.load_dense(name), expected)
    same(timm.create_model("hf-hub:someone/vit", pretrained=True).eval(), expected)  # what timm itself makes of it
    with pytest.raises(sc.InvalidArgument, match="someone/late@v3"):
        sc.load_dense("hf-hub:someone/late@v3")


def test_both_kinds_of_weights_are_the_same_as_timms_choice(hub):
    """timm takes safetensors where there are some."""
    folder = hub("someone/two", make(), safe="both")
    other = make()
    other.head.bias.data += 1
    torch.save(other.state_dict(), folder / "pytorch_model.bin")
    same(sc.load_dense("hf-hub:someone/two"), timm.create_model("hf-hub:someone/two", pretrained=True).eval())
    same(sc.load_dense(folder), make())


@pytest.mark.parametrize(
    ("filename", "stored"),
    [
        ("best.bin", "best.bin"),
        ("best.bin", "best.safetensors"),
        ("best.safetensors", "best.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
    ],
)
def test_another_file_of_weights(filename, stored, hub):
    config = {"pretrained_cfg": {"hf_hub_filename": filename}}
    folder = hub("someone/vit", make(), safe=stored.endswith(".safetensors"), model_config=config)
    next(each for each in folder.iterdir() if each.name != "config.json").rename(folder / stored)
    same(sc.load_dense("hf-hub:someone/vit"), make())


def test_what_is_said_about_images_belongs_to_the_model(hub):
    expected = make(in_chans=3)
    said = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.8}
    folder = hub("someone/vit", expected, data_config=said)
    for name in ("hf-hub:someone/vit", folder, f"local-dir:{folder}"):
        found = sc.load_dense(name).pretrained_cfg
        assert {key: found[key] for key in said} == {
            key: list(value) if isinstance(value, tuple) else value for key, value in said.items()
        }


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_folders(safe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = make()
    save_for_hf(expected, "folder", safe_serialization=safe)
    for name in ("folder", "./folder/", tmp_path / "folder", "local-dir:folder", f"LOCAL-DIR:{tmp_path / 'folder'}"):
        same(sc.load_dense(name), expected)
    for name in ("local_dir:folder", "local-dir:", "hf-hub:", "none", "local-dir:none"):  # timm has no such spelling
        with pytest.raises(sc.InvalidArgument, match="path: expected"):
            sc.load_dense(name)


def test_arguments_go_before_those_of_the_folder(tmp_path):
    """One without a classifier has the same weights but for it, and a rate of dropout none."""
    bare = make(num_classes=0)
    save_for_hf(bare, tmp_path / "folder")
    same(sc.load_dense(tmp_path / "folder"), bare)
    assert sc.load_dense(tmp_path / "folder", drop_path_rate=0.3).blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    with pytest.raises(sc.InvalidArgument, match=r"head\.weight.*num_classes=0"):
        sc.load_dense(tmp_path / "folder", num_classes=3)
    for more in ({"model": NAME}, {"use_ema": True}):
        with pytest.raises(sc.InvalidArgument, match="expected neither model nor use_ema"):
            sc.load_dense(tmp_path / "folder", **more)


WEIGHTS = {
    "prefixed": lambda model: {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
    "in a checkpoint": lambda model: {"state_dict": model.state_dict(), "epoch": 3},
    "bfloat16": lambda model: {name: tensor.bfloat16() for name, tensor in model.state_dict().items()},
}


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_are_read_as_those_of_any_file(where, weights, hub):
    expected = make()
    folder = hub("someone/vit", expected)
    torch.save(WEIGHTS[weights](expected), folder / "pytorch_model.bin")
    if weights == "bfloat16":
        expected.bfloat16().float()
    same(sc.load_dense("hf-hub:someone/vit" if where == "hub" else folder), expected)


BAD = {
    "whole": (lambda model: model, "weights_only=False"),
    "list": (lambda model: [1, 2], "holds a list"),
    "repeats": (lambda model: model.state_dict() | {"head.weight": torch.ones(1, 1).expand(4, 21)}, "repeats"),
    "short": (lambda model: {"norm.bias": torch.ones(21)}, r"\d\d missing \(.*, \.\.\.\)"),
}


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("kind", BAD)
def test_weights_are_refused_as_those_of_any_file(where, kind, hub):
    model, (held, text) = make(), BAD[kind]
    folder = hub("someone/vit", model)
    torch.save(held(model), folder / "pytorch_model.bin")
    with pytest.raises(sc.InvalidArgument, match=text) as error:
        sc.load_dense("hf-hub:someone/vit" if where == "hub" else folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize(
    ("config", "text"),
    [
        ('{"architectures": ["ViTForImageClassification"]}', "architecture of timm, got transformers' for ViTFor"),
        ('{"architecture": "no_such_vit"}', "architecture of timm, got 'no_such_vit'"),
        ('{"architecture": ["vit_tiny_patch16_224"]}', "architecture of timm"),
        ('{"architecture": "vit_tiny', "expected timm's config.json"),
        ("[1]", "expected an object .*got list"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": [3]}', "model_args .* got list"),
        (
            '{"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "x"}}',
            "of an architecture, got 'checkpoint_path'",
        ),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 100000}}', "depth, got 100000"),
    ],
)
def test_configurations_that_are_refused(where, config, text, hub):
    folder = hub("someone/vit", make())
    (folder / "config.json").write_text(config)
    with pytest.raises(sc.InvalidArgument, match=text) as error:
        sc.load_dense("hf-hub:someone/vit" if where == "hub" else folder)
    assert "\n" not in str(error.value)


def test_folders_without_something(tmp_path):
    save_for_hf(make(), tmp_path / "folder")
    (tmp_path / "folder" / "pytorch_model.bin").unlink()
    with pytest.raises(sc.InvalidArgument, match=r"with model\.safetensors or pytorch_model\.bin, got"):
        sc.load_dense(tmp_path / "folder")
    with pytest.raises(sc.InvalidArgument, match=r"config\.json, got .*, which has none"):
        sc.load_dense(tmp_path)


def test_a_configuration_of_an_older_timm(hub):
    """One table without pretrained_cfg, and without arguments: those of the architecture hold."""
    expected = timm.create_model("test_vit", num_classes=3, img_size=224).eval()
    folder = hub("someone/old", expected)
    fields = json.loads((folder / "config.json").read_text())
    flat = {"architecture": "test_vit", "num_classes": 3, **fields["pretrained_cfg"]}
    (folder / "config.json").write_text(json.dumps(flat))
    same(sc.load_dense("hf-hub:someone/old"), expected)
    same(sc.load_dense(folder), expected)
