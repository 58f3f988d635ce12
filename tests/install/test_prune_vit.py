"""The programs of examples/embed: they prune a ViT from file to file, as secateur does, and time what it exports."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import struct
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import secateur as sc
import timm
import torch
from commands import run
from filelock import FileLock  # torch brings it
from safetensors.torch import load_file, save_file
from secateur import core
from secateur.files import container
from torch import Tensor, nn
from vits import buffers, images, observed, vit

ROOT = Path(__file__).parents[2]
RATIOS = {"qk": 0.45, "v": 0.3, "ffn": 0.4}
OPTIONS = [word for name, ratio in RATIOS.items() for word in (f"--{name}", ratio)]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prune_vit, and what is built beside it, against the library that this installation brings."""
    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "prune_vit"
    where = f"-Dsecateur_DIR={core.cmake_dir()}"
    with FileLock(folder.with_suffix(".lock")):  # one worker builds, the others wait
        output = run("cmake", "-S", ROOT / "examples" / "embed", "-B", folder, where, "-DCMAKE_BUILD_TYPE=Release")
        if "prune_vit is left out" in output:
            pytest.skip("nlohmann/json is neither installed nor to be fetched")
        run("cmake", "--build", folder, "--parallel", 2)
    return folder / "prune_vit"


@pytest.fixture
def onnx_program(program: Path) -> Path:
    """prune_onnx, where CMake finds onnxruntime: CMAKE_PREFIX_PATH may say where."""
    path = program.with_name("prune_onnx")
    if not path.exists():
        pytest.skip("onnxruntime's C++ headers and library were not found")
    return path


def refused(program: Path, *arguments: object) -> str:
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout == ""
    return result.stderr.removeprefix(f"{program.name}: ").removesuffix("\n")


# --- Given the same buffers: the bits of Python -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), ({"qkv_bias": False, "init_values": 0.1}, torch.bfloat16), ({}, torch.float64)],
    ids=["float32", "bfloat16", "float64"],
)
def test_two_rounds_have_the_bits_of_python(program, tmp_path, options, dtype, stream):
    """The second starts from a file of the first: other layouts, and a softmax scale that sizes do not tell."""
    model, batch = vit(dtype, **options), images(5, dtype)
    for turn in range(2):
        dense, out, report = (tmp_path / f"{turn}.{name}" for name in ("safetensors", "out", "json"))
        sc.save(model, dense)
        before = dense.read_bytes()
        words = [*OPTIONS, "--report", report, *(["--stream"] if stream else [])]
        output = run(program, dense, buffers(model, batch, tmp_path / "buffers"), out, *words)
        assert dense.read_bytes() == before

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random images are not normalised
            statistics = sc.calibrate(model, [batch])
        plan = sc.plan(model, statistics, method="snp", ratios=RATIOS)
        found = json.loads(report.read_text())
        assert found.keys() == {name for name in plan.keep if not name.endswith("heads")} - {"width"}
        for name, choice in found.items():
            shape = (choice["heads"], choice["size"])
            if name.endswith("qk"):
                scores = statistics.importance(name)
            else:
                block, _, kind = name.rpartition(".")
                layer = model.get_submodule(f"{block}.{'mlp.fc1' if kind == 'ffn' else 'attn.qkv'}")
                scores = np.asarray(core.value_similarity(layer.weight.detach()[-shape[0] * shape[1] :]))
            assert np.array_equal(np.reshape(choice["scores"], shape), scores.reshape(shape)), name
            assert np.array_equal(np.reshape(choice["kept"], (shape[0], -1)), plan.keep[name]), name
            assert f"{name}: {plan.keep[name].shape[1]} of {shape[1]} kept\n" in output

        sc.prune(model, plan, last_block="whole")  # which the program keeps
        sc.save(model, tmp_path / "expected")
        fields, tensors = container.read(out, "model")
        expected_fields, expected = container.read(tmp_path / "expected", "model")
        assert fields == expected_fields
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name
        loaded = sc.load(out)
        with torch.inference_mode():
            assert torch.equal(loaded(batch), model(batch))
        model = loaded
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_one_image_and_other_ranks_of_gamma(program, tmp_path):
    model, report = vit(), tmp_path / "report"
    sc.save(model, tmp_path / "dense")
    seen = buffers(model, images(1), tmp_path / "buffers")
    run(program, tmp_path / "dense", seen, tmp_path / "out", "--gamma", 3, "--report", report)
    tensors = load_file(seen)
    scorer = core.AttentionScorer(heads=3, head_dim=13, gamma=3)
    scorer.update(tensors["blocks.1.q"], tensors["blocks.1.k"])
    found = json.loads(report.read_text())
    assert found.keys() == {"blocks.0.qk", "blocks.1.qk"}
    assert np.array_equal(np.reshape(found["blocks.1.qk"]["scores"], (3, 13)), scorer.scores())
    assert np.array_equal(np.reshape(found["blocks.1.qk"]["kept"], (3, 7)), core.select(scorer.scores(), 7))


