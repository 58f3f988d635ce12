"""Calibrate, plan, prune, save and load in this checkout against another one, step by step in turn.

python benchmarks/python/bench_vs.py --vs CHECKOUT [--python ITS_PYTHON] [--threads 1] [--repeats 5]
One process for each checkout does every step, A B B A and so on. Ratios are medians over these pairs: of the CPU
time of the process, which is what counts on a busy machine, and of the time on the clock. Peaks of resident memory, the
whole process with torch, are those of each step in the first round of processes of their own. Before anything is
measured, both checkouts must make the same plan and the same pruned and loaded model, to the bit. Random weights and
images.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import IO, Any

HERE = Path(__file__).resolve().parents[2]
STEPS = ("calibrate", "plan", "prune", "save", "load")
TIME, MEMORY = 1.03, 1.02


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vs", type=Path, metavar="CHECKOUT", help="the other checkout")
    add("--python", default=sys.executable, help="the other checkout's interpreter")
    add("--model", default="deit_small_patch16_224", help="of timm")
    add("--images", type=int, default=32)
    add("--batch-size", type=int, default=16)
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=5, help="pairs of every step")
    add("--memory-repeats", type=int, default=3, help="pairs of processes whose peaks are taken")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


class Worker:
    """Does the steps in this process, with whatever secateur it imports."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import timm
        import torch

        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.model = timm.create_model(options.model).eval()
        size = self.model.default_cfg["input_size"]
        images = torch.randn(options.images, *size, generator=torch.Generator().manual_seed(0)).clamp_(-2, 2)
        self.batches = list(images.split(options.batch_size))
        self.file = folder / f"{os.getpid()}.safetensors"
        self.twin = copy.deepcopy(self.model)
        self.stats: Any = None
        self.plan: Any = None
        self.loaded: Any = None

    def prepare(self, step: str) -> None:
        """What a step needs and is not timed."""
        if step == "prune":
            self.twin = copy.deepcopy(self.model)

    def do(self, step: str) -> None:
        """One step; its result is what the next one takes."""
        import secateur as sc

        if step == "calibrate":
            self.stats = sc.calibrate(self.model, self.batches)
        elif step == "plan":
            self.plan = sc.plan(self.model, self.stats, method="project", target=sc.Target(macs=0.5))
        elif step == "prune":
            sc.prune(self.twin, self.plan)
        elif step == "save":
            sc.save(self.twin, self.file)
        else:
            self.loaded = sc.load(self.file)

    def results(self) -> dict[str, str]:
        """Digests of all that the steps made."""
        plan = {f"keep {name}": kept for name, kept in self.plan.keep.items()}
        plan |= {name: value.numpy() for name, value in self.plan.weights.items()}
        pruned, loaded = (
            {name: value.numpy() for name, value in each.state_dict().items()} for each in (self.twin, self.loaded)
        )
        return {"plan": _digest(plan), "pruned": _digest(pruned), "loaded": _digest(loaded)}


def _digest(arrays: dict[str, Any]) -> str:
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
    return content.hexdigest()


def memory(reset: bool = False) -> float:
    """Peak of resident memory in MiB since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def work(options: argparse.Namespace) -> None:
    """Answer one line of JSON for every step that standard input names."""
    import secateur as sc

    checkout = options.worker / "python"
    assert str(sc.__file__).startswith(str(checkout)), f"{sc.__file__} is not of {checkout}"
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(options, Path(folder))
        for line in sys.stdin:
            step, found = line.strip(), {}
            if step == "results":
                found = worker.results()
            else:
                worker.prepare(step)
                memory(reset=True)
                wall, cpu = time.perf_counter(), time.process_time()
                worker.do(step)
                found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak": memory()}
            print(json.dumps(found), file=answers, flush=True)


class Side:
    """A process that works with one checkout."""

    def __init__(self, options: argparse.Namespace, checkout: Path, python: str) -> None:
        names = ("model", "images", "batch_size", "threads")
        settings = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
        command = [python, "-W", "ignore", __file__, *settings, "--worker", str(checkout)]
        threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
        # Left alone, glibc moves its threshold for mmap while it runs, and the peak with it.
        malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        environment = os.environ | threads | malloc | {"PYTHONPATH": str(checkout / "python")}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str) -> dict[str, Any]:
        asked, answered = _open(self.process.stdin), _open(self.process.stdout)
        print(what, file=asked, flush=True)
        line = answered.readline()
        if not line:
            raise SystemExit(f"bench_vs: {what!r} ended with {self.process.wait()}: {self.process.args}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        _open(self.process.stdin).close()
        self.process.wait()


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def compare(options: argparse.Namespace) -> bool:
    """Print the table; is everything within its limit?"""
    checkouts = [(HERE, sys.executable), (options.vs.resolve(), options.python)]
    sides = [Side(options, *each) for each in checkouts]
    peaks: dict[str, list[tuple[float, float]]] = {step: [] for step in STEPS}
    pairs: dict[str, list[tuple[dict[str, float], ...]]] = {step: [] for step in STEPS}
    # The first round warms up, and says whether both do the same.
    for step in STEPS:
        found = [side.ask(step) for side in sides]
        peaks[step].append((found[0]["peak"], found[1]["peak"]))
    ours, theirs = (side.ask("results") for side in sides)
    assert ours == theirs, f"expected the same plan and models from both, got {ours} and {theirs}"
    print("same plan, pruned and loaded model to the bit", flush=True)
    for repeat in range(options.repeats):
        for step in STEPS:
            order = (0, 1) if repeat % 2 == 0 else (1, 0)
            measured = {index: sides[index].ask(step) for index in order}
            pairs[step].append((measured[0], measured[1]))
            print(f"{repeat} {step} {measured[0]} {measured[1]}", file=sys.stderr, flush=True)
    for side in sides:
        side.close()
    for repeat in range(1, options.memory_repeats):
        found = {}
        for index in (1, 0) if repeat % 2 else (0, 1):
            fresh = Side(options, *checkouts[index])
            found[index] = [fresh.ask(step)["peak"] for step in STEPS]
            fresh.close()
        for step, *both in zip(STEPS, found[0], found[1], strict=True):
            peaks[step].append((both[0], both[1]))
    within = True
    print(f"| step | CPU | clock | CPU s, here and there | peak | MiB, here and there |\n{'|---' * 6}|")
    for step in STEPS:
        cpu, wall = (median(a[what] / b[what] for a, b in pairs[step]) for what in ("cpu", "wall"))
        peak = median(a / b for a, b in peaks[step])
        times = " and ".join(f"{median(pair[side]['cpu'] for pair in pairs[step]):.3f}" for side in (0, 1))
        held = " and ".join(f"{median(pair[side] for pair in peaks[step]):.0f}" for side in (0, 1))
        print(f"| {step} | {cpu:.3f} | {wall:.3f} | {times} | {peak:.3f} | {held} |")
        within &= cpu <= TIME and peak <= MEMORY
    return within


def main() -> None:
    options = arguments()
    if options.worker is not None:
        work(options)
    elif options.vs is None:
        raise SystemExit("bench_vs: expected --vs CHECKOUT")
    elif not compare(options):
        raise SystemExit(f"bench_vs: a step takes more than {TIME} of the CPU time or {MEMORY} of the memory")


if __name__ == "__main__":
    main()
