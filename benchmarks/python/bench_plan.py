"""What planning costs, the statistics given: every part of it, DeiT-Small and DeiT-Base, and the memory it takes.

make bench, or pytest --benchmark-enable benchmarks/python/bench_plan.py
Random weights with outlier channels, calibrated on random images; the sensitivities, which take minutes to measure and
no time to use, are made up.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from rich.console import Console
from rich.table import Table
from secateur.anatomy.fingerprint import Fingerprint
from secateur.budgets.allocate import allocate
from secateur.families.registry import family_of
from secateur.methods.base import Bound
from secateur.methods.registry import method_named, options_of

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
METHODS = ("project", "refit", "snp")
GROUPS = ("qk", "v", "ffn", "width")
IMAGES = 64
LIMITS = {"groups": GROUPS, "freeze": (), "min_keep": {}, "round_to": None}
RUNS = 3

_ROWS: list[tuple[str, dict[str, float]]] = []


def made(name):
    """The model, with a few channels of its norms far above the others, as in trained ones."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight[torch.randperm(len(norm.weight))[:5]] *= 8
                norm.bias.normal_(0, 0.1)
            block.mlp.fc1.weight *= torch.randn(len(block.mlp.fc1.weight), 1).mul_(0.5).exp_() * 3
    return model


def calibrated(model):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(IMAGES, 3, 7, 7, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=224, mode="bilinear")
    images += 0.5 * torch.randn(images.shape, generator=generator)
    stats = sc.calibrate(model, list(images.split(16)))
    drawn = np.random.default_rng(0)
    for group in sc.inspect(model).groups:
        stats.tensors[f"sensitivity/{group.name}/divergence"] = np.array([drawn.lognormal(), 1.0])
    return stats


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """A model, its statistics, and their file."""
    model = made(request.param)
    path = tmp_path_factory.mktemp("statistics") / "file.safetensors"
    calibrated(model).save(path)
    return request.param, model, sc.Statistics.load(path), path


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print what was measured."""
    yield
    names = list(dict.fromkeys(name for _, row in _ROWS for name in row))
    printed = Table(title=f"planning, seconds, {torch.get_num_threads()} threads")
    for column in ("what", *names):
        printed.add_column(column, justify="left" if column == "what" else "right")
    for what, row in _ROWS:
        printed.add_row(what, *(f"{row[name]:.2f}" if name in row else "" for name in names))
    Console(width=140).print(printed)


def in_parts(model, stats, method):
    """What ``plan`` does, part by part: seconds of each, and the sizes that it chose."""
    seconds = {}
    start = time.perf_counter()

    def lap(part):
        nonlocal start
        now = time.perf_counter()
        seconds[part] = now - start
        start = now

    anatomy = family_of(model).inspect(model)
    stats.settings.fingerprint.require(Fingerprint.of(model, anatomy), "model", strict=True)
    lap("fingerprint")
    criterion = method_named(method)
    prepared = criterion.prepare(Bound(model, anatomy, stats, options_of(criterion, {})))
    for kind in GROUPS:
        for group in anatomy.groups:
            if group.kind == kind:
                prepared.errors(group)
        lap(f"errors {kind}")

    def losses(group):
        return stats.sensitivity(group.name) * prepared.errors(group)

    sizes = allocate(anatomy, sc.Target(macs=0.5), **LIMITS, losses=losses).sizes
    lap("allocation")
    prepared.decide(sizes)
    lap("bases, refit")
    return seconds, sizes


def checked(model, stats, method):
    """The plan for half of the MACs, which it meets; where nothing but the basis changes the model is the same."""
    plan = sc.plan(model, stats, method=method, target=sc.Target(macs=0.5), groups=GROUPS)
    assert 0.97 * 0.5 <= plan.macs[1] / plan.macs[0] <= 0.5
    pruned = copy.deepcopy(model)
    sc.prune(pruned, plan)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert bool(pruned(x).isfinite().all())
        if method == "project":
            # A LayerNorm's stream holds one direction less than it has channels, which nothing reads.
            same, wanted = copy.deepcopy(model), model(x)
            sc.prune(same, sc.plan(model, stats, method=method, ratios={"width": 1 / model.embed_dim}))
            assert float((same(x) - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())
    return plan


@pytest.mark.parametrize("method", METHODS)
def test_plan(case, method, paired):
    name, model, stats, _ = case
    plan = checked(model, stats, method)
    runs = []

    def measure():
        seconds, sizes = in_parts(model, stats, method)
        assert all(plan.keep[group].shape[1] == sizes[group] for group in plan.keep)
        runs.append(seconds)

    paired.benchmark.pedantic(measure, rounds=RUNS)
    medians = {part: float(np.median([run[part] for run in runs])) for part in runs[0]}
    _ROWS.append((f"{name}, {method}", {**medians, "all": float(np.median([sum(run.values()) for run in runs]))}))


def test_peak_memory(case, paired):
    """From outside, in a fresh process: the peak of resident memory while the plan is made, above model and file."""
    name, _, _, path = case
    script = textwrap.dedent("""
        import re, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import bench_plan, torch
        import secateur as sc
        torch.set_num_threads(int(sys.argv[4]))
        model, stats = bench_plan.made(sys.argv[2]), sc.Statistics.load(sys.argv[3])
        total = sum(float(tensor.sum()) for tensor in stats.tensors.values())  # all of the file is in memory
        def mib(field):
            return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        Path("/proc/self/clear_refs").write_text("5")
        before = mib("VmRSS")
        sc.plan(model, stats, method="project", target=sc.Target(macs=0.5), groups=bench_plan.GROUPS)
        print(mib("VmHWM") - before)
    """)
    arguments = [sys.executable, "-c", script, str(__file__).rpartition("/")[0], name, str(path)]
    threads = str(torch.get_num_threads())
    added = []

    def measure():
        added.append(float(subprocess.run([*arguments, threads], capture_output=True, text=True, check=True).stdout))

    paired.benchmark.pedantic(measure, rounds=2)
    size = path.stat().st_size / 2**20
    paired.record(f"memory added by plan({name}, project) ÷ its statistics", added, [size] * 2, "MiB")
