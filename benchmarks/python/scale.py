"""Does calibration scale? Time per image and peak memory from 64 images to 4096, each run in a process of its own.

pip install ".[bench]" && python benchmarks/python/scale.py
Writes two plots to benchmarks/plots and fails where time per image differs by more than 10 % between counts, or peak
memory by more than 2 %. Images are made while it runs, and the time that takes is left out. Memory is that of the whole
process, most of which is torch; it is taken in runs of its own, with glibc's threshold for mmap fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

TIME, MEMORY = 1.10, 1.02


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="of timm")
    parser.add_argument("--counts", type=int, nargs="+", default=[2**k for k in range(6, 13)], help="of images")
    parser.add_argument("--collect", nargs="+", choices=("scores", "all"), default=["scores", "all"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of all counts, in turn; the medians count")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "plots", help="folder of the plots")
    parser.add_argument("--one", nargs=2, metavar=("COLLECT", "COUNT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def one(model_name: str, collect: str, count: int, batch_size: int, threads: int) -> dict[str, float]:
    """Calibrate once in this process: seconds per image, and the peak of resident memory in MiB."""
    import secateur as sc
    import timm
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(model_name).eval()
    shape = sc.inspect(model).input_size
    buffer = torch.empty(batch_size, *shape)
    making = 0.0

    def batches(images):
        nonlocal making
        for first in range(0, images, batch_size):
            start = time.perf_counter()
            batch = buffer[: images - first].uniform_(-1, 1)
            making += time.perf_counter() - start
            yield batch

    sc.calibrate(model, batches(2 * batch_size), collect=collect)
    making = 0.0
    start = time.perf_counter()
    stats = sc.calibrate(model, batches(count), collect=collect, max_images=None)
    seconds = time.perf_counter() - start - making
    assert stats.images == count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"seconds": seconds / count, "peak": peak}


def run(options: argparse.Namespace, collect: str, count: int, **environment: str) -> dict[str, float]:
    """What `one` finds in a fresh process."""
    settings = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("model", "batch-size", "threads")]
    command = [sys.executable, __file__, *settings, "--one", collect, str(count)]
    # No torch in this process: on Linux a child's peak begins at its parent's.
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    found: dict[str, float] = json.loads(process.stdout)
    return found


def measure(options: argparse.Namespace) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float]]:
    """Seconds per image and peak memory: every count in turn, so that a slow spell of the machine meets all alike."""
    keys = [(collect, count) for collect in options.collect for count in options.counts]
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    for index in range(options.rounds):
        for key in keys[:: -1 if index % 2 else 1]:
            seconds[key].append(run(options, *key)["seconds"])
    # Left alone, glibc moves its threshold for mmap while it runs, and the peak with it, by some 3 %.
    peaks = {key: run(options, *key, MALLOC_MMAP_THRESHOLD_=str(2**20))["peak"] for key in keys}
    return {key: median(found) for key, found in seconds.items()}, peaks


def show(
    options: argparse.Namespace, seconds: dict[tuple[str, int], float], peaks: dict[tuple[str, int], float]
) -> None:
    import secateur as sc
    import timm
    import torch
    from conftest import processor
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"calibrate({options.model}), median time of {options.rounds} runs; {processor()}, "
        f"{options.threads} threads, {sc.core.runtime.isa()}, torch {torch.__version__}, timm {timm.__version__}"
    )
    for column in ("collect", "images", "ms/image", "images/s", "peak MiB"):
        table.add_column(column, justify="left" if column == "collect" else "right")
    for (collect, count), per_image in seconds.items():
        peak = peaks[collect, count]
        table.add_row(collect, f"{count:,}", f"{1e3 * per_image:.2f}", f"{1 / per_image:.1f}", f"{peak:.0f}")
    Console(width=140).print(table)


def plot(options: argparse.Namespace, what: str, name: str, values: dict[tuple[str, int], float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "secateur"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for collect in options.collect:
        axes.plot(options.counts, [values[collect, n] for n in options.counts], "o-", label=f'collect="{collect}"')
    axes.set_xscale("log", base=2)
    axes.set_xticks(options.counts, [str(count) for count in options.counts])
    axes.set_ylim(0, 1.15 * max(values.values()))
    axes.set_xlabel("images scored")
    axes.set_ylabel(what)
    axes.set_title(f"calibrate, {options.model}, {options.threads} threads", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / name, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    options = arguments()
    if options.one:
        collect, count = options.one
        print(json.dumps(one(options.model, collect, int(count), options.batch_size, options.threads)))
        return
    seconds, peaks = measure(options)
    show(options, seconds, peaks)
    plot(options, "images / s", "scale_images_per_second.svg", {key: 1 / value for key, value in seconds.items()})
    plot(options, "peak memory of the process, MiB", "scale_memory.svg", peaks)
    for what, values, limit in (("time per image", seconds, TIME), ("peak memory", peaks, MEMORY)):
        for collect in options.collect:
            found = [values[collect, count] for count in options.counts]
            spread = max(found) / min(found)
            print(f"{what}, collect={collect!r}: largest ÷ smallest {spread:.3f}, at most {limit} wanted")
            assert spread <= limit, f"{what} of collect={collect!r} depends on the number of images"


if __name__ == "__main__":
    main()
