"""ONNX files."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext

import onnx
import onnxruntime
import pytest
import secateur as sc
import timm
import torch
from small_vits import small_vit
from torch import nn


def test_one_file_of_the_opset_that_was_asked_for(tmp_path):
    model = small_vit()
    for opset in (18, 20):
        report = sc.export(model, tmp_path / f"{opset}.onnx", opset=opset)
        found = onnx.load(tmp_path / f"{opset}.onnx")
        onnx.checker.check_model(found)
        assert [each.version for each in found.opset_import if each.domain == ""] == [opset]
        assert report.version == f"opset {opset}"
        assert report.engine == f"onnxruntime {onnxruntime.__version__}"


def test_any_batch_size_runs(tmp_path):
    model = small_vit()
    sc.export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 5, 33):
        images = torch.randn(batch, 3, 12, 12)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert float((torch.from_numpy(found) - model(images)).abs().max()) < 1e-5


def test_weights_in_a_second_file(tmp_path):
    report = sc.export(small_vit(), tmp_path / "model.onnx", external_data=True)
    assert [file.name for file in report.files] == ["model.onnx", "model.onnx.data"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in report.files:
        file.rename(moved / file.name)
    onnxruntime.InferenceSession(str(moved / "model.onnx"))


def test_an_older_file_stays_where_the_export_fails(tmp_path):
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, images):
            if images.sum() > 0:  # depends on the values
                return images * self.scale
            return images

    file = tmp_path / "model.onnx"
    file.write_text("older")
    with pytest.raises(sc.Unsupported, match="^model: expected one that torch exports to ONNX, got "):
        sc.export(Sorted().eval(), file)
    assert file.read_text() == "older"
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    with pytest.raises(
        sc.InvalidArgument, match=r"expected onnxscript to be installed \(pip install 'secateur\[onnx\]'\)"
    ):
        sc.export(small_vit(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("opset", "text"),
    [
        (17, "^opset: expected an integer of at least 18, got 17$"),
        (99, "^opset: expected torch .* to write 99, got"),
    ],
)
def test_an_opset_that_is_not_written_is_an_error(tmp_path, opset, text, caplog):
    """torch itself logs a traceback and writes opset 18."""
    with pytest.raises(sc.Error, match=text):
        sc.export(small_vit(), tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR", "CRITICAL")]


@pytest.mark.parametrize("opset", [23, 24])
def test_a_file_with_the_operator_attention_names_who_cannot_take_it(opset, tmp_path):
    text = (
        "^opset: expected less than 23 for onnxruntime's quantizer and optimizer, TVM, IREE and MNN, which do not know "
        f"the operator Attention, got {opset} with 3 of them$"
    )
    with pytest.warns(UserWarning, match=text) as told:
        report = sc.export(small_vit(), tmp_path / "model.onnx", opset=opset)
    assert told[0].filename == __file__
    assert report.version == f"opset {opset}"


def test_no_warning_where_there_is_no_such_operator(tmp_path):
    model = small_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    sc.export(model, tmp_path / "model.onnx", opset=23)
    sc.export(small_vit(), tmp_path / "model.onnx", opset=22)


class Masked(nn.Module):
    """Attention in which some patches see none: in torch, their rows become zeros."""

    def __init__(self, mask):
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.pretrained_cfg = {"input_size": (3, 4, 4)}
        if mask is None:
            self.mask = None
        else:
            self.register_buffer("mask", mask)

    def forward(self, images):
        x = self.embed(images.transpose(1, 2).flatten(2))[:, None]
        mask = (images[:, 0] > -5).all(-1)[:, None, :, None] if self.mask is None else self.mask
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask.expand(-1, -1, 4, 4)).flatten(1)


def test_a_row_that_masks_everything_gives_zeros_or_is_refused(tmp_path):
    """torch writes it as an average of everything, but in the operator Attention."""
    partly = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    partly[..., 1, :3] = False
    whole = partly.clone()
    whole[..., 1, 3] = False
    images = torch.randn(2, 3, 4, 4)
    images[:, 0, 1] = -9  # where the mask is computed from images, it is row 1 as well
    computed = "^opset: expected at least 23 for attention with a boolean mask that is computed, got 20, where"
    for mask, opset, refused in (
        (partly, 20, None),
        (whole, 20, "^export: expected onnxruntime .* to compute what the model does, got a difference"),
        (None, 20, computed),
        (partly, 23, None),
        (whole, 23, None),
        (None, 23, None),
    ):
        model = Masked(mask).eval()
        if refused:
            with pytest.raises(sc.Error, match=refused):
                sc.export(model, tmp_path / "x.onnx", opset=opset)
            assert not (tmp_path / "x.onnx").exists()
            continue
        with pytest.warns(UserWarning, match="^opset: ") if opset == 23 else nullcontext():
            sc.export(model, tmp_path / "x.onnx", opset=opset)
        session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert float((torch.from_numpy(found) - model(images)).abs().max()) < 1e-5
        assert (mask is partly) == bool(found.reshape(2, 4, 8)[:, 1].any())
        (tmp_path / "x.onnx").unlink()


def test_no_model_of_a_family_has_masks_that_could_do_so(tmp_path):
    """Swin adds -100 where windows are shifted, and merged tokens add the logarithm of their size."""
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2), num_heads=(3, 6), num_classes=5
    ).eval()
    assert swin.layers[0].blocks[1].attn_mask.unique().tolist() == [-100, 0]
    merging = small_vit()
    sc.prune(merging, sc.plan(merging, method="magnitude", ratios={"blocks.0.tokens": 0.4}))
    for model in (swin, merging):
        sc.export(model, tmp_path / "x.onnx", batch_sizes=(2,))
        assert "IsNaN" not in [node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node]
