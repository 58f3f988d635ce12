"""Is a budget in time kept on the clock, and are predictions right? DeiT models with random weights, pruned by plan.

pip install ".[bench]" && python benchmarks/python/bench_speedup.py
Statistics are those of a few random images on random weights: enough for sizes and time, and no word on
accuracy.
Rows go to speed.json as they are measured, tables and statistics to --work, and neither is measured again by the next
run: kill it at any time. A row of time is the median of paired runs against the dense model, in turn in one process.

targets  Target(latency=0.5), DeiT-Small, every batch size: what the plan's rounds came to, and measured apart from them
macs     (t_dense / t_pruned) / (MACs_dense / MACs_pruned): DeiT-Small at macs=0.28, DeiT-Base at 0.36 and 0.20;
         cut are query/key, value and FFN, these with width and heads, FFN, width and heads of which none is thinner, or
         these and whole layers
random   predicted against measured: 20 plans of DeiT-Small with random sizes, each block its own. At batch 16 glibc
         gives the activations' memory back after some forward passes and not after others, which moves a time by a
         tenth: with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 4000000000 it keeps it
targets, macs and random are measured on --runtime, both models in that engine
budgets  MACs of the plan ÷ target, DeiT-Tiny, -Small and -Base; nothing is timed
planning seconds that DeiT-Base takes to plan, statistics given
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import secateur as sc
import timm
import torch
from conftest import THREADS, processor
from rich.console import Console
from rich.table import Table
from secateur.anatomy import Anatomy, tensor_of
from secateur.latency import measure as timing
from secateur.latency.runtimes.registry import RUNTIMES
from secateur.methods.base import Bound
from secateur.methods.registry import method_named, options_of
from torch import nn

MODELS = {name: f"deit_{name}_patch16_224" for name in ("tiny", "small", "base")}
TABLES = ("budgets", "planning", "targets", "macs", "random")
INNER = ("qk", "v", "ffn")
Row = dict[str, Any]
console = Console(width=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--batches", type=int, nargs="+", default=[1, 16])
    add("--pairs", type=int, default=15, help="paired runs of a row")
    add("--plans", type=int, default=20, help="random ones")
    add("--plan-pairs", type=int, default=9, help="paired runs of a random plan")
    add("--runtime", default="torch", help="engine of the tables targets, macs and random, as of sc.bench")
    add("--budgets", type=float, nargs="+", default=[0.85, 0.7, 0.6, 0.5, 0.4, 0.35, 0.28, 0.2], help="kept MACs")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of the tables that name several")
    add("--narrow", action="store_true", help="leave the width out of tables and random plans, which takes a third")
    add("--images", type=int, default=4, help="random ones that statistics are taken from")
    add("--show", action="store_true", help="measure nothing: tables and plots of the rows that are in --out")
    add("--fresh", action="store_true", help="forget the rows in --out")
    add("--out", type=Path, default=Path(__file__).parents[1] / "plots", help="folder of speed.json and the plots")
    work = Path(tempfile.gettempdir()) / "secateur-speed"
    add("--work", type=Path, default=work, help="folder of statistics and latency tables, kept for the next run")
    return parser.parse_args()


class Run:
    """Models, their statistics and tables, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.set_num_threads(THREADS)
        for folder in (options.out, options.work):
            folder.mkdir(parents=True, exist_ok=True)
        for plan in options.work.glob("*.plan.json") if options.fresh else ():
            plan.unlink()
        self.path: Path = options.out / "speed.json"
        known = self.path.is_file() and not options.fresh
        self.rows: list[Row] = json.loads(self.path.read_text()) if known else []
        self._models: dict[str, nn.Module] = {}

    def row(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row of this key, from the file or measured now."""
        for row in self.rows:
            if all(name in row and row[name] == value for name, value in key.items()):
                return row
        found = {**key, **measure(), "processor": processor(), "torch": torch.__version__}
        if "runtime" in key:
            found["version"] = RUNTIMES.named(key["runtime"]).version
        if "MALLOC_TRIM_THRESHOLD_" in os.environ:
            found["malloc"] = "keeps memory"
        self.rows.append(found)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.rows, indent=1) + "\n")
        temporary.replace(self.path)
        shown = {name: round(v, 4) if isinstance(v, float) else v for name, v in found.items() if name != "sizes"}
        print("; ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        return found

    def model(self, name: str) -> nn.Module:
        if name not in self._models:
            torch.manual_seed(0)
            self._models = {name: timm.create_model(MODELS[name]).eval()}
        return self._models[name]

    def anatomy(self, name: str) -> Anatomy:
        return sc.inspect(self.model(name))

    def stats(self, name: str, *, sensitivity: bool = False) -> sc.Statistics:
        count = self.options.images
        path: Path = self.options.work / f"{name}-{count}{'-sensitivity' * sensitivity}.stats"
        if not path.is_file():
            images = torch.rand(count, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
            collect = "all" if sensitivity else "scores"
            measured: Literal["noise", False] = "noise" if sensitivity else False
            sc.calibrate(self.model(name), [images], collect=collect, sensitivity=measured).save(path)
        return sc.Statistics.load(path)

    def table(self, name: str, batch: int) -> sc.LatencyTable:
        groups = INNER if self.options.narrow else (*INNER, "width")
        runtime = self.options.runtime
        path: Path = self.options.work / f"{name}-{batch}-{len(groups)}-{runtime}.table.json"
        if not path.is_file():
            start = time.perf_counter()
            sc.measure_latency(self.model(name), batch_size=batch, groups=groups, runtime=runtime).save(path)
            print(f"latency table of {name}, batch {batch}, {runtime}: {time.perf_counter() - start:.0f} s", flush=True)
        return sc.LatencyTable.load(path)


def paired(run: Run, name: str, plan: sc.Plan, batch: int) -> Row:
    """Time of the pruned model over the dense one's, after a look at what it computes."""
    model = run.model(name)
    assert_same_function(model, plan)
    pruned = copy.deepcopy(model)
    sc.prune(pruned, plan)
    found = sc.bench(pruned, model, batch_size=batch, repeats=run.options.pairs, runtime=run.options.runtime)
    assert found.speedup is not None
    assert found.speedup_quartiles is not None
    low, high = found.speedup_quartiles
    macs = plan.macs[1] / plan.macs[0]
    return {
        "measured": 1 / found.speedup,
        "quartiles": [1 / high, 1 / low],
        "macs": macs,
        "speedup_per_macs": found.speedup * macs,
        "milliseconds": found.milliseconds,
        "dense_milliseconds": found.reference_milliseconds,
        "sizes": plan.check(sc.inspect(model)),
    }


def assert_same_function(model: nn.Module, plan: sc.Plan) -> None:
    """The pruned model computes what the dense one does with the same units at zero."""
    anatomy = sc.inspect(model)
    if plan.weights or any(anatomy.group(name).kind not in INNER for name in plan.keep):
        return  # norms over fewer channels compute something else, and new weights anything
    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    sc.prune(pruned, plan)
    with torch.no_grad():
        for name, keep in plan.keep.items():
            group = anatomy.group(name)
            gone = np.ones((group.heads, group.size), bool)
            np.put_along_axis(gone, keep, False, axis=1)
            for member in group.members:
                if member.role == "reader" or group.kind != "ffn":
                    index = torch.from_numpy(member.entries[gone].flatten())
                    tensor_of(masked, member.tensor).index_fill_(member.axis, index, 0.0)
        x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
        torch.testing.assert_close(pruned(x), masked(x), rtol=1e-3, atol=1e-4)


def targets_table(run: Run) -> None:
    for batch in run.options.batches:

        def measure(batch: int = batch) -> Row:
            # Both halves take minutes at a large batch: a run that is killed in the second keeps the first.
            path: Path = run.options.work / f"small-{batch}-{run.options.runtime}.plan.json"
            if not path.is_file():
                model, table = run.model("small"), run.table("small", batch)
                target = sc.Target(latency=0.5)
                sc.plan(model, run.stats("small"), method="snp", target=target, latency_table=table).save(path)
            plan = sc.Plan.load(path)
            report = plan.latency
            assert report is not None
            within = {"predicted": report.predicted, "in_plan": report.measured, "rounds": report.rounds}
            return {**within, **paired(run, "small", plan, batch)}

        key = {"table": "targets", "model": "small", "target": "latency 0.5", "runtime": run.options.runtime}
        run.row({**key, "batch": batch}, measure)


def macs_table(run: Run) -> None:
    models = ("small", 0.28), ("base", 0.36), ("base", 0.2)
    cuts = INNER, (*INNER, "width", "heads"), ("ffn", "width", "heads"), ("ffn", "width", "heads", "layer")
    for (name, budget), groups in itertools.product(models, cuts):
        for batch in run.options.batches:
            if name not in run.options.models:
                continue

            def measure(
                name: str = name, budget: float = budget, groups: tuple[str, ...] = groups, batch: int = batch
            ) -> Row:
                stats = run.stats(name, sensitivity="layer" in groups)
                # Nothing but their measured loss tells whole layers apart.
                allocation = "error" if "layer" in groups else None
                target = sc.Target(macs=budget)
                plan = sc.plan(
                    run.model(name), stats, method="snp", target=target, groups=groups, allocation=allocation
                )
                return paired(run, name, plan, batch)

            key = {"table": "macs", "model": name, "target": f"macs {budget:g}", "groups": "+".join(groups)}
            run.row({**key, "runtime": run.options.runtime, "batch": batch}, measure)


def random_sizes(anatomy: Anatomy, number: int, narrow: bool) -> dict[str, int]:
    """Every block its own; a third loses width, a fourth has sizes that are no multiples, a half unlike qk and v."""
    generator = np.random.default_rng(number)
    least = generator.uniform(0.15, 0.85)
    sizes: dict[str, int] = {}
    free = (*INNER, "width") if number % 3 == 1 and not narrow else INNER
    for group in anatomy.groups:
        if group.kind not in free:
            continue
        multiple = 1 if number % 4 == 3 else (8 if group.per_head else 32)
        count = generator.integers(max(1, round(least * group.size / multiple)), group.size // multiple + 1)
        sizes[group.name] = int(count) * multiple
        if group.kind == "v" and number % 2 == 0:
            sizes[group.name] = sizes[f"blocks.{group.block}.qk"]
    return sizes


def random_table(run: Run) -> None:
    for batch in run.options.batches:
        for number in range(run.options.plans):

            def measure(batch: int = batch, number: int = number) -> Row:
                model, table, anatomy = run.model("small"), run.table("small", batch), run.anatomy("small")
                sizes = random_sizes(anatomy, number, run.options.narrow)
                ratio, quartiles = timing.measured_ratio(model, table, sizes, repeats=run.options.plan_pairs)
                predicted = table.predict(anatomy, sizes) / table.predict(anatomy)
                off = predicted / ratio - 1
                return {"predicted": predicted, "measured": ratio, "quartiles": list(quartiles), "off": off}

            key = {"table": "random", "model": "small", "runtime": run.options.runtime}
            run.row({**key, "batch": batch, "plan": number}, measure)


def budgets_table(run: Run) -> None:
    for name in run.options.models:
        for groups in (INNER, (*INNER, "width")):
            for allocation in ("uniform", "error"):
                # Errors of the base model take long to measure, and its budgets are no other matter.
                if name == "base" and allocation == "error":
                    continue
                for budget in run.options.budgets:

                    def measure(
                        name: str = name,
                        groups: tuple[str, ...] = groups,
                        allocation: str = allocation,
                        budget: float = budget,
                    ) -> Row:
                        method = "project" if allocation == "error" else "snp"
                        stats = run.stats(name, sensitivity=allocation == "error")
                        target = sc.Target(macs=budget)
                        try:
                            plan = sc.plan(
                                run.model(name),
                                stats,
                                method=method,
                                target=target,
                                groups=groups,
                                allocation=allocation,
                            )
                        except sc.InvalidArgument as error:
                            return {"refused": str(error)}
                        return {"of_target": plan.macs[1] / plan.macs[0] / budget, "sizes": sizes_of(plan, run, name)}

                    key = {"table": "budgets", "model": name, "groups": "+".join(groups), "allocation": allocation}
                    run.row({**key, "budget": budget}, measure)


def sizes_of(plan: sc.Plan, run: Run, name: str) -> dict[str, int]:
    return plan.check(run.anatomy(name))


def planning_table(run: Run) -> None:
    for method, groups in (
        ("snp", INNER),
        ("snp", (*INNER, "width")),
        ("project", INNER),
        ("project", (*INNER, "width")),
    ):

        def measure(method: str = method, groups: tuple[str, ...] = groups) -> Row:
            model, stats = run.model("base"), run.stats("base", sensitivity=method == "project")
            start = time.perf_counter()
            plan = sc.plan(model, stats, method=method, target=sc.Target(macs=0.5), groups=groups)
            return {"seconds": time.perf_counter() - start, "macs": plan.macs[1] / plan.macs[0]}

        run.row({"table": "planning", "model": "base", "method": method, "groups": "+".join(groups)}, measure)


def show(run: Run) -> None:
    console.print(
        f"{processor()}, {THREADS} threads, torch {torch.__version__}, timm {timm.__version__}; random weights, "
        f"statistics of a few random images",
        highlight=False,
    )
    timed = [row for row in run.rows if row["table"] in ("targets", "macs")]
    if timed:
        view = Table(title="medians of paired runs against the dense model")
        for column in ("runtime", "model", "target", "groups", "batch", "MACs", "predicted", "in plan", "rounds"):
            view.add_column(column, justify="right")
        for column in ("measured", "quartiles", "speedup / MACs ratio"):
            view.add_column(column, justify="right")
        for row in timed:
            planned = [f"{row[k]:.3f}" if row.get(k) is not None else "" for k in ("predicted", "in_plan")]
            low, high = row["quartiles"]
            view.add_row(
                row["runtime"],
                row["model"],
                row["target"],
                row.get("groups", "+".join(INNER)),
                str(row["batch"]),
                f"{row['macs']:.3f}",
                *planned,
                str(row.get("rounds", "")),
                f"{row['measured']:.3f}",
                f"{low:.3f} … {high:.3f}",
                f"{row['speedup_per_macs']:.2f}",
            )
        console.print(view)
    for runtime, batch in sorted({(row["runtime"], row["batch"]) for row in run.rows if row["table"] == "random"}):
        off = [row["off"] for row in random_rows(run, runtime, batch)]
        size = [abs(each) for each in off]
        within = sum(each <= 0.1 for each in size)
        console.print(
            f"random plans, {runtime}, batch {batch}: {within} of {len(off)} predicted within 10 %; off by "
            f"{statistics.median(size):.1%} in the median, {max(size):.1%} at worst, "
            f"{statistics.mean(off):+.1%} in the mean",
            highlight=False,
        )
    for row in run.rows:
        if row["table"] == "planning":
            console.print(
                f"planning DeiT-Base, {row['method']}, {row['groups']}: {row['seconds']:.1f} s", highlight=False
            )
    shares: dict[tuple[str, str, str], list[float]] = {}
    for row in run.rows:
        if row["table"] == "budgets":
            values = shares.setdefault((row["model"], row["groups"], row["allocation"]), [])
            values += [row["of_target"]] if "of_target" in row else []
            if "refused" in row:
                console.print(
                    f"{row['model']}, {row['groups']}, macs {row['budget']}: {row['refused']}", highlight=False
                )
    for key, values in shares.items():
        if values:
            name = ", ".join(key)
            console.print(
                f"MACs ÷ target, {name}: {min(values):.4f} … {max(values):.4f} at {len(values)} targets",
                highlight=False,
            )


def random_rows(run: Run, runtime: str, batch: int) -> list[Row]:
    found = [row for row in run.rows if row["table"] == "random"]
    return [row for row in found if (row["runtime"], row["batch"]) == (runtime, batch)]


def plot(run: Run) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "secateur"  # the same numbers give the same file
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        figure.savefig(run.options.out / name, metadata={"Date": None})
        pyplot.close(figure)

    batches = sorted({(row["runtime"], row["batch"]) for row in run.rows if row["table"] == "random"})
    if batches:
        figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        for slope in (0.9, 1.1):
            axes.axline((0, 0), slope=slope, color="grey", linewidth=0.5, linestyle="--")
        for runtime, batch in batches:
            rows = random_rows(run, runtime, batch)
            axes.scatter(
                [r["measured"] for r in rows], [r["predicted"] for r in rows], label=f"{runtime}, batch {batch}", s=18
            )
        axes.set(xlabel="measured latency / dense", ylabel="predicted", xlim=(0, 1.1), ylim=(0, 1.1))
        axes.set_title("DeiT-Small, random plans; dashed: 10 %", fontsize="medium")
        axes.legend()
        save(figure, "speed_predicted.svg")

    planned = [row for row in run.rows if "sizes" in row and row["table"] == "budgets" and row["model"] == "small"]
    planned = [row for row in planned if row["groups"] == "+".join(INNER) and row["budget"] in (0.7, 0.5, 0.28)]
    if planned:
        figure, panels = pyplot.subplots(1, len(INNER), figsize=(12, 3.5), layout="constrained")
        anatomy = run.anatomy("small")
        for panel, kind in zip(panels, INNER, strict=True):
            for row in planned:
                groups = [group for group in anatomy.groups if group.kind == kind]
                line = "-" if row["allocation"] == "error" else ":"
                color = f"C{[0.7, 0.5, 0.28].index(row['budget'])}"
                label = f"macs {row['budget']:g}, {row['allocation']}"
                kept = [row["sizes"][group.name] for group in groups]
                panel.plot([group.block for group in groups], kept, line, color=color, label=label)
            panel.set(xlabel="block", title=kind, ylim=(0, None))
        panels[0].set_ylabel("kept")
        panels[0].legend(fontsize="x-small")
        save(figure, "speed_dims.svg")
        plot_errors(run, save)


def plot_errors(run: Run, save: Callable[[Any, str], None]) -> None:
    """What each group is predicted to lose, by ``project``, in the unit that the allocation adds up."""
    from matplotlib import pyplot

    model, anatomy, stats = run.model("small"), run.anatomy("small"), run.stats("small", sensitivity="noise")
    method = method_named("project")
    prepared = method.prepare(Bound(model, anatomy, stats, options_of(method, {})))
    figure, panels = pyplot.subplots(1, len(INNER), figsize=(12, 3.5), layout="constrained", sharey=True)
    for panel, kind in zip(panels, INNER, strict=True):
        groups = [group for group in anatomy.groups if group.kind == kind]
        for number, group in enumerate(groups):
            errors = prepared.errors(group)
            assert errors is not None
            loss = stats.sensitivity(group.name) * errors
            color = pyplot.get_cmap("viridis")(number / len(groups))
            panel.plot(
                np.arange(group.size + 1) / group.size, loss, color=color, label=f"block {number}", linewidth=0.9
            )
        panel.set(xlabel="kept share", title=kind, yscale="log")
    panels[0].set_ylabel("predicted loss, nats")
    panels[-1].legend(fontsize="xx-small", ncols=2)
    save(figure, "speed_errors.svg")


def main() -> None:
    run = Run(arguments())
    steps = {
        "budgets": budgets_table,
        "planning": planning_table,
        "targets": targets_table,
        "macs": macs_table,
        "random": random_table,
    }
    with sc.core.torch_threads():
        for table in () if run.options.show else run.options.tables:
            steps[table](run)
    show(run)
    plot(run)


if __name__ == "__main__":
    main()
