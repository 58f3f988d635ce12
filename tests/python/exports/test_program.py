"""torch.export's programs in files."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
import secateur as sc
import torch
from small_vits import small_vit
from torch import nn

LOADED = """
import sys, torch
sys.modules["secateur"] = sys.modules["timm"] = None
file, images, outputs = sys.argv[1:]
program = torch.export.load(file)
images, wanted = torch.load(images), torch.load(outputs)
for batch in (1, 5, 33):
    assert float((program.module()(images[:batch]) - wanted[:batch]).abs().max()) < 1e-5
assert program.example_inputs is None
"""


def pruned():
    """Queries and values of unequal sizes, merged tokens, a layer less and the last block for the class token alone."""
    model = small_vit()
    ratios = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2, "blocks.0.tokens": 0.4, "blocks.1.attn": 1}
    sc.prune(model, sc.plan(model, method="magnitude", ratios=ratios), last_block="pooled")
    return model


def test_a_file_runs_without_secateur_and_timm(tmp_path):
    model = pruned()
    report = sc.export(model, tmp_path / "model.pt2", format="torch")
    assert report.version == f"{torch.__version__}, cpu"
    images = torch.randn(33, 3, 12, 12)
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        torch.save(model(images), tmp_path / "outputs.pt")
    names = [tmp_path / name for name in ("model.pt2", "images.pt", "outputs.pt")]
    done = subprocess.run([sys.executable, "-c", LOADED, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_attention_stays_fused_with_queries_as_wide_as_values(tmp_path):
    """torch has no fast kernel for other sizes."""
    sc.export(pruned(), tmp_path / "model.pt2", format="torch")
    nodes = torch.export.load(tmp_path / "model.pt2").graph.nodes
    calls = [node for node in nodes if "scaled_dot_product" in str(node.target)]
    assert len(calls) == 2
    for call in calls:
        query, _, value = (node.meta["val"] for node in call.args[:3])
        assert query.shape[-1] == value.shape[-1]


def test_the_file_holds_weights_and_no_images(tmp_path):
    model = small_vit()
    sc.export(model, tmp_path / "model.pt2", format="torch")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        stored = b"".join(archive.read(name) for name in archive.namelist())
    # The example is drawn from the batch size as seed, as for other formats.
    example = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    assert model.head.weight.detach().numpy().tobytes() in stored
    assert example[0, 0, 0].numpy().tobytes() not in stored


class Chosen(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by, self.scale = by, nn.Parameter(torch.ones(1))

    def forward(self, images):
        if self.by == "values":
            return images * self.scale if images.sum() > 0 else images
        return images.reshape(2, -1) * self.scale


@pytest.mark.parametrize("by", ["values", "a batch of two"])
def test_an_older_file_stays_where_the_export_fails(tmp_path, by):
    file = tmp_path / "model.pt2"
    file.write_text("older")
    with pytest.raises(sc.Unsupported, match="^model: expected one that torch.export takes, got [^\\n]+$"):
        sc.export(Chosen(by).eval(), file, format="torch")
    assert file.read_text() == "older"
    assert list(tmp_path.iterdir()) == [file]
