"""Folders as timm's own: timm builds the pruned model from them, by itself and with the arguments that it takes."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys

import pytest
import secateur as sc
import swin_models
import timm
import torch
from huggingface_hub import constants
from models import BASE, KINDS, images, make
from safetensors.torch import save_file
from secateur.exports import hub as exporter
from small_vits import SMALL, small_vit
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

RATIOS = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2, "blocks.0.tokens": 0.4, "blocks.1.attn": 1}
COMMIT = "0123456789" * 4
ARGUMENTS = {"img_size": 24, "patch_size": 4, "embed_dim": 27, "depth": 3, "num_heads": 3, "num_classes": 5}


def cut(model, ratios, **more):
    sc.prune(model, sc.plan(model, method="magnitude", ratios=ratios), **more)
    return model


def pruned(**more):
    """Made by timm; queries and values of unequal sizes, merged tokens, a layer less, a pooled last block."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return cut(model, RATIOS)


def same(found, expected, x):
    assert type(found) is type(expected)
    assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
    mine, theirs = found.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        assert torch.equal(found.eval()(x), expected(x))


@pytest.fixture
def folder(tmp_path):
    sc.export(pruned(), tmp_path / "folder", format="hub")
    return tmp_path / "folder"


def built(folder, **arguments):
    return timm.create_model(f"local-dir:{folder}", **{"pretrained": True, **arguments}).eval()


