"""What exports hold: every format × layout × cut of four families, checked in its engine, and what 8 bits cost.

pip install ".[bench]" && python benchmarks/python/bench_engines.py
Formats whose packages are not installed are left out, with a line that says so; times of pruned models on an engine are
those of bench_speedup.py --runtime, but for 8 bits. Models have random weights, but for the table int8.

formats  each export is equal to the model on batches of 1, 2 and 7 images, or refused by name; anything else is silent
own      the same models by the converters' own calls, as their documentation writes them, checked the same way
speed    --speed-model in 8 bits, dense and pruned to half of the MACs, against the dense one in float32 on the same
         engine: medians of 15 paired runs
operators  the same model at 0.28 of the MACs by its neurons alone: milliseconds by kind of operator, as the engines
         profile themselves, and how much faster it could be if its products took their share of the MACs
int8     top-1 of --weights, dense and pruned (--pruned, a file of `save`), in float32 and in 8 bits by --int8, on
         --validation, with ranges from --calibration
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import secateur as sc
import timm
import torch
from conftest import THREADS, processor
from pictures import Batches, Pictures, read
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from secateur.exports.base import exporters
from timm.data import resolve_model_data_config
from torch import Tensor, nn

BATCHES = (1, 2, 7)
CUTS: dict[str, dict[str, float]] = {
    "dense": {},
    "unequal": {"qk": 0.4, "v": 0.2, "ffn": 0.3},
    "width": {"ffn": 0.25, "width": 0.25},
    "layers": {"qk": 0.25, "v": 0.25, "blocks.1.attn": 1, "blocks.2.mlp": 1},
    "tokens": {"tokens": 0.08},
}
# Kinds differ from family to family.
MODELS: dict[str, dict[str, dict[str, float]]] = {
    "deit_tiny_patch16_224": CUTS,
    "swin_tiny_patch4_window7_224": {"dense": {}, "unequal": CUTS["unequal"], "width": {"ffn": 0.3}},
    "resnet18": {"dense": {}, "width": {"conv": 0.3, "width": 0.2}},
    "mobilenetv2_100": {"dense": {}, "width": {"conv": 0.3, "width": 0.2}},
}
console = Console(width=160)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tables", nargs="+", choices=("formats", "own", "speed", "operators", "int8"), default=["formats", "own"])
    add("--formats", nargs="+", help="all unless given")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--int8", nargs="+", default=["openvino"], help="formats of the table int8")
    add(
        "--speed-model",
        default="deit_small_patch16_224",
        help="timm's name of the model of the tables speed and operators",
    )
    add("--runtimes", nargs="+", default=["openvino", "onnxruntime"], help="of the tables speed and operators")
    add("--batches", nargs="+", type=int, default=[1, 16], help="of the tables speed and operators")
    for name in ("--weights", "--pruned", "--calibration", "--validation", "--wnids"):
        add(name, type=Path, help="of the table int8, as of bench_real.py")
    add("--model", default="vit_tiny_patch16_224", help="timm's name of the model of --weights")
    add("--cache", type=Path, default=Path.home() / ".cache/secateur-bench", help="folder of decoded images")
    add("--out", type=Path, default=Path("engines.jsonl"), help="rows, one a line; the next run goes on from there")
    return parser.parse_args()


def cut(name: str, ratios: dict[str, float], layout: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).eval()
    # Norms that have seen images, or outputs of untrained networks vanish.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.uniform_(0.5, 1.5)
    if ratios:
        sc.prune(model, sc.plan(model, method="magnitude", ratios=ratios), layout=layout)
    return model


def cases(names: list[str]) -> Iterator[tuple[str, str, str, nn.Module | str]]:
    """Models, with what they are; the text of the refusal where a layout does not hold the cut."""
    for name in names:
        for what, ratios in MODELS[name].items():
            for layout in ("exact", "stock") if "deit" in name and ratios else ("exact",):
                try:
                    yield name, what, layout, cut(name, ratios, layout)
                except sc.Unsupported as error:
                    yield name, what, layout, str(error)


def exported(model: nn.Module, format_: str, folder: Path) -> dict[str, Any]:
    suffix = exporters.named(format_).suffix
    try:
        report = sc.export(model, folder / f"model{suffix}", format=format_, batch_sizes=BATCHES)
    except (sc.Unsupported, sc.InvalidArgument) as error:
        return {"result": "refused", "text": str(error)}
    except sc.Error as error:
        return {"result": "error", "text": str(error)}
    return {"result": "equal", "difference": report.difference, "details": dict(report.details)}


def by_onnx(model: nn.Module, folder: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    path, example = str(folder / "own.onnx"), torch.randn(1, 3, 224, 224)
    torch.onnx.export(model, (example,), path, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def by_openvino(model: nn.Module, folder: Path) -> Callable[[Tensor], Any]:
    import openvino

    openvino.save_model(openvino.convert_model(model, example_input=torch.randn(1, 3, 224, 224)), folder / "own.xml")
    compiled = openvino.Core().compile_model(folder / "own.xml", "CPU")
    return lambda images: compiled(images.numpy())[0]


def by_torch(model: nn.Module, folder: Path) -> Callable[[Tensor], Any]:
    example = torch.randn(1, 3, 224, 224)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "own.pt2")
    run: Callable[[Tensor], Any] = torch.export.load(folder / "own.pt2").module()
    return run


OWN = {"onnx": by_onnx, "openvino": by_openvino, "torch": by_torch}


@torch.no_grad()
def unchecked(model: nn.Module, format_: str, folder: Path) -> dict[str, Any]:
    """What a converter's own call writes, compared with the model afterwards."""
    try:
        run = OWN[format_](copy.deepcopy(model), folder)
    except Exception as error:  # converters raise what they like
        return {"result": "not converted", "text": str(error).strip().splitlines()[0]}
    worst = 0.0
    for batch in BATCHES:
        images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch))
        wanted = model(images)
        try:
            found = torch.as_tensor(run(images))
        except Exception as error:  # so do engines
            return {"result": "fails", "text": f"batch {batch}: {str(error).strip().splitlines()[0]}"}
        if found.shape != wanted.shape:
            return {"result": "wrong", "text": f"batch {batch}: shape {tuple(found.shape)}"}
        worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    return {"result": "equal" if worst <= 1e-4 else "wrong", "relative_difference": worst}


