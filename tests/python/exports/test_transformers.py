"""Folders for transformers' ViT."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import secateur as sc
import timm
import torch
from models import make

LOADED = """
import sys, torch
sys.modules["secateur"] = sys.modules["timm"] = None
import transformers
folder, images, outputs = sys.argv[1:]
model, told = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
assert not any(told.values()), told
wanted = torch.load(outputs)
with torch.no_grad():
    assert float((model.eval()(torch.load(images)).logits - wanted).abs().max()) < 1e-4
"""


def cut(model, ratios, method="magnitude", stats=None):
    sc.prune(model, sc.plan(model, stats, method=method, ratios=ratios))
    return model


def small(**more):
    torch.manual_seed(0)
    given = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **given | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_pruned_model_runs_in_transformers_alone(digits_model, digits_images, tmp_path):
    """Heads of another size than width / heads, a narrower stream whose norms have another eps."""
    pytest.importorskip("transformers")
    stats = sc.calibrate(digits_model, [digits_images])
    model = cut(digits_model, {"qk": 0.3, "v": 0.3, "ffn": 0.31, "width": 0.1}, "project", stats)
    report = sc.export(model, tmp_path / "x", format="transformers", batch_sizes=(1, 3))
    assert [file.name for file in report.files] == ["config.json", "model.safetensors"]
    told = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (told["head_dim"], told["hidden_size"], told["num_attention_heads"]) == (22, model.embed_dim, 3)
    assert "pruned_heads" not in told
    torch.save(digits_images, tmp_path / "images.pt")
    with torch.no_grad():
        torch.save(model(digits_images), tmp_path / "outputs.pt")
    names = [str(tmp_path / name) for name in ("x", "images.pt", "outputs.pt")]
    done = subprocess.run([sys.executable, "-c", LOADED, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "more", [{"qkv_bias": False}, {"act_layer": "gelu_tanh"}, {"act_layer": "relu"}, {"act_layer": "silu"}]
)
def test_other_kinds(more, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = cut(small(**more), {"heads": 0.34, "ffn": 0.3})
    sc.export(model, tmp_path / "x", format="transformers", batch_sizes=(2,))
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "x").eval()
    images = torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        assert torch.allclose(loaded(images).logits, model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no_class_token", "cls_token: expected one for transformers' ViT, got none"),
        ("no_pos_embed", "pos_embed: expected one for transformers' ViT, got none"),
        ("fc_norm", "global_pool: expected 'token' for transformers' ViT, got 'avg'"),
        ("registers_layer_scale", "reg_token: expected none for transformers' ViT, got one"),
        ("rms_norm", r"blocks\.0\.norm1: expected LayerNorm for transformers' ViT, got RmsNorm"),
        ("norm_pre", "norm_pre: expected Identity for transformers' ViT, got LayerNorm"),
        ("inner_norms", r"blocks\.0\.attn\.norm: expected Identity for transformers' ViT, got LayerNorm"),
        ("qk_norm", r"blocks\.0\.attn\.q_norm: expected Identity for transformers' ViT, got LayerNorm"),
        ("no_proj_bias", r"blocks\.0\.attn\.proj\.bias: expected one for transformers' ViT, got none"),
        ("patch_norm", r"patch_embed\.norm: expected Identity for transformers' ViT, got LayerNorm"),
        ("identity_head", "head: expected Linear for transformers' ViT, got Identity"),
        ("no_final_norm_with_head", "norm: expected LayerNorm for transformers' ViT, got Identity"),
        ("swiglu_packed", r"blocks\.0\.mlp: expected Mlp for transformers' ViT, got GluMlp"),
        ("activation_not_zero_at_zero", r"blocks\.0\.mlp\.act: expected GELU, .* for transformers' ViT, got Sigmoid"),
        ("map_pool_prefix", "attn_pool: expected none for transformers' ViT, got one"),
        ("gate", r"blocks\.0\.attn\.gate: expected none for transformers' ViT, got one"),
        ("distilled", "model: expected VisionTransformer for transformers' ViT, got VisionTransformerDistilled"),
        ("post_norm", r"blocks\.0: expected Block for transformers' ViT, got ResPostBlock"),
        ("hybrid", "patch_embed: expected PatchEmbed for transformers' ViT, got HybridEmbed"),
    ],
)
def test_what_the_class_cannot_hold_is_named(kind, text, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(sc.Unsupported, match=f"^{text}$"):
        sc.export(make(kind), tmp_path / "x", format="transformers")
    assert not list(tmp_path.iterdir())


def test_layer_scale_and_unlike_layers_are_named(tmp_path):
    pytest.importorskip("transformers")
    by_eps, by_act = small(), small()
    by_eps.blocks[1].norm2.eps = 1e-3
    by_act.blocks[1].mlp.act = torch.nn.ReLU()
    one = "for transformers, got"
    for model, text in (
        (small(init_values=0.1), r"blocks\.0\.ls1: expected Identity for transformers' ViT, got LayerScale"),
        (by_eps, r"blocks\.1\.norm2\.eps: expected 1e-06, as in blocks\.0\.norm1 for transformers' ViT, got 0\.001"),
        (by_act, r"blocks\.1\.mlp\.act: expected the activation of blocks\.0 for transformers' ViT, got ReLU"),
        (cut(small(), {"v": 0.3}), rf"blocks\.0\.attn: expected as many queries as values in a head {one} 8 and .*"),
        (cut(small(), {"blocks.0.tokens": 0.3}), rf"blocks\.0: expected a block that merges no tokens {one} one .*"),
        (cut(small(), {"blocks.1.ffn": 0.5}), rf"blocks\.1\.mlp: expected 96 .*, as in blocks\.0, {one} 48 .*"),
    ):
        with pytest.raises(sc.Unsupported, match=f"^{text}$"):
            sc.export(model, tmp_path / "x", format="transformers")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name, *rest)
    )
    text = r"^format: expected transformers to be installed \(pip install 'secateur\[transformers\]'\), got none$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.export(small(), tmp_path / "x", format="transformers")
    assert not list(tmp_path.iterdir())
