"""torch.export's programs in files."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

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


# --- Compiled by AOTInductor ------------------------------------------------------------------------------------------

COMPILED = """
import sys, torch
sys.modules["secateur"] = sys.modules["timm"] = None
file, images, outputs = sys.argv[1:]
run = torch._inductor.aoti_load_package(file)
images, wanted = torch.load(images), torch.load(outputs)
for batch in (33, 1, 5):
    with torch.no_grad():
        assert float((run(images[:batch]) - wanted[:batch]).abs().max()) < 1e-5
"""

EXPORTS = """
import sys
import test_program, secateur as sc
sc.export(test_program.pruned(), sys.argv[1], format="torch", compiled=True)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    model, file = pruned(), tmp_path_factory.mktemp("compiled") / "model.pt2"
    before = torch.get_num_threads()
    # Any but the machine's, which torch does not write into the code.
    torch.set_num_threads(os.cpu_count() + 1)
    try:
        return model, file, sc.export(model, file, format="torch", compiled=True)
    finally:
        torch.set_num_threads(before)


def code(file):
    """What torch compiled: C++, which is in the package."""
    with zipfile.ZipFile(file) as archive:
        return "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))


def test_a_compiled_package_runs_without_secateur_and_timm(compiled, tmp_path):
    model, file, report = compiled
    assert report.version.startswith(f"{torch.__version__}, compiled for cpu")
    # What torch's vector library uses here, by the name that AOTInductor gives it.
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.backends.cpu.get_cpu_capability() in report.version
    assert report.batch_sizes == (1, 2, 7)
    assert 0 < report.difference < 1e-5
    assert report.size == file.stat().st_size
    assert list(file.parent.iterdir()) == [file]
    images = torch.randn(33, 3, 12, 12)
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        torch.save(model(images), tmp_path / "outputs.pt")
    names = [file, tmp_path / "images.pt", tmp_path / "outputs.pt"]
    done = subprocess.run([sys.executable, "-c", COMPILED, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_compiled_attention_calls_torchs_flash_kernel(compiled):
    """Queries and values are of unequal sizes, for which torch has the slow path alone."""
    _, file, _ = compiled
    text = code(file)
    assert text.count("aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(") == 2
    assert "softmax" not in text


def test_compiled_code_takes_torchs_threads_when_it_runs(compiled):
    """By default torch writes the number at export into the code, unless it is the machine's."""
    _, file, _ = compiled
    text = code(file)
    assert "#pragma omp parallel" in text
    assert "num_threads(" not in text


def test_compiling_says_nothing(tmp_path):
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", EXPORTS, tmp_path / "model.pt2"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_compiler_is_told_before_anything_is_written(tmp_path):
    file = tmp_path / "model.pt2"
    file.write_text("older")
    expected = r"^compiled: expected a C\+\+ compiler, g\+\+ or the one that CXX names, got none \([^\n]+\)$"
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(sc.InvalidArgument, match=expected),
    ):
        sc.export(small_vit(), file, format="torch", compiled=True)
    assert file.read_text() == "older"
    assert list(tmp_path.iterdir()) == [file]


def test_a_package_that_computes_something_else_is_no_file(tmp_path, monkeypatch):
    load = torch._inductor.aoti_load_package

    class Off:
        def __init__(self, path):
            self.run = load(path)

        def get_metadata(self):
            return {}

        def __call__(self, images):
            outputs = self.run(images)
            return outputs * 1.01 if isinstance(outputs, torch.Tensor) else [each * 1.01 for each in outputs]

    monkeypatch.setattr(torch._inductor, "aoti_load_package", Off)
    with pytest.raises(sc.Error, match="compute what the model does.*; the first module that differs is patch_embed"):
        sc.export(small_vit(), tmp_path / "model.pt2", format="torch", compiled=True)
    assert list(tmp_path.iterdir()) == []