def test_any_text_has_the_checksum_of_python(program, tmp_path):
    model, odd = vit(), 'é"\\\b\t\x01\x7f\u2028\ud7ff\U0001f600/'
    sc.save(model, tmp_path / "dense")
    fields, tensors = container.read(tmp_path / "dense", "model")
    tensors |= {
        odd: torch.arange(3),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
        "half": torch.ones(1).half(),
    }
    container.write(tmp_path / "odd", "model", fields | {odd: [odd, None, 1e-6, 1e22, -7]}, tensors)
    seen = buffers(model, images(2), tmp_path / "buffers")
    for words in ((), ("--stream",)):
        run(program, tmp_path / "odd", seen, tmp_path / "out", "--qk", 0.99, *words)
        found_fields, found = container.read(tmp_path / "out", "model")
        assert found_fields[odd] == [odd, None, 1e-6, 1e22, -7]
        assert found_fields["sizes"]["blocks.1.qk"] == 1
        for name in (odd, "scalar", "nothing", "half"):
            assert torch.equal(found[name], tensors[name])
            assert found[name].dtype == tensors[name].dtype


# --- From the outputs of a graph --------------------------------------------------------------------------------------


class WithQueriesAndKeys(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with observed(self.model) as found:
            logits = self.model(batch)
        return logits, found


NAMES = [name for index in range(2) for name in (f"blocks.{index}.q", f"blocks.{index}.k")]


def exported(model: nn.Module, batch: Tensor, path: Path, *, names: list[str] = NAMES, free: bool = False) -> Path:
    """The module in ONNX, for batches of that size, or of any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (batch,),
            dynamo=True,
            output_names=["logits", *names],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if free else None,
            verbose=False,
        )
        program.save(path)
    return path


def same_choices_outside_ties(ours: dict[str, dict], others: dict[str, dict]) -> float:
    """Scores within 1e-4, and kept sets that differ by neurons as good as the last one kept; the largest difference."""
    assert ours.keys() == others.keys()
    largest = 0.0
    for name in ours:
        scores, other_scores = (np.reshape(report[name]["scores"], (3, 13)) for report in (ours, others))
        largest = max(largest, np.abs(scores - other_scores).max())
        for head in range(3):
            kept, other = (set(np.reshape(report[name]["kept"], (3, 7))[head]) for report in (ours, others))
            last = min(scores[head][list(kept)])
            assert all(abs(scores[head][index] - last) <= 2e-4 for index in kept ^ other), name
    assert largest <= 1e-4
    return largest


def test_buffers_of_onnxruntime(program, tmp_path):
    """The graph gives queries and keys beside the logits; they differ from torch's by rounding."""
    model, batch = vit(), images(6)
    sc.save(model, tmp_path / "dense")
    session = onnxruntime.InferenceSession(
        exported(WithQueriesAndKeys(model), batch, tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    assert [output.name for output in session.get_outputs()] == ["logits", *NAMES]
    outputs = session.run(NAMES, {session.get_inputs()[0].name: batch.numpy()})
    save_file({name: torch.from_numpy(array) for name, array in zip(NAMES, outputs, strict=True)}, tmp_path / "graph")

    reports = []
    for seen in (buffers(model, batch, tmp_path / "torch"), tmp_path / "graph"):
        run(program, tmp_path / "dense", seen, tmp_path / "out", "--report", tmp_path / "report")
        reports.append(json.loads((tmp_path / "report").read_text()))
    assert same_choices_outside_ties(*reports) > 0


@pytest.mark.parametrize("free", [False, True], ids=["batches of 5", "any batch"])
def test_a_graph_in_onnxruntime(onnx_program, tmp_path, free):
    """C++ runs the graph: 35 images in 7 calls of 5, or in calls of 16, 16 and 3."""
    model, batch = vit(), images(35)
    sc.save(model, tmp_path / "dense")
    save_file({"images": batch}, tmp_path / "images")
    graph = exported(WithQueriesAndKeys(model), batch[:5], tmp_path / "model.onnx", free=free)
    files = [tmp_path / "dense", graph, tmp_path / "images", tmp_path / "out"]
    output = run(onnx_program, *files, "--report", tmp_path / "report")
    assert "blocks.1.qk: 7 of 13 kept\n" in output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random images are not normalised
        statistics = sc.calibrate(model, [batch])
    plan = sc.plan(model, statistics, method="snp", ratios={"qk": 0.5})
    groups = "blocks.0.qk", "blocks.1.qk"
    expected = {name: {"scores": statistics.importance(name), "kept": plan.keep[name]} for name in groups}
    found = json.loads((tmp_path / "report").read_text())
    same_choices_outside_ties(expected, found)

    # What was kept is what is in the file.
    loaded = sc.load(tmp_path / "out")
    for index, block in enumerate(loaded.blocks):
        rows = model.blocks[index].attn.qkv.weight.unflatten(0, (3, 3, 13))
        kept = torch.tensor(found[f"blocks.{index}.qk"]["kept"]).view(3, 7)
        for part in range(2):
            wanted = torch.stack([rows[part, head, kept[head]] for head in range(3)]).flatten(0, 1)
            assert torch.equal(block.attn.qkv.weight[21 * part : 21 * (part + 1)], wanted)
    run(onnx_program, *files, "--ffn", 0.5, "--stream")
    assert sc.load(tmp_path / "out").blocks[1].mlp.fc1.out_features == 78


class Slices(nn.Module):
    """Queries and keys that are pieces of the images: their bits do not depend on who computes them."""

    def __init__(self, **changes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.changes = {f"blocks.1.{name}": change for name, change in changes.items()}

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        flat = batch.flatten(1)
        found = {}
        for i, name in enumerate(NAMES):
            piece = flat[:, 700 * i : 700 * i + 17 * 3 * 13].unflatten(1, (17, 3, 13))
            found[name] = self.changes.get(name, torch.clone)(piece)
        return flat.sum(1), found


@pytest.mark.parametrize("size", [1, 3, 11, 33, 0], ids=lambda size: f"batches of {size}" if size else "any batch")
def test_batches_do_not_change_the_bits(program, onnx_program, tmp_path, size):
    """Given the same bits, the scores of a graph's outputs are those of buffers, however many images a call has."""
    batch = images(33)
    sc.save(vit(), tmp_path / "dense")
    save_file({"images": batch}, tmp_path / "images")
    save_file({name: tensor.contiguous() for name, tensor in Slices()(batch)[1].items()}, tmp_path / "buffers")
    graph = exported(Slices(), batch[: size or 2], tmp_path / "model.onnx", free=size == 0)
    for name, files in ("buffers", [program, graph.with_name("buffers")]), ("graph", [onnx_program, graph, "images"]):
        first, *rest = (tmp_path / file for file in files)
        words = "--v", 0.3, "--report", tmp_path / f"{name}.json"
        run(first, tmp_path / "dense", *rest, tmp_path / f"{name}.out", *words)
    assert (tmp_path / "buffers.json").read_bytes() == (tmp_path / "graph.json").read_bytes()
    assert filecmp.cmp(tmp_path / "buffers.out", tmp_path / "graph.out", shallow=False)


def test_graphs_and_images_that_do_not_fit_are_refused(onnx_program, tmp_path):
    batch = images(6)
    sc.save(vit(), tmp_path / "dense")
    sc.save(vit(qk_norm=True), tmp_path / "normed")
    exported(Slices(), batch[:2], tmp_path / "two.onnx")
    exported(Slices(), batch[:2], tmp_path / "any.onnx", free=True)
    exported(Slices(), batch[:2], tmp_path / "other.onnx", names=["blocks.0.q", "blocks.0.k", "blocks.1.q", "k"])
    exported(Slices(k=Tensor.long), batch[:2], tmp_path / "int.onnx")
    exported(Slices(q=lambda piece: piece.mT), batch[:2], tmp_path / "turned.onnx")
    exported(Slices(q=lambda piece: piece[:1]), batch[:2], tmp_path / "first.onnx")
    exported(Slices(), batch[:2].double(), tmp_path / "images64.onnx")
    broken = onnx.load(tmp_path / "two.onnx")  # takes any number of images, but works for 2
    broken.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "images"
    onnx.save(broken, tmp_path / "broken.onnx")
    (tmp_path / "none.onnx").write_bytes(b"\x1b[2J\n" * 10)
    for name, tensors in {
        "six": {"images": batch},
        "five": {"images": batch[:5].clone()},
        "empty": {"images": batch[:0].clone()},
        "one": {"images": batch[0].clone()},
        "half": {"images": batch.half()},
        "sizes": {"images": batch[..., 1:].contiguous()},
        "nan": {"images": batch.index_fill(0, torch.tensor(3), torch.nan)},
        "unnamed": {"image": batch},
    }.items():
        save_file(tensors, tmp_path / name)
    files = sorted(tmp_path.iterdir())
    takes = r"\(any, 3, 32, 32\), as \w+\.onnx takes them"
    for model_name, graph_name, images_name, expected in (
        ("dense", "two.onnx", "five", r"five: images: expected a multiple of the 2 that two\.onnx .*, got 5 images"),
        ("dense", "two.onnx", "empty", rf"empty: images: expected {takes}, got \(0, 3, 32, 32\)"),
        ("dense", "any.onnx", "empty", rf"empty: images: expected {takes}, got \(0, 3, 32, 32\)"),
        ("dense", "any.onnx", "one", rf"one: images: expected {takes}, got \(3, 32, 32\)"),
        ("dense", "any.onnx", "sizes", rf"sizes: images: expected {takes}, got \(6, 3, 32, 31\)"),
        ("dense", "any.onnx", "half", "half: images: expected F32, got F16"),
        ("dense", "any.onnx", "unnamed", "unnamed: images: expected a tensor of that name, got none"),
        ("dense", "any.onnx", "none.onnx", "none.onnx: expected .*, got .*"),
        ("dense", "any.onnx", "nan", r"blocks\.0\.qk q: expected finite values, got nan at \(image \d, .*\)"),
        ("dense", "two.onnx", "nan", r"blocks\.0\.qk q: expected finite values, got nan at \(image 1, .*\)"),
        ("dense", "other.onnx", "six", r"other\.onnx: expected an output blocks\.1\.k, got none of that name"),
        ("dense", "int.onnx", "six", r"int\.onnx: blocks\.1\.k: expected .*bfloat16, got ONNX's type 7"),
        ("dense", "turned.onnx", "six", r"blocks\.1\.qk q: expected .*3, 13.*, got \(2, 17, 13, 3\)"),
        ("dense", "first.onnx", "six", r"first\.onnx: blocks\.1\.q: expected 2 images, as it was .*, got \(1, 17, .*"),
        ("dense", "broken.onnx", "six", r"broken\.onnx: expected a graph that runs on images \(6, 3, 32, 32\), got .+"),
        ("dense", "images64.onnx", "six", r"images64\.onnx: batch: expected images of float32, got float64"),
        ("dense", "none.onnx", "six", r"none\.onnx: expected a graph that onnxruntime loads, got .+"),
        ("dense", "no.onnx", "six", r"\S+no\.onnx: expected a file that can be read, got No such file or directory"),
        ("normed", "any.onnx", "six", r"normed: expected nothing but linear layers at blocks\.0\.qk, got .*"),
        ("five", "any.onnx", "six", "five: expected a secateur model file, got a safetensors file that .*"),
    ):
        words = [tmp_path / name for name in (model_name, graph_name, images_name, "out")]
        text = refused(onnx_program, *words)
        assert re.fullmatch(expected, text), text
    assert refused(onnx_program, *words[1:]) == "arguments: expected MODEL GRAPH IMAGES OUT, got 3 files"
    assert sorted(tmp_path.iterdir()) == files


# --- Exported files, timed in onnxruntime -----------------------------------------------------------------------------


class Work(nn.Module):
    """As many products of 192 by 192 as asked for, and a graph that takes any type."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.products = products

    def forward(self, batch: Tensor) -> tuple[Tensor]:
        square = batch.flatten(1).sum(1)[:, None, None] * torch.full((192, 192), 1e-3, dtype=batch.dtype)
        weight = torch.full((192, 192), 1e-3, dtype=batch.dtype)
        for _ in range(self.products):
            square = square @ weight
        return (square.sum((1, 2)),)


@pytest.fixture
def run_onnx(onnx_program: Path) -> Path:
    return onnx_program.with_name("run_onnx")


def timed(output: str) -> tuple[str, list[tuple[str, float, str]], float | None]:
    head, *lines = output.splitlines()
    found = [re.fullmatch(r"(.+): ([\d.]+) images/s, images \((.+)\)", line) for line in lines[:2]]
    files = [(match[1], float(match[2]), match[3]) for match in found if match]
    ratio = re.fullmatch(r"ratio: ([\d.]+), the median of pairs", lines[-1])
    assert len(lines) == len(files) + bool(ratio)
    return head, files, float(ratio[1]) if ratio else None


def test_exports_are_timed_alone_and_in_turn(run_onnx, tmp_path):
    """A graph of 60 products takes many times as long as one of 2; the same graph, as long as itself."""
    small, large = (exported(Work(n), images(2), tmp_path / f"{n}.onnx", names=[], free=True) for n in (2, 60))
    engine = r"onnxruntime \d+\.\d+\.\d+"
    head, (found,), ratio = timed(run(run_onnx, small, "--runs", 3))
    assert re.fullmatch(rf"{engine}, threads: default, runs: 3", head)
    assert found[0] == str(small)
    assert found[2] == "1, 3, 32, 32"
    assert ratio is None

    head, (first, second), ratio = timed(run(run_onnx, small, large, "--batch", 5, "--threads", 1, "--runs", 7))
    assert re.fullmatch(rf"{engine}, threads: 1, runs: 7", head)
    assert first[2] == second[2] == "5, 3, 32, 32"
    assert first[1] > 3 * second[1] > 0
    assert ratio > 3
    *_, reverse = timed(run(run_onnx, large, small, "--batch", 5, "--threads", 1, "--runs", 7))
    assert reverse < 1 / 3
    # Images, not batches.
    _, (single,), _ = timed(run(run_onnx, small, "--threads", 1, "--runs", 7))
    _, (many,), _ = timed(run(run_onnx, small, "--threads", 1, "--runs", 7, "--batch", 17))
    assert 0.2 < many[1] / single[1] < 20


def test_a_duration_in_seconds(run_onnx, tmp_path):
    graph = exported(Work(1), images(2), tmp_path / "1.onnx", names=[], free=True)
    runs = [
        int(timed(run(run_onnx, graph, "--threads", 1, "--seconds", seconds))[0].split()[-1])
        for seconds in (0.001, 1.5)
    ]
    assert runs[0] == 1
    # Each of at least 20 ms, with what a busy machine adds or saves.
    assert 5 <= runs[1] <= 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["float16", "float64"])
def test_images_are_of_the_graphs_type_and_batch(run_onnx, tmp_path, dtype):
    graph = exported(Slices(), images(3, dtype), tmp_path / "three.onnx")
    free = exported(Slices(), images(3, dtype), tmp_path / "free.onnx", free=True)
    _, files, _ = timed(run(run_onnx, free, graph, "--runs", 1))
    assert [shape for *_, shape in files] == ["3, 3, 32, 32"] * 2


def test_exports_that_cannot_be_timed_are_refused(run_onnx, tmp_path):
    batch = images(4)
    exported(Slices(), batch[:2], tmp_path / "two.onnx")
    exported(Slices(), batch[:3], tmp_path / "three.onnx")
    exported(Slices(), batch[:2], tmp_path / "any.onnx", free=True)
    for name, axis in ("broken", 0), ("sides", 3), ("huge", 1):
        graph = onnx.load(tmp_path / "two.onnx")
        size = graph.graph.input[0].type.tensor_type.shape.dim[axis]
        if name == "huge":
            size.dim_value = 1 << 40
        else:
            size.dim_param = "n"
        onnx.save(graph, tmp_path / f"{name}.onnx")
    (tmp_path / "none.onnx").write_bytes(b"\x1b[2J\n" * 10)
    for words, expected in (
        (["no.onnx"], r"\S*no\.onnx: expected a file that can be read, got No such file or directory"),
        (["any.onnx", "no.onnx"], r"\S*no\.onnx: expected a file that can be read, got No such file or directory"),
        (["none.onnx"], r"none\.onnx: expected a graph that onnxruntime loads, got .+"),
        (["two.onnx", "--batch", 3], r"two\.onnx: expected a graph for batches of 3, got one for batches of 2"),
        (["two.onnx", "three.onnx"], r"three\.onnx: expected a graph for batches of 2, got one for batches of 3"),
        (["broken.onnx", "--batch", 3], r"broken\.onnx: expected a graph that runs on images \(3, 3, .*\), got .+"),
        (["sides.onnx"], r"sides\.onnx: batch: expected channels, height and width of one size, got \(2, 3, 32, any\)"),
        (["huge.onnx"], r"huge\.onnx: expected .+|huge\.onnx: batch: expected 1 to 2\^30 values a batch, got .+"),
        ([], r"arguments: expected MODEL \[DENSE\], got 0 files"),
        (["any.onnx"] * 3, r"arguments: expected MODEL \[DENSE\], got 3 files"),
        (["any.onnx", "--batch", 0], r"--batch: expected a whole number from 1 to 1000000, got 0"),
        (["any.onnx", "--batch", 2.5], r"--batch: expected a whole number from 1 to 1000000, got 2\.5"),
        (["any.onnx", "--threads", "two"], r"--threads: expected a number, got 'two'"),
        (["any.onnx", "--threads"], r"--threads: expected a value, got none"),
        (["any.onnx", "--seconds", -1], r"--seconds: expected more than 0 and at most 1000000, got -1\.0*"),
        (["any.onnx", "--seconds", "nan"], r"--seconds: expected more than 0 and at most 1000000, got nan"),
        (["any.onnx", "--runs", 2, "--seconds", 1], r"arguments: expected --seconds or --runs, got both"),
        (["any.onnx", "--size", 2], r"arguments: expected --batch, --threads, --seconds or --runs, got --size"),
    ):
        text = refused(run_onnx, *[tmp_path / word if str(word).endswith(".onnx") else word for word in words])
        assert re.fullmatch(expected, text), text


# --- Larger than memory -----------------------------------------------------------------------------------------------


def test_a_file_larger_than_the_memory(program, tmp_path):
    """SECATEUR_LARGE_MODEL_MIB=2048 makes the file of 2 GiB; the limit is on all of the address space."""
    mib = int(os.environ.get("SECATEUR_LARGE_MODEL_MIB", "300"))
    depth, limit = -(-mib // 48), 256
    with torch.device("meta"):
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=1024, num_heads=16, depth=depth
        )
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    dense, seen = tmp_path / "dense", tmp_path / "buffers"
    sc.save(model, dense)
    del model
    assert dense.stat().st_size >= mib << 20 > limit << 20
    save_file(
        {f"blocks.{i}.{x}": torch.randn(3, 5, 16, 64, generator=generator) for i in range(depth) for x in "qk"}, seen
    )

    limited = "sh", "-c", f'ulimit -v {limit * 1024} && exec "$@"', "sh", program
    output = run(*limited, dense, seen, tmp_path / "streamed", *OPTIONS, "--stream")
    peak = float(re.search(r"^peak memory: ([\d.]+) MiB$", output, re.MULTILINE)[1])
    print(f"{dense.stat().st_size / 2**20:.0f} MiB pruned with a peak of {peak:.1f} MiB")
    assert 1 < peak < 128
    assert "Cannot allocate memory" in refused(Path("sh"), *limited[1:], dense, seen, tmp_path / "mapped")
    run(program, dense, seen, tmp_path / "mapped", *OPTIONS)
    assert filecmp.cmp(tmp_path / "streamed", tmp_path / "mapped", shallow=False)
    shutil.rmtree(tmp_path)


# --- Files that are not what they say ---------------------------------------------------------------------------------


def parts(path: Path) -> tuple[dict[str, object], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: object, data: bytes, pad: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    return struct.pack("<Q", len(text)) + text + data


FIRST = "blocks.0.attn.proj.bias"


def edited(**changes: object):
    def edit(header: dict[str, dict[str, object]], data: bytes) -> bytes:
        header[FIRST].update(changes)
        return joined(header, data)

    return edit


def without(header: dict[str, object], data: bytes) -> bytes:
    del header[FIRST]
    return joined(header, data)


def with_outer(**changes: object):
    def edit(header: dict[str, dict[str, str]], data: bytes) -> bytes:
        outer = json.loads(header["__metadata__"]["secateur"])
        header["__metadata__"]["secateur"] = json.dumps(outer | changes)
        return joined(header, data)

    return edit


HOSTILE = {
    "empty": (lambda header, data: b"", r"a safetensors file, got 0 bytes"),
    "header size": (lambda header, data: b"\xff" * 8 + data, r"a header inside of the file, got one of \d{20} bytes"),
    "long header": (
        lambda header, data: joined(b" " * (2**21 + 8), data),
        r"a header of at most 2097152 bytes, got 2097160",
    ),
    "no JSON": (lambda header, data: joined(b"{nothing}", data), r"a JSON header, got .*"),
    "control characters": (
        lambda header, data: joined({"\x1b[2J\n": 1}, b""),
        r"dtype, shape and data_offsets, got .*",
    ),
    "no UTF-8": (lambda header, data: joined(b'{"\xff":1}', data), r"a JSON header, got .*"),
    "an array": (lambda header, data: joined(b"[]", data), r"a JSON object as header, got array"),
    "deep": (lambda header, data: joined(b'{"a":' + b"[" * 10**6, data), r"a header of three levels, got a deeper one"),
    "metadata": (lambda header, data: joined(b'{"__metadata__":{"a":1}}', b""), r"metadata of strings, got number"),
    "cut off": (lambda header, data: joined(header, data[:-4]), r"\d+ bytes inside of the file, got \d+ that are left"),
    "longer": (lambda header, data: joined(header, data + b"0000"), r"a file of \d+ bytes, as .*, got \d+"),
    "outside": (
        edited(data_offsets=[2**62, 2**62 + 156]),
        r"data at byte \d+, behind those of the tensor before, got byte \d+",
    ),
    "beyond 63 bits": (edited(data_offsets=[0, 2**64 - 1]), r"whole numbers from 0 to 2\^63 - 1, got 18446744\d+"),
    "negative": (edited(data_offsets=[-156, 0]), r"whole numbers from 0 to 2\^63 - 1, got -156"),
    "backwards": (edited(data_offsets=[156, 0]), r"156 bytes, as .*, got data_offsets 156 to 0"),
    "overlap": (edited(data_offsets=[4, 160]), r"data at byte \d+, behind those of the tensor before, got byte \d+"),
    "hole": (without, r"data at byte \d+, behind those of the tensor before, got byte \d+"),
    "size": (edited(shape=[38]), r"152 bytes, as its dtype and shape say, got data_offsets \d+ to \d+"),
    "overflow": (edited(shape=[2**62, 4]), r"a shape of fewer than 2\^63 bytes, got more"),
    "overflow and zero": (edited(shape=[2**62, 4, 0]), r"a shape of fewer than 2\^63 bytes, got more"),
    "rank": (edited(shape=[1] * 8 + [39]), r"a shape of at most 8 sizes, got another"),
    "dtype": (edited(dtype="F128"), r"a dtype such as F32, got another"),
    "dtype of another type": (edited(dtype=[]), r"a dtype such as F32, got another"),
    "unaligned": (
        lambda header, data: joined({k: v for k, v in header.items() if k != "__metadata__"}, data, pad=7),
        r"data aligned to 4 bytes, got byte \d+",
    ),
    "another program's": (
        lambda header, data: joined({k: v for k, v in header.items() if k != "__metadata__"}, data),
        r"a secateur model file, got a safetensors file that secateur did not write",
    ),
    "kind": (with_outer(kind="statistics"), r"a secateur model file, got a file of another kind"),
    "newer": (with_outer(format=2), r"a secateur model file of format 1 or older, got format 2"),
    "no format": (with_outer(format="1"), r"a secateur model file, got one whose header is damaged"),
    "fields": (
        with_outer(fields='{"sizes": {}}'),
        r"a secateur model file, got one whose header does not match its checksum",
    ),
    "no fields": (with_outer(fields=None), r"a secateur model file, got one whose header does not match its checksum"),
    "other tensors": (
        edited(shape=[39, 1]),
        r"a secateur model file, got one whose header does not match its checksum",
    ),
    "data": (
        lambda header, data: joined(header, data[:-1] + bytes([data[-1] ^ 1])),
        r"a secateur model file, got one whose data do not match their checksum",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("damage", HOSTILE)
def test_a_hostile_file_is_one_clear_error(program, tmp_path, damage, stream):
    model = vit()
    sc.save(model, tmp_path / "dense")
    damaged, expected = HOSTILE[damage]
    (tmp_path / "model").write_bytes(damaged(*parts(tmp_path / "dense")))
    seen = buffers(model, images(2), tmp_path / "buffers")
    files = sorted(tmp_path.iterdir())
    words = tmp_path / "model", seen, tmp_path / "out", *(["--stream"] if stream else [])
    text = refused(program, *words)
    assert re.fullmatch(rf"model: (\S+: )?expected {expected}", text)
    assert sorted(tmp_path.iterdir()) == files
    if damage == "data":
        run(program, *words, "--no-verify")
        assert not filecmp.cmp(tmp_path / "model", tmp_path / "out", shallow=False)


def test_what_does_not_fit_is_refused(program, tmp_path):
    model = vit()
    sc.save(model, tmp_path / "dense")
    sc.save(vit(qk_norm=True), tmp_path / "normed")
    seen = buffers(model, images(3), tmp_path / "buffers")
    tensors = load_file(seen)
    for name, others in {
        "missing": {k: v for k, v in tensors.items() if not k.startswith("blocks.1")},
        "queries": {k: v for k, v in tensors.items() if k != "blocks.1.k"},
        "heads": {k: v[:, :, :2].contiguous() for k, v in tensors.items()},
        "images": tensors | {"blocks.0.k": tensors["blocks.0.k"][:2].contiguous()},
        "nan": tensors | {"blocks.1.q": tensors["blocks.1.q"].index_fill(1, torch.tensor(4), torch.nan)},
        "integers": tensors | {"blocks.0.q": torch.zeros(3, 17, 3, 13, dtype=torch.int32)},
    }.items():
        save_file(others, tmp_path / name)
    files = sorted(tmp_path.iterdir())
    for model_name, buffer_name, words, expected in (
        ("dense", "missing", (), "blocks.1: expected queries and keys of every block that has attention, got none"),
        ("dense", "queries", (), "blocks.1: expected queries and keys of every block that has attention, got none"),
        ("dense", "heads", (), r"blocks\.0\.qk q: expected .*3.*13.*, got \(3, 17, 2, 13\)"),
        ("dense", "images", (), r"blocks\.0\.qk k: expected .*, got .*"),
        ("dense", "nan", (), r"blocks\.1\.qk q: expected finite values, got nan at \(image 0, token 4, .*\)"),
        ("dense", "integers", (), r"integers: blocks\.0\.q: expected F64, F32, F16 or BF16, got I32"),
        ("dense", "buffers", ("--qk", 1), "ratios: expected fractions from 0 to below 1, got 1.000000"),
        ("dense", "buffers", ("--qk", "nan"), "ratios: expected fractions from 0 to below 1, got -?nan"),
        ("dense", "buffers", ("--qk", "half"), "--qk: expected a number, got 'half'"),
        ("dense", "buffers", ("--gamma",), "--gamma: expected a value, got none"),
        ("dense", "buffers", ("--gamma", 0), "--gamma: expected a whole number from 1 to 1000000, got 0"),
        ("dense", "buffers", ("--all",), "arguments: expected --qk, .*, got --all"),
        ("dense", "buffers", ("more",), "arguments: expected MODEL BUFFERS OUT, got 4 files"),
        (
            "normed",
            "buffers",
            (),
            r"normed: expected nothing but linear layers at blocks\.0\.qk, got blocks\.0\.attn\.q_norm\.\w+",
        ),
        ("nothing", "buffers", (), r"\S+nothing: expected a file that can be read, got No such file or directory"),
        (".", "buffers", (), r".*: expected a regular file, got another"),
    ):
        text = refused(program, tmp_path / model_name, tmp_path / buffer_name, tmp_path / "out", *words)
        assert re.fullmatch(expected, text), text
    text = refused(program, tmp_path / "dense", seen, tmp_path / "no" / "out")
    assert text == f"{tmp_path}/no/out: expected a folder that can be written to, got No such file or directory"
    # A report does not take another file's place, under whatever name; a pipe is not waited for.
    os.mkfifo(tmp_path / "pipe")
    files = sorted([*files, tmp_path / "pipe"])
    (tmp_path / "link").symlink_to("dense")
    kept = (tmp_path / "dense").read_bytes()
    for report in ("dense", "link", "out", "./buffers"):
        text = refused(program, tmp_path / "dense", seen, tmp_path / "out", "--report", f"{tmp_path}/{report}")
        assert text == f"--report: expected a file of its own, got {tmp_path}/{report}"
    assert (tmp_path / "dense").read_bytes() == kept
    (tmp_path / "link").unlink()
    text = refused(program, tmp_path / "pipe", seen, tmp_path / "out")
    assert text == f"{tmp_path}/pipe: expected a regular file, got another"
    assert sorted(tmp_path.iterdir()) == files
    # Without queries and keys to cut, norms over them are not in the way.
    run(program, tmp_path / "normed", seen, tmp_path / "out", "--qk", 0, "--ffn", 0.5)
    assert sc.load(tmp_path / "out").blocks[1].mlp.fc1.out_features == 78
    # What is replaced stays as private as it was.
    (tmp_path / "out").chmod(0o600)
    run(program, tmp_path / "normed", seen, tmp_path / "out", "--qk", 0, "--ffn", 0.2)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