def rows_of(table: str, options: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    names = options.formats or [name for name in exporters.names() if name != "native"]
    for name, what, layout, model in cases(options.models):
        for format_ in names if table == "formats" else [each for each in names if each in OWN]:
            key = {"table": table, "model": name, "cut": what, "layout": layout, "format": format_}
            if any(all(row.get(k) == v for k, v in key.items()) for row in done):
                continue
            if isinstance(model, str):
                found: dict[str, Any] = {"result": "refused", "text": model}
            else:
                with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                        found = (exported if table == "formats" else unchecked)(model, format_, Path(folder))
            write(options, done, {**key, **found})


def run_onnx(path: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def run_openvino(path: Path) -> Callable[[Tensor], Any]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled(images.numpy())[0]


RUN = {"onnx": run_onnx, "openvino": run_openvino}


def int8_rows(options: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    given = (options.weights, options.calibration, options.validation, options.wnids)
    if None in given:
        console.print("int8: left out without --weights, --calibration, --validation and --wnids")
        return
    dense = timm.create_model(options.model).eval()
    dense.load_state_dict(load_file(options.weights))
    names = json.loads(options.wnids.read_text())
    config = resolve_model_data_config(dense)
    calibration, validation = (
        read(folder, config, options.cache, names) for folder in (options.calibration, options.validation)
    )
    models = {"dense": dense} | ({"pruned": sc.load(options.pruned)} if options.pruned else {})
    for what, model in models.items():
        exact: Tensor | None = None
        for format_ in ("float32", *options.int8):
            key = {"table": "int8", "model": what, "format": format_, "images": len(validation)}
            if any(all(row.get(k) == v for k, v in key.items()) for row in done):
                continue
            details: dict[str, Any] = {}
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                exact = hits(model, validation) if exact is None else exact
                found = exact
                if format_ != "float32":
                    path = Path(folder) / f"model{exporters.named(format_).suffix}"
                    with torch.inference_mode(False):
                        batches = [images for images, _ in Batches(calibration)]
                        details = dict(sc.export(model, path, format=format_, int8=True, loader=batches).details)
                    found = hits(RUN[format_](path), validation)
            off = 100 * (exact - found)
            lost = {"lost": float(off.mean()), "standard_error": float(off.std() / len(off) ** 0.5)}
            write(options, done, {**key, "top1": 100 * float(found.mean()), **lost, "details": details})


def hits(run: Callable[[Tensor], Any], pictures: Pictures) -> Tensor:
    """1 for each image whose class is the first answer, else 0."""
    return torch.cat(
        [(torch.as_tensor(run(images)).argmax(1) == labels).float() for images, labels in Batches(pictures)]
    )


def pruned_to(dense: nn.Module, kept: float) -> tuple[nn.Module, float]:
    """A copy without its least queries, keys, values and FFN channels, and the MACs that it keeps."""
    pruned = copy.deepcopy(dense)
    target = sc.Target(macs=kept)
    plan = sc.plan(pruned, method="magnitude", target=target, groups=("qk", "v", "ffn"), allocation="uniform")
    sc.prune(pruned, plan)
    return pruned, plan.macs[1] / plan.macs[0]


def speed_rows(options: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    dense = timm.create_model(options.speed_model).eval()
    pruned, macs = pruned_to(dense, 0.5)
    models = {"dense": dense, "pruned": pruned}
    for runtime, batch, (what, bits) in product(
        options.runtimes, options.batches, (("pruned", ""), ("dense", "-int8"), ("pruned", "-int8"))
    ):
        key = {"table": "speed", "model": options.speed_model, "cut": what, "format": runtime + bits, "batch": batch}
        if any(all(row.get(k) == v for k, v in key.items()) for row in done):
            continue
        found = sc.bench(
            models[what], dense, batch_size=batch, runtime=runtime + bits, reference_runtime=runtime, threads=THREADS
        )
        times = {"speedup": found.speedup, "quartiles": found.speedup_quartiles, "milliseconds": found.milliseconds}
        write(options, done, {**key, **times, "macs": macs, "units": integer_units()})


Profile = Callable[[], dict[str, float]]


def profiled_openvino(path: Path, images: Tensor, _: Path) -> Profile:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(images.shape))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS, "PERF_COUNT": True}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def once() -> dict[str, float]:
        request.infer([images.numpy()])
        found: defaultdict[str, float] = defaultdict(float)
        for node in request.get_profiling_info():
            found[node.node_type] += 1e3 * node.real_time.total_seconds()
        return dict(found)

    return once


def profiled_onnxruntime(path: Path, images: Tensor, folder: Path) -> Profile:
    import onnxruntime

    def once() -> dict[str, float]:
        # A session writes one profile, when it ends: the first run, which allocates, is left out of it.
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = THREADS, True
        options.profile_file_prefix = str(folder / path.stem)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(3):
            session.run(None, {session.get_inputs()[0].name: images.numpy()})
        found: dict[str, list[float]] = {}
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event["cat"] == "Node" and event["name"].endswith("kernel_time"):
                found.setdefault(event["args"]["node_index"] + event["args"]["op_name"], []).append(event["dur"] / 1e3)
        kinds: defaultdict[str, float] = defaultdict(float)
        for node, times in found.items():
            kinds[node.lstrip("0123456789")] += min(times)
        return dict(kinds)

    return once


PROFILED = {"openvino": profiled_openvino, "onnxruntime": profiled_onnxruntime}
PRODUCTS = ("FullyConnected", "Gemm", "MatMul", "FusedMatMul")


def operator_rows(options: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    dense: Any = timm.create_model(options.speed_model).eval()
    pruned, macs = pruned_to(dense, 0.28)
    # The convolution of the patches is no product that the cut makes smaller.
    patches = dense.patch_embed.proj.weight.numel() * dense.patch_embed.num_patches / sc.inspect(dense).macs
    share = (macs - patches) / (1 - patches)
    for engine, batch in product(options.runtimes, options.batches):
        key = {"table": "operators", "model": options.speed_model, "cut": "pruned", "format": engine, "batch": batch}
        if any(all(row.get(k) == v for k, v in key.items()) for row in done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            profiles, images = [], torch.randn(batch, 3, 224, 224)
            for name, model in (("dense", dense), ("pruned", pruned)):
                path = Path(folder) / f"{name}.onnx"
                sc.export(model, path, format="onnx", batch_sizes=(1,))
                profiles.append(PROFILED[engine](path, images, Path(folder)))
            rounds = [[profile() for profile in profiles] for _ in range(15)]
        kinds = {kind for each in rounds for times in each for kind in times}
        medians = {kind: [median(each[i].get(kind, 0.0) for each in rounds) for i in (0, 1)] for kind in kinds}
        all_dense, all_pruned = (sum(times[i] for times in medians.values()) for i in (0, 1))
        products = {kind: times for kind, times in medians.items() if kind in PRODUCTS}
        ideal = all_pruned + sum(share * before - after for before, after in products.values())
        ratios = {"speedup_per_macs": macs * all_dense / all_pruned, "limit": macs * all_dense / ideal}
        write(options, done, {**key, "milliseconds": medians, "macs": macs, **ratios})


ROWS = {"speed": speed_rows, "operators": operator_rows, "int8": int8_rows}


def integer_units() -> str:
    """What the processor multiplies integers of 8 bits with."""
    found = re.findall(r"\b(?:amx_int8|avx512_vnni|avx_vnni)\b", Path("/proc/cpuinfo").read_text())
    return ", ".join(sorted(set(found))) or "none"


def write(options: argparse.Namespace, done: list[dict[str, Any]], row: dict[str, Any]) -> None:
    row |= {"processor": processor(), "torch": torch.__version__}
    done.append(row)
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    names = ("table", "model", "cut", "layout", "format", "result", "batch", "speedup", "top1", "text", "details")
    print("; ".join(str(row[name]) for name in names if row.get(name)), flush=True)


def show(rows: list[dict[str, Any]]) -> None:
    console.print(f"{processor()}, {THREADS} threads, torch {torch.__version__}, timm {timm.__version__}")
    formats = sorted({(row["table"], row["format"]) for row in rows if row["table"] in ("formats", "own")})
    view = Table(title="what became of each export")
    results = sorted({row["result"] for row in rows if "result" in row})
    for column in ("", "format", *results):
        view.add_column(column)
    for table, format_ in formats:
        found = [row["result"] for row in rows if (row["table"], row["format"]) == (table, format_)]
        who = "secateur" if table == "formats" else "its own call"
        view.add_row(who, format_, *(str(found.count(result) or "") for result in results))
    console.print(view)
    for row in rows:
        if row.get("result") not in (None, "equal"):
            where = " ".join(str(row[name]) for name in ("table", "model", "cut", "layout", "format"))
            console.print(f"{where}: {row['result']}: {row.get('text', '')}", highlight=False)
        if row["table"] == "speed":
            low, high = row["quartiles"]
            console.print(
                f"{row['model']}, {row['cut']}, {row['format']}, batch {row['batch']}: {row['speedup']:.2f} "
                f"({low:.2f} … {high:.2f}) times as fast as dense float32; {row['units']}",
                highlight=False,
            )
        if row["table"] == "operators":
            console.print(
                f"{row['model']}, {row['macs']:.2f} of the MACs, {row['format']}, batch {row['batch']}: speedup / MACs "
                f"{row['speedup_per_macs']:.2f}, {row['limit']:.2f} if its products took their share",
                highlight=False,
            )
            for kind, (before, after) in sorted(row["milliseconds"].items(), key=lambda each: -each[1][0]):
                console.print(f"  {kind}: {before:.2f} to {after:.2f} ms", highlight=False)
        if row["table"] == "int8":
            console.print(
                f"{row['model']}, {row['format']}: top-1 {row['top1']:.2f} % of {row['images']} images, "
                f"{row['lost']:.2f} ± {row['standard_error']:.2f} points lost to 8 bits",
                highlight=False,
            )


def main() -> None:
    options = arguments()
    torch.set_num_threads(THREADS)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    for table in options.tables:
        if table in ROWS:
            ROWS[table](options, done)
        else:
            rows_of(table, options, done)
    show(done)


if __name__ == "__main__":
    main()