FRESH = """
import hashlib, sys
{imports}
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    print(hashlib.sha256(model(load_file(sys.argv[2])["x"]).numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize("imports", ["import secateur, timm", "import timm, secateur"])
def test_a_fresh_process_that_imports_both_in_any_order(digits_model, digits_images, tmp_path, imports):
    """A trained model, and no name of secateur's used."""
    model = cut(digits_model, {"qk": 0.4, "v": 0.2, "ffn": 0.3, "heads": 0.34, "width": 0.2, "blocks.1.attn": 1})
    report = sc.export(model, tmp_path / "folder", format="hub")
    assert [file.name for file in report.files] == ["config.json", "model.safetensors"]
    assert report.files[0].parent == tmp_path / "folder"
    assert report.difference == 0
    save_file({"x": digits_images}, tmp_path / "x")
    words = [sys.executable, "-W", "error", "-c", FRESH.format(imports=imports), tmp_path / "folder", tmp_path / "x"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            expected = hashlib.sha256(model(digits_images).numpy().tobytes()).hexdigest()
    finally:
        torch.set_num_threads(threads)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gate", "hybrid")])
@pytest.mark.parametrize("layout", ["exact", "stock"])
def test_every_kind_of_transformer(kind, layout, tmp_path):
    """Built by hand, with arguments that are classes."""
    model = make(kind)
    ratios = {"qk": 0.4, "v": 0.4, "ffn": 0.3} if layout == "stock" else {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2}
    try:
        cut(model, ratios, layout=layout)
    except sc.Unsupported:
        pytest.skip("the stock layout has no such model")
    name = "VisionTransformerDistilled" if kind == "distilled" else "VisionTransformer"
    given = {each: value for each, value in {**BASE, **KINDS[kind]}.items() if each != "distilled"}
    sc.export(model, tmp_path / "folder", format="hub", factory=(name, given))
    same(built(tmp_path / "folder"), model, images(model))


def test_swin(tmp_path):
    model = cut(swin_models.make("fitting"), {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2})
    factory = ("SwinTransformer", {**swin_models.BASE, **swin_models.FITTING})
    sc.export(model, tmp_path / "folder", format="hub", factory=factory)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architecture"] == "secateur_swin"
    x = torch.randn(2, 3, 64, 32)
    same(built(tmp_path / "folder"), model, x)
    with torch.no_grad():
        features = built(tmp_path / "folder", num_classes=3).forward_features(x)
        assert torch.equal(features, model.forward_features(x))
        assert built(tmp_path / "folder", num_classes=3)(x).shape == (2, 3)


def test_another_number_of_classes(folder):
    """All but the head is the pruned model's, and the head is new; none with num_classes=0."""
    model, x = pruned(), torch.randn(2, 3, 24, 24)
    for classes in (3, 11):
        found = built(folder, num_classes=classes)
        assert found.num_classes == classes
        for name, tensor in model.state_dict().items():
            assert name.startswith("head.") or torch.equal(found.state_dict()[name], tensor)
        assert found(x).shape == (2, classes)
    features = copy.deepcopy(model)
    features.head = nn.Identity()
    with torch.no_grad():
        assert torch.equal(built(folder, num_classes=0)(x), features(x))


def test_other_arguments_go_to_the_dense_model(folder):
    found = built(folder, drop_path_rate=0.2, drop_rate=0.3)
    assert found.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    assert found.head_drop.p == 0.3
    assert built(folder, dtype=torch.float64).head.weight.dtype == torch.float64
    assert timm.create_model(f"local-dir:{folder}", device="meta").head.weight.is_meta
    with pytest.raises(sc.InvalidArgument, match="^arguments: expected those of vit_tiny_patch16_224, got .*colour"):
        built(folder, colour="red")


def test_images_of_one_channel(folder):
    """Weights are summed over channels: what is grey in three channels gives the same."""
    grey = torch.randn(2, 1, 24, 24)
    with torch.no_grad():
        found, expected = built(folder, in_chans=1)(grey), pruned()(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", [16, (32, 40)])
def test_images_of_another_size(folder, size):
    """As timm's own set_input_size makes of the pruned model; as many tokens merge."""
    expected = pruned()
    expected.set_input_size(img_size=(size, size) if isinstance(size, int) else size)
    x = torch.randn(2, 3, *expected.patch_embed.img_size)
    same(built(folder, img_size=size), expected, x)


def test_features(folder):
    model, x = pruned(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        found = built(folder, features_only=True, out_indices=(0, 2))(x)
        expected = model.forward_intermediates(x, indices=(0, 2), intermediates_only=True)
    assert all(map(torch.equal, found, expected))
    assert [each.shape[1] for each in found] == [model.embed_dim] * 2


def test_what_the_configuration_says(tmp_path):
    """Of images as the pruned model takes them; nothing of where the dense weights are."""
    model = pruned(img_size=(24, 32), in_chans=5)
    said = {"mean": (0.1, 0.2, 0.3, 0.4, 0.5), "std": (0.5,) * 5, "crop_pct": 0.8, "interpolation": "bilinear"}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **said, "hf_hub_id": "timm/dense", "url": "x"}
    sc.export(model, tmp_path / "folder", format="hub")
    fields = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert fields["architecture"] == "secateur_vit"
    assert fields["num_classes"] == 5
    config = resolve_model_data_config(built(tmp_path / "folder"))
    assert config["input_size"] == (5, 24, 32)
    assert {name: tuple(config[name]) if name in ("mean", "std") else config[name] for name in said} == said
    text = json.dumps(fields)
    assert "timm/dense" not in text
    assert '"url"' not in text
    assert fields["model_args"]["dense"] == "vit_tiny_patch16_224"  # a name of timm's, and no weights by it
    assert fields["model_args"]["arguments"]["embed_dim"] == 27
    assert "embed_dim" not in fields["model_args"]
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("secateur_vit", pretrained=True, **fields["model_args"])


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The cache of a hub that cannot be reached, with the folder in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--someone--pruned"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / COMMIT)
    return "hf-hub:someone/pruned"


def test_a_name_on_a_hub(hub):
    expected, x = pruned(), torch.randn(2, 3, 24, 24)
    same(timm.create_model(hub, pretrained=True).eval(), expected, x)
    assert timm.create_model(hub, pretrained=True, num_classes=3).num_classes == 3
    same(sc.load_dense(hub), expected, x)


def test_load_dense_reads_it_as_any_folder(folder):
    x = torch.randn(2, 3, 24, 24)
    for name in (folder, f"local-dir:{folder}"):
        same(sc.load_dense(name), pruned(), x)
    assert sc.load_dense(folder, drop_path_rate=0.3).blocks[2].drop_path1.drop_prob == pytest.approx(0.3)
    with pytest.raises(sc.InvalidArgument, match=r"head\.weight"):
        sc.load_dense(folder, num_classes=3)


def test_the_state_fits_where_sizes_do(tmp_path):
    """Into what timm builds from the folder without weights; and, of stock sizes, into timm's own class."""
    model = cut(small_vit(mlp_ratio=4), {"ffn": 0.5})
    sc.export(model, tmp_path / "folder", format="hub", factory=("VisionTransformer", SMALL))  # a ratio of 4
    found = built(tmp_path / "folder", pretrained=False)
    assert not torch.equal(found.head.weight, model.head.weight)
    found.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 12, 12)
    same(found, model, x)
    plain = timm.create_model("vit_tiny_patch16_224", **SMALL, mlp_ratio=2).eval()
    for state in (model.state_dict(), built(tmp_path / "folder").state_dict()):
        plain.load_state_dict(state, strict=True)
        with torch.no_grad():
            assert torch.allclose(plain(x), model(x), atol=1e-5)  # the last block computes all tokens
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("vit_tiny_patch16_224", **SMALL).load_state_dict(model.state_dict())


def test_what_timm_writes_of_it_is_the_pruned_model(folder, tmp_path):
    """By timm.models.save_for_hf and push_to_hf_hub, after the number of classes changed."""
    found = built(folder, num_classes=3)
    save_for_hf(found, str(tmp_path / "again"), safe_serialization=True)
    same(built(tmp_path / "again"), found, torch.randn(2, 3, 24, 24))


def test_the_way_goes_on(folder, tmp_path):
    """It is inspected, cut, saved and exported as the model that secateur loads."""
    x = torch.randn(2, 3, 24, 24)
    found = built(folder, num_classes=3, drop_path_rate=0.2)
    loaded = copy.deepcopy(found)
    assert sc.inspect(found).sizes == {**sc.inspect(pruned(num_classes=3)).sizes}
    assert (sc.inspect(found).architecture, sc.inspect(found).handmade) == ("vit_tiny_patch16_224", False)
    sc.save(found, tmp_path / "saved")
    same(sc.load(tmp_path / "saved"), loaded, x)
    again = cut(sc.load(tmp_path / "saved"), {"ffn": 0.3})
    assert again.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    assert sc.inspect(found).arguments["drop_path_rate"] == 0.2
    cut(found, {"ffn": 0.3})
    same(found, again, x)
    for number, each in enumerate((found, again)):
        sc.export(each, tmp_path / str(number), format="hub")
        same(built(tmp_path / str(number)), again, x)
    texts = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("0", "1")]
    assert texts[0] == texts[1]


