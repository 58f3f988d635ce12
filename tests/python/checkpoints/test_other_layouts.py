"""Weights in the layout of their publication, which timm converts when it fetches them."""

from __future__ import annotations

import pytest
import secateur as sc
import timm
import torch

VIT = {"img_size": 28, "patch_size": 7, "embed_dim": 21, "depth": 2, "num_heads": 3, "num_classes": 0}


def same(found, expected):
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


def dinov2(model):
    """DINOv2's with registers: positions for the class token too, and a token of its training."""
    state = model.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    first = torch.randn(1, 1, 21)
    state["cls_token"], state["pos_embed"] = state["cls_token"] - first, torch.cat([first, state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.ones(1, 21)}


def test_registers_of_dinov2(tmp_path):
    name, more = "vit_small_patch14_reg4_dinov2", {**VIT, "num_classes": 0}
    torch.manual_seed(9)
    expected = timm.create_model(name, **more).eval()
    state = dinov2(expected)
    torch.save(state, tmp_path / "dinov2.pth")
    with pytest.warns(UserWarning, match="others in dinov2.pth, which timm converts or leaves out: .*mask_token"):
        found = sc.load_dense(tmp_path / "dinov2.pth", model=name, **more)
    with torch.no_grad():
        expected.cls_token.copy_(state["cls_token"] + state["pos_embed"][:, 0])
    same(found, expected)
    # Positions of other images would be interpolated by timm.
    with pytest.raises(sc.InvalidArgument, match=r"missing .*pos_embed \(1, 17, 21\) for \(1, 25, 21\)"):
        sc.load_dense(tmp_path / "dinov2.pth", model=name, **{**more, "img_size": 35})


def test_patches_by_a_linear_layer(tmp_path):
    """Of a Vision Transformer from before timm took convolutions, with a layer that is gone."""
    torch.manual_seed(9)
    expected = timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 3}).eval()
    state = expected.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    torch.save(state | {"pre_logits.fc.bias": torch.ones(21)}, tmp_path / "old.pth")
    with pytest.warns(UserWarning, match="leaves out: pre_logits.fc.bias"):
        same(sc.load_dense(tmp_path / "old.pth", model="vit_tiny_patch16_224", **VIT | {"num_classes": 3}), expected)


def test_swin_as_published(tmp_path):
    """Patches are merged at the end of a stage, buffers are stored, and the head has no module of its own."""
    more = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}
    torch.manual_seed(9)
    expected = timm.create_model("swin_tiny_patch4_window7_224", **more).eval()
    state = {}
    for name, tensor in expected.state_dict().items():
        state[name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head.")] = tensor
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    torch.save({"model": state}, tmp_path / "swin.pth")
    with pytest.warns(UserWarning, match="others in swin.pth, which timm converts or leaves out: layers.0.downsample"):
        same(sc.load_dense(tmp_path / "swin.pth", model="swin_tiny_patch4_window7_224", **more), expected)
