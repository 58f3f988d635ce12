"""Which layout each engine runs better: DeiT-Tiny, pruned to unequal queries and values, in both layouts.

pip install ".[bench]" && python benchmarks/python/bench_layouts.py
Engines that are not installed are named as such. Some do not fit into one environment: run this in each, with the same
--out, and the last run prints the rows of all as one table in Markdown. Weights are random.

attention  how many of the 12 attentions the engine fused, and how many it did not
operators  in the file, or after the engine's own fusions where it tells; in ExecuTorch calls of XNNPACK, and operators
           left outside; in torch those that the model calls. torch.compile makes its own, which are not counted
export     equal to the model in the engine on batches of 1, 2 and 7 images (1 in LiteRT), or refused; Core ML runs on
           macOS alone, so that elsewhere its files are converted and not run
time       of the pruned ÷ the dense model, and of the stock ÷ the exact layout, in the same engine: median and
           quartiles of --repeats paired runs at batch 1; none for formats without a runtime in secateur

The last block computes all tokens in both layouts (--last-block pooled: prefix tokens alone), so that the layout of
attention is all that differs.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import tempfile
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import secateur as sc
import timm
import torch
from conftest import THREADS, processor
from secateur.exports.base import exporters
from secateur.latency.runtimes.registry import RUNTIMES
from torch import nn
from torch.profiler import ProfilerActivity, profile

MODEL, RATIOS = "deit_tiny_patch16_224", {"qk": 0.5, "v": 0.3, "ffn": 0.4}
LAYOUTS = ("exact", "stock")
# These are no engines: torch runs what they hold.
FOLDERS = ("hub", "native", "timm", "transformers")
# The runtime of a format, where it has another name.
RUNTIME_OF = {"onnx": "onnxruntime"}
COLUMNS = ("engine", "layout", "attention fused / not", "operators", "export", "time ÷ dense", "stock ÷ exact")
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engines", nargs="+", choices=[name for name, *_ in engines()], help="all unless given")
    add("--repeats", type=int, default=51, help="paired runs")
    add("--last-block", choices=("whole", "pooled"), default="whole")
    add("--out", type=Path, default=Path("layouts.jsonl"), help="rows, one a line; the next run goes on from there")
    return parser.parse_args()


def engines() -> list[tuple[str, str | None, str | None]]:
    """Names of engines, with the format that is written for each and the runtime that times it."""
    formats = [name for name in exporters.names() if name not in FOLDERS]
    runtime_of = {name: RUNTIME_OF.get(name, name) for name in formats}
    alone = [name for name in RUNTIMES.names() if name not in runtime_of.values()]
    known = RUNTIMES.names()
    return [(name, name, runtime_of[name] if runtime_of[name] in known else None) for name in formats] + [
        (name, None, name) for name in alone
    ]


def models(last_block: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model(MODEL, pretrained=False).eval()
    made: dict[str, nn.Module] = {"dense": dense}
    for layout in LAYOUTS:
        made[layout] = copy.deepcopy(dense)
        plan = sc.plan(made[layout], method="magnitude", ratios=RATIOS)
        # timm's own block has no pooled form.
        sc.prune(made[layout], plan, layout=layout, last_block="whole" if layout == "stock" else last_block)
    return made


def exported(model: nn.Module, format_: str, folder: Path) -> Row:
    path = folder / f"model{exporters.named(format_).suffix}"
    # Each size is a model of its own in LiteRT's file, and its operators would be counted three times.
    options: dict[str, Any] = {"batch_sizes": (1,) if format_ == "litert" else (1, 2, 7)}
    try:
        report = sc.export(model, path, format=format_, **options)
    except sc.Error as error:  # also of files that differ: they are removed
        return {"export": f"refused: {error}"}
    found: Row = {"export": "converted, not run here" if report.difference is None else "equal"}
    told = dict(report.details)
    if format_ == "onnx":
        told = of_onnxruntime(path, folder)
    if "attention_not_fused" in told:
        found["attention"] = f"{told.get('attention_fused', 0)} / {told['attention_not_fused']}"
    if "operators_outside" in told:
        found["operators"] = f"{told['delegated']} + {told['operators_outside']} outside"
    elif "operators" in told:
        found["operators"] = str(told["operators"])
    return found


def of_onnxruntime(path: Path, folder: Path) -> Row:
    """What is in onnxruntime's graph after its own fusions."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    fused = kinds["Attention"] + kinds["MultiHeadAttention"]
    return {"attention_fused": fused, "attention_not_fused": kinds["Softmax"], "operators": kinds.total()}


