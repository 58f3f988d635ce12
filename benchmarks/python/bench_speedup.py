"""Is a budget in time kept on the clock, and are predictions right? DeiT-Small with random weights, batch 1 and 16.

make bench, or pytest --benchmark-enable benchmarks/python/bench_speedup.py
Prints every figure and writes a plot of predicted against measured ratios to benchmarks/plots. Nothing here fails for
a slow machine; what fails is a pruned model that computes something else than the dense one with those units at zero.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from conftest import THREADS
from rich.console import Console
from rich.table import Table
from secateur import timing

BATCHES = (1, 16)
# A batch of 16 takes seconds: fewer pairs there for each of the many random plans.
PAIRS_PER_PLAN = {1: 9, 16: 5}
PLANS = 20
FOLDER = Path(__file__).parents[1] / "plots"

_TARGETS: list[tuple[str, ...]] = []
_PREDICTED: dict[int, list[tuple[float, float]]] = {}


@pytest.fixture(scope="module", autouse=True)
def _show() -> Generator[None, None, None]:
    """Print the tables and draw the plot when all is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
    console = Console(width=140)
    targets = Table(title="DeiT-Small, medians of 15 paired runs against the dense model")
    columns = (
        "target",
        "batch",
        "MACs kept",
        "predicted",
        "measured",
        "quartiles",
        "rounds",
        "speedup / MACs ratio",
    )
    for column in columns:
        targets.add_column(column, justify="right")
    for row in _TARGETS:
        targets.add_row(*row)
    console.print(targets)
    errors = Table(title=f"{PLANS} random plans: latency / dense, predicted against measured")
    for column in ("batch", "median error", "worst error", "predicted ... measured"):
        errors.add_column(column)
    for batch, pairs in _PREDICTED.items():
        off = [abs(predicted / measured - 1) for predicted, measured in pairs]
        listed = "  ".join(f"{predicted:.3f} {measured:.3f}," for predicted, measured in pairs)
        errors.add_row(str(batch), f"{statistics.median(off):.1%}", f"{max(off):.1%}", listed)
    console.print(errors)
    if _PREDICTED:
        _plot()


def _plot() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "secateur"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    for slope in (0.9, 1.1):
        axes.axline((0, 0), slope=slope, color="grey", linewidth=0.5, linestyle="--")
    for batch, pairs in _PREDICTED.items():
        axes.scatter(*zip(*pairs, strict=True), label=f"batch {batch}", s=18)
    axes.set(xlabel="predicted latency / dense", ylabel="measured", xlim=(0, 1.1), ylim=(0, 1.1))
    axes.set_title(f"DeiT-Small, {PLANS} random plans each; dashed: 10 %")
    axes.legend()
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / "latency_predicted.svg", metadata={"Date": None})
    pyplot.close(figure)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("deit_small_patch16_224").eval()


@pytest.fixture(scope="module")
def stats(model):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(8, 3, 224, 224, generator=generator) * 2 - 1 for _ in range(8)]
    return sc.calibrate(model, images, collect="scores")


@pytest.fixture(scope="module")
def tables():
    """One measured table for each batch size; what the tests share."""
    return {}


def table_of(tables, model, batch):
    if batch not in tables:
        tables[batch] = sc.measure_latency(model, batch_size=batch, groups=("qk", "v", "ffn"))
    return tables[batch]


def assert_same_function(model, plan):
    """The pruned model computes what the dense one does with the same units at zero."""
    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    sc.prune(pruned, plan)
    anatomy = sc.inspect(model)
    with torch.no_grad():
        for name, keep in plan.keep.items():
            group = anatomy.group(name)
            gone = np.ones((group.heads, group.size), bool)
            np.put_along_axis(gone, keep, False, axis=1)
            for member in group.members:
                if member.role == "reader" or group.kind != "ffn":
                    parameter = masked.get_parameter(f"{member.module}.{member.parameter}")
                    index = torch.from_numpy(np.flatnonzero(gone.ravel())) + member.offset
                    parameter.index_fill_(member.dim, index, 0.0)
        x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
        torch.testing.assert_close(pruned(x), masked(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_target_for_latency(benchmark, model, stats, tables, batch):
    """Plan to half of the time; then once more, apart from the planning, 15 pairs."""
    options = {"target": sc.Target(latency=0.5), "latency_table": table_of(tables, model, batch)}
    plan = benchmark.pedantic(lambda: sc.plan(model, stats, **options), rounds=1)
    report = plan.latency
    note = f"{report.predicted:.3f} (in plan: {report.measured:.3f})"
    measure_again(model, plan, "latency 0.5", batch, note, str(report.rounds))


@pytest.mark.parametrize("batch", BATCHES)
def test_how_much_of_the_macs_is_time(benchmark, model, stats, tables, batch):
    """(t_dense / t_pruned) / (MACs_dense / MACs_pruned): 1 where time falls as MACs do."""
    plan = benchmark.pedantic(lambda: sc.plan(model, stats, target=sc.Target(macs=0.28)), rounds=1)
    anatomy = sc.inspect(model)
    table = table_of(tables, model, batch)
    predicted = table.predict(anatomy, plan.check(anatomy)) / table.predict(anatomy)
    measure_again(model, plan, "macs 0.28", batch, f"{predicted:.3f}", "-")


def measure_again(model, plan, target, batch, predicted, rounds):
    """One row of the table; printed at once as well, since the whole takes long."""
    assert_same_function(model, plan)
    pruned = copy.deepcopy(model)
    sc.prune(pruned, plan)
    found = sc.bench(pruned, model, batch_size=batch, repeats=15)
    low, high = found.speedup_quartiles
    quartiles = f"{1 / high:.3f} ... {1 / low:.3f}"
    macs = plan.macs[1] / plan.macs[0]
    measured = f"{1 / found.speedup:.3f}"
    share = f"{macs * found.speedup:.2f}"
    _TARGETS.append((target, str(batch), f"{macs:.3f}", predicted, measured, quartiles, rounds, share))
    print("; ".join(_TARGETS[-1]), flush=True)


@pytest.mark.parametrize("batch", BATCHES)
def test_random_plans(benchmark, model, tables, batch):
    """Every block its own sizes; every fourth plan of sizes that are no multiples, every other with unlike qk and v."""
    table = table_of(tables, model, batch)
    anatomy = sc.inspect(model)
    generator = np.random.default_rng(0)
    dense = table.predict(anatomy)
    pairs = _PREDICTED.setdefault(batch, [])

    def measure(number):
        least = generator.uniform(0.15, 0.85)
        sizes = {}
        for group in anatomy.groups:
            if group.kind == "width":
                continue
            multiple = 1 if number % 4 == 3 else (32 if group.kind == "ffn" else 8)
            count = generator.integers(max(1, round(least * group.size / multiple)), group.size // multiple + 1)
            sizes[group.name] = int(count) * multiple
            if group.kind == "v" and number % 2 == 0:
                sizes[group.name] = sizes[f"blocks.{group.block}.qk"]
        ratio, _ = timing.measured_ratio(model, table, sizes, repeats=PAIRS_PER_PLAN[batch])
        pairs.append((table.predict(anatomy, sizes) / dense, ratio))
        print(f"batch {batch}: predicted {pairs[-1][0]:.3f}, measured {ratio:.3f}", flush=True)

    benchmark.pedantic(lambda: [measure(number) for number in range(PLANS)], rounds=1)
