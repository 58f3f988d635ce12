"""Folders that timm reads without secateur."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import secateur as sc
import timm
import torch
from models import make
from safetensors.torch import load_file
from small_vits import small_vit
from timm.data import resolve_model_data_config

LOADED = """
import runpy, sys, torch
sys.modules["secateur"] = None
folder, images, outputs = sys.argv[1:]
model = runpy.run_path(folder + "/load.py")["load"]()
wanted = torch.load(outputs)
with torch.no_grad():
    assert float((model(torch.load(images)) - wanted).abs().max()) < 1e-4
print(type(model).__module__)
"""


def cut(model, ratios, method="magnitude", stats=None):
    sc.prune(model, sc.plan(model, stats, method=method, ratios=ratios))
    return model


def loads(model, folder, images, tmp_path):
    """In a process that has no secateur."""
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        torch.save(model(images), tmp_path / "outputs.pt")
    names = [str(each) for each in (folder, tmp_path / "images.pt", tmp_path / "outputs.pt")]
    done = subprocess.run([sys.executable, "-c", LOADED, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("timm.models.")


def test_a_pruned_model_runs_without_secateur(digits_model, digits_images, tmp_path):
    """Smaller heads, a narrower stream whose norms have another eps, and the last block for the class token alone."""
    stats = sc.calibrate(digits_model, [digits_images])
    model = cut(digits_model, {"qk": 0.3, "v": 0.3, "ffn": 0.31, "width": 0.1}, "project", stats)
    folder = tmp_path / "my model"
    report = sc.export(model, folder, format="timm", batch_sizes=(1, 3))
    assert [file.name for file in report.files] == ["config.json", "load.py", "model.safetensors"]
    assert report.details == {"architecture": "vit_tiny_patch16_224", "head_dim": model.blocks[0].attn.qk_dim}
    assert report.difference < 1e-4
    loads(model, folder, digits_images, tmp_path)
    # timm's own way, which names the size that is wrong where the class is forgotten.
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    told = json.loads((folder / "config.json").read_text())
    assert (told["num_classes"], told["model_args"]["embed_dim"]) == (10, model.embed_dim)
    assert told["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]


def test_where_only_channels_of_ffns_are_cut_timm_needs_no_class(digits_model, digits_images, tmp_path):
    model = cut(digits_model, {"ffn": 0.41})
    sc.export(model, tmp_path / "x", format="timm", batch_sizes=(2,))
    assert "class " not in (tmp_path / "x" / "load.py").read_text()
    found = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(found(digits_images), model(digits_images), rtol=0, atol=1e-5)


def test_sizes_for_which_hidden_over_width_is_one_short():
    """int((f + 0.5) / w * w) is f for all widths to 400 and f to four times of that; int(f / w * w) is not."""
    from secateur.families.vision_transformer.alike import Sizes

    short = 0
    for width in range(8, 400, 3):
        for hidden in range(1, 4 * width, 7):
            assert int(width * Sizes(width, 1, 1, 1, hidden).mlp_ratio) == hidden
            short += int(width * (hidden / width)) != hidden
    assert short > 100
    # One of them, built by timm.
    model = small_vit(embed_dim=49, num_heads=7, mlp_ratio=7 / 49 + 0.01)
    assert model.blocks[0].mlp.fc1.out_features == 7


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("registers_layer_scale", {"reg_tokens": 3, "init_values": 0.1, "no_embed_class": True}),
        ("inner_norms", {"scale_attn_norm": True, "scale_mlp_norm": True}),
        ("no_qkv_bias", {"qkv_bias": False}),
        ("no_class_token", {"class_token": False, "global_pool": "avg"}),
        ("distilled", {}),
    ],
)
def test_other_kinds_built_by_hand(kind, arguments, tmp_path):
    base = {"img_size": (12, 15), "patch_size": 3, "embed_dim": 39, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7}
    model = make(kind)
    with pytest.raises(sc.InvalidArgument, match=r"^factory: expected \(name, kwargs\) that build the dense Vision"):
        sc.export(model, tmp_path / "x", format="timm")
    name = type(model).__name__
    cut(model, {"ffn": 0.3, "qk": 0.3, "v": 0.3})
    sc.export(model, tmp_path / "x", format="timm", factory=(name, {**base, **arguments}), batch_sizes=(2,))
    loads(model, tmp_path / "x", torch.randn(3, 3, 12, 15), tmp_path)
    # Nothing of the weights that timm has for the name.
    told = json.loads((tmp_path / "x" / "config.json").read_text())["pretrained_cfg"]
    assert told["mean"] == list(resolve_model_data_config(model)["mean"])
    assert not {"license", "tag", "hf_hub_id", "url"} & set(told)


def test_weights_of_16_bits_stay_so(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, num_heads=3, depth=2, num_classes=5
    )
    model = cut(model.eval(), {"ffn": 0.3}).to(torch.bfloat16)
    sc.export(model, tmp_path / "x", format="timm", batch_sizes=(2,))
    held = load_file(tmp_path / "x" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}


def test_the_first_layer_that_differs_is_named(make_digits_model, tmp_path):
    other = "for timm, got"
    for ratios, text in (
        ({"blocks.1.ffn": 0.3}, rf"^blocks\.1\.mlp: expected 372 hidden channels, as in blocks\.0, {other} 260 hidden"),
        (
            {"blocks.2.qk": 0.3, "blocks.2.v": 0.3},
            r"^blocks\.2\.attn: expected 3 heads of 31, as in .* 3 heads of 22$",
        ),
        (
            {"blocks.1.heads": 0.34},
            rf"^blocks\.1\.attn: expected 3 heads of 31, as in blocks\.0, {other} 2 heads of 31$",
        ),
        ({"blocks.1.attn": 1}, rf"^blocks\.1\.attn: expected a layer {other} none: it was removed$"),
        ({"qk": 0.3}, rf"^blocks\.0\.attn: expected as many queries as values in a head {other} 22 and 31; prune"),
        ({"blocks.1.tokens": 0.3}, rf"^blocks\.1: expected a block that merges no tokens {other} one that does$"),
    ):
        model = cut(make_digits_model(), ratios)
        with pytest.raises(sc.Unsupported, match=text):
            sc.export(model, tmp_path / "x", format="timm")
    model = make_digits_model()
    model.blocks[1].mlp.act = torch.nn.ReLU()
    text = r"^model: expected what timm's .* can be, got ReLU at blocks\.1\.mlp\.act where it builds GELU$"
    with pytest.raises(sc.Unsupported, match=text):
        sc.export(model, tmp_path / "x", format="timm")
    model = timm.create_model("resnet18").eval()
    with pytest.raises(sc.Unsupported, match="^model: expected a VisionTransformer for timm, got ResNet$"):
        sc.export(model, tmp_path / "x", format="timm")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_new_or_empty(digits_model, tmp_path):
    full, empty = tmp_path / "full", tmp_path / "empty"
    for each in (full, empty):
        each.mkdir()
    (full / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (full, tmp_path / "file"):
        with pytest.raises(
            sc.InvalidArgument, match=f"^path: expected a new or empty folder in an existing one, got {path}$"
        ):
            sc.export(digits_model, path, format="timm")
    for path in (tmp_path / "none" / "x", 3):
        with pytest.raises(sc.InvalidArgument, match="^path: expected a new or empty folder in an existing one, got "):
            sc.export(digits_model, path, format="timm")
    sc.export(digits_model, empty, format="timm", batch_sizes=(1,))
    assert (full / "notes").read_text() == "mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert len(list(empty.iterdir())) == 3


def test_native_takes_a_factory_as_well(tmp_path):
    """An option of any type is not checked against one."""
    model = make("plain")
    with pytest.raises(sc.InvalidArgument, match="^factory: expected"):
        sc.export(model, tmp_path / "x", format="native")
    base = {"img_size": (12, 15), "patch_size": 3, "embed_dim": 39, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7}
    report = sc.export(
        model, tmp_path / "x", format="native", factory=("VisionTransformer", {**base, "num_classes": 7})
    )
    assert report.difference == 0