@torch.inference_mode()
def of_torch(model: nn.Module, runtime: str) -> Row:
    """What torch calls for one image."""
    image = torch.randn(1, 3, 224, 224)
    run = RUNTIMES.named(runtime).prepare(model, image)
    run(image)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(image)
    kinds = Counter(event.name for event in seen.events())
    fused = sum(count for name, count in kinds.items() if name.startswith("aten::_scaled_dot_product_flash"))
    found = {"attention": f"{fused} / {kinds['aten::_softmax'] + kinds['aten::_safe_softmax']}"}
    if runtime == "torch":
        outer = [event for event in seen.events() if event.cpu_parent is None and event.name.startswith("aten::")]
        found["operators"] = str(len(outer))
    return found


def shown(benchmark: sc.Benchmark) -> str:
    """The time of the model ÷ that of the reference."""
    assert benchmark.speedup is not None
    assert benchmark.speedup_quartiles is not None
    low, high = benchmark.speedup_quartiles
    return f"{1 / benchmark.speedup:.2f} ({1 / high:.2f} … {1 / low:.2f})"


def version_of(format_: str | None, runtime: str | None) -> str | None:
    """The version of an engine, or None where it is not installed."""
    if runtime is not None:
        try:
            return RUNTIMES.named(runtime).version
        except sc.InvalidArgument:
            return None
    package = {"coreml": "coremltools", "litert": "ai-edge-litert"}.get(str(format_), str(format_))
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measured(options: argparse.Namespace, done: list[Row]) -> None:
    made: dict[str, nn.Module] = {}
    for name, format_, runtime in engines():
        if (options.engines and name not in options.engines) or any(row["engine"] == name for row in done):
            continue
        number = version_of(format_, runtime)
        if number is None:
            continue
        made = made or models(options.last_block)
        rows: list[Row] = []
        for layout in LAYOUTS:
            row: Row = {"engine": name, "version": number, "layout": layout, "last_block": options.last_block}
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                if format_ is not None:
                    with tempfile.TemporaryDirectory() as folder:
                        row |= exported(made[layout], format_, Path(folder))
                if runtime in ("torch", "torch.compile"):
                    row |= of_torch(made[layout], runtime)
                if runtime is not None:
                    how: Row = {"batch_size": 1, "repeats": options.repeats, "runtime": runtime}
                    row["time"] = shown(sc.bench(made[layout], made["dense"], **how))
                    if layout == "stock":
                        row["stock_to_exact"] = shown(sc.bench(made["stock"], made["exact"], **how))
            row |= {"processor": processor(), "threads": THREADS, "torch": torch.__version__, "timm": timm.__version__}
            rows.append(row)
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        done += rows


def show(options: argparse.Namespace, rows: list[Row]) -> None:
    machines = sorted({f"{row['processor']}, {row['threads']} threads, timm {row['timm']}" for row in rows})
    print("; ".join(machines), f"\ntorch {', '.join(sorted({row['torch'] for row in rows}))}\n", sep="")
    print("| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", sep="\n")
    for name, _, runtime in engines():
        if options.engines and name not in options.engines and all(row["engine"] != name for row in rows):
            continue
        title = name if runtime in (None, name) else f"{name}, in {runtime}"
        found = [row for row in rows if row["engine"] == name]
        if not found:
            print(f"| {title} | not installed |" + " |" * (len(COLUMNS) - 2))
        for row in found:
            cells = [f"{title} {row['version']}", row["layout"]]
            cells += [row.get(key, "") for key in ("attention", "operators", "export", "time", "stock_to_exact")]
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    options = arguments()
    torch.set_num_threads(THREADS)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    measured(options, done)
    show(options, done)


if __name__ == "__main__":
    main()