def test_bfloat16(tmp_path):
    model = pruned().bfloat16()
    sc.export(model, tmp_path / "folder", format="hub")
    same(built(tmp_path / "folder"), model, torch.randn(2, 3, 24, 24).bfloat16())
    assert built(tmp_path / "folder", dtype=torch.float32).head.weight.dtype == torch.float32
    model.head.float()
    with pytest.raises(sc.Unsupported, match="^model: expected weights of one type, got bfloat16, float32$"):
        sc.export(model, tmp_path / "other", format="hub")


def test_where_it_is_written(tmp_path):
    model = pruned()
    (tmp_path / "empty").mkdir()
    sc.export(model, tmp_path / "empty", format="hub")
    before = {file.name: file.read_bytes() for file in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").write_text("older")
    for path in (tmp_path / "empty", tmp_path / "file", tmp_path / "none" / "folder"):
        with pytest.raises(sc.InvalidArgument, match="^path: expected a new or empty folder in an existing one, got "):
            sc.export(model, path, format="hub")
    assert {file.name: file.read_bytes() for file in (tmp_path / "empty").iterdir()} == before
    assert (tmp_path / "file").read_text() == "older"


def test_nothing_is_left_of_what_could_not_be_written(tmp_path, monkeypatch):
    def full(*arguments, **options):
        save_for_hf(*arguments, **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(exporter, "save_for_hf", full)
    with pytest.raises(OSError, match="No space left"):
        sc.export(pruned(), tmp_path / "folder", format="hub")
    assert not list(tmp_path.iterdir())


def test_weights_that_timm_reads_otherwise_are_an_error(tmp_path, monkeypatch):
    def rounded(model, *arguments, **options):
        model.head.bias.data[0] += 1e-6
        save_for_hf(model, *arguments, **options)

    monkeypatch.setattr(exporter, "save_for_hf", rounded)
    with pytest.raises(sc.Unsupported, match=r"^model: expected weights .* got another head\.bias$"):
        sc.export(pruned(), tmp_path / "folder", format="hub")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sizes": {"blocks.0.ffn": 9999}}, r"^sizes\['blocks.0.ffn'\]: expected 1…108, got 9999$"),
        ({"sizes": {"blocks.9.ffn": 9}}, "blocks.9.ffn"),
        ({"dense": None}, "^dense: expected the dense model's name and arguments, got None$"),
        ({"arguments": [3]}, "^dense: expected the dense model's name and arguments, got"),
        ({"dense": "no_such_vit"}, "^architecture: expected one that timm .* got 'no_such_vit'$"),
        ({"arguments": {"depth": 100000}}, "depth.* got 100000"),
        ({"arguments": {"checkpoint_path": "x"}}, "checkpoint_path"),
        ({"last_block": "half"}, "^last_block: expected one of whole, pooled, got 'half'$"),
        ({"precision": "load"}, "^precision: expected a type of floating-point numbers, got 'load'$"),
        ({"precision": "int8"}, "^precision: expected a type of floating-point numbers, got 'int8'$"),
        ({"sizes": 3}, "^sizes: expected"),
    ],
)
def test_a_configuration_that_cannot_be(folder, change, text):
    fields = json.loads((folder / "config.json").read_text())
    fields["model_args"] |= change
    (folder / "config.json").write_text(json.dumps(fields))
    for build in (built, sc.load_dense):
        with pytest.raises(sc.InvalidArgument if build is sc.load_dense else sc.Error, match=text.strip("^$")) as error:
            build(folder)
        assert "\n" not in str(error.value)


def test_a_bare_name():
    with pytest.raises(sc.InvalidArgument, match="^dense: expected the dense model's name and arguments, got None$"):
        timm.create_model("secateur_vit")
    made = timm.create_model("secateur_vit", dense="vit_tiny_patch16_224", sizes={"blocks.3.ffn": 5, "width": 48})
    assert made.blocks[3].mlp.fc1.out_features == 5
    assert made.embed_dim == 48
    assert made.pretrained_cfg["input_size"] == (3, 224, 224)
    assert made.pretrained_cfg["architecture"] == "secateur_vit"
    arguments = {"num_classes": 9, "img_size": 32, "depth": 2}
    made = timm.create_model("secateur_vit", dense="vit_tiny_patch16_224", arguments=arguments, sizes={"width": 48})
    assert made(torch.randn(1, 3, 32, 32)).shape == (1, 9)
