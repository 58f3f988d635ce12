"""What accuracy is left after pruning, without training and after some: every method on one model, in one run.

pip install ".[bench]" && python benchmarks/python/bench_accuracy.py --data FOLDER
FOLDER holds train/ and test/ with one folder of images per class. The checkpoint is a timm VisionTransformer whose
safetensors metadata says under "model" how it is built. Rows go to accuracy.json as they are measured, and are not
measured again by the next run with the same settings; tables are printed and plots drawn from all rows there.

main    query/key, value and FFN cut at one ratio, the same counts for every method, width dense; a method that cannot
        cut one of them takes what it saves from the others
best    every method with its own best allocation: those of secateur as they plan, with the width and without; any other
        the best of a grid of ratios, width included; the choice on held-out training images without their labels
allocation  secateur's methods with counts shared out by error against one removed fraction for all, with the width and
        without; the first draw
sequential  project planned at once against block by block, each behind what is already pruned, at the same counts
images  how many calibration images, and which share of their tokens, it takes
tuned   main's models, and 60 % of the parameters, after distilled fine-tuning, next to the dense model and an
        untrained one of the same sizes, fine-tuned alike; a table for each device. Several processes, each with methods
        and --out of its own, can share a GPU and one --tune-passes; --merge puts their rows together
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import peers
import secateur as sc
import timm
import torch
from conftest import processor
from counts import INNER, OURS, Budget, allocations, kinds_of, sizes_at, uniform
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tuning import Answers, Passes, attention, captured

TABLES = ("main", "best", "allocation", "sequential", "images", "tuned")
HELD_OUT = 256
# Decoded test images are kept in memory up to so many bytes, else read again for every model.
MEMORY = 2**30
# What tells the rows of fine-tuned models apart.
TUNED = ("table", "budget", "epochs", "seed", "method", "amp", "device")
Row = dict[str, Any]
console = Console(width=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parents[2]
    checkpoint = root.parent / "shared" / "checkpoints" / "vit_cifar10_d6.safetensors"
    add = parser.add_argument
    add("--checkpoint", type=Path, default=checkpoint, help="safetensors of a VisionTransformer")
    add("--data", type=Path, required=True, help="folder with train/ and test/, one folder of images per class in each")
    add("--mean", type=float, nargs="+", default=[0.4914, 0.4822, 0.4465])
    add("--std", type=float, nargs="+", default=[0.2470, 0.2435, 0.2616])
    add("--crop-pct", type=float, default=1.0, help="of the evaluation transform")
    add("--calibration-images", type=int, default=1024)
    add("--test-images", type=int, help="all unless given")
    add("--draws", type=int, default=3, help="of calibration images, disjoint")
    add("--budgets", type=float, nargs="+", default=[0.85, 0.7, 0.5, 0.35, 0.25], help="kept MACs")
    add("--methods", nargs="*", choices=[*OURS, *peers.PEERS], default=[*OURS, *peers.PEERS])
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    counts = [2**k for k in range(6, 13)]
    add("--image-counts", type=int, nargs="+", default=counts, help="calibration images of the table images")
    add("--image-budget", type=float, default=0.5, help="kept MACs of the table images")
    add("--allocation-budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35], help="kept MACs")
    add("--sequential-budgets", type=float, nargs="+", default=[0.5, 0.35], help="kept MACs")
    add("--tune-budgets", type=float, nargs="*", default=[0.5, 0.35], help="kept MACs")
    add("--tune-params", type=float, nargs="*", default=[0.6], help="kept parameters")
    add("--tune-epochs", type=int, nargs="+", default=[1, 3])
    add("--tune-images", type=int, help="all unless given")
    add("--tune-batch", type=int, default=128)
    add("--tune-lr", type=float, default=5e-4)
    add("--tune-scale", type=float, default=0.7, help="smallest share of an image that a random crop keeps")
    twins = ("dense", "random")
    add("--tune-references", nargs="*", choices=twins, default=twins, help="beside the methods: dense, and untrained")
    add("--tune-passes", type=Path, help="folder that keeps each pass, and the teacher's answers, for the next model")
    add("--tune-amp", choices=("bfloat16", "float16"), help="mixed precision of fine-tuning; none unless given")
    add("--tune-attention", choices=("fused", "plain"), default="fused", help="plain trains faster on few tokens")
    add("--tune-graphs", action="store_true", help="training steps as CUDA graphs, for processes that share a GPU")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fine-tuning")
    add("--repeats", type=int, default=15, help="of the speed measurement; 0 for none")
    add("--device", default="cpu")
    add("--threads", type=int, default=2)
    add("--workers", type=int, default=0, help="processes that decode images")
    add("--show", action="store_true", help="measure nothing: tables and plots of the rows that are in --out")
    add("--fresh", action="store_true", help="forget the rows in --out")
    add("--merge", type=Path, nargs="+", default=[], help="accuracy.json of others, to take fine-tuned models from")
    add("--again", nargs="+", default=[], metavar="METHOD", help="measure the rows of these methods again")
    add("--out", type=Path, default=Path(__file__).parents[1] / "plots", help="folder of accuracy.json and the plots")
    return parser.parse_args()


class Batches(Iterable[Any]):
    """Images of a loader: decoded once where they fit in memory, else with every pass."""

    def __init__(self, loader: sc.data.ImageLoader, shape: Sequence[int], device: str) -> None:
        assert loader.images is not None
        self.images = loader.images
        small = 4 * self.images * math.prod(shape) <= MEMORY
        self._batches: Iterable[Any] = loader
        if small:
            self._batches = [(images.to(device), targets.to(device)) for images, targets in loader]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class Draw:
    """One draw of calibration images, with what every method measures on them."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images = model, images
        self.calibration = peers.Calibration(model, images, labels)

    @cached_property
    def statistics(self) -> sc.Statistics:
        return calibrate(self.model, self.images, sensitivity="noise")


def calibrate(model: nn.Module, images: Tensor, **options: Any) -> sc.Statistics:
    return sc.calibrate(model, list(images.split(64)), max_images=None, **options)


class Run:
    """The dense model, the images, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.tune_graphs and options.device == "cpu":
            raise SystemExit("--tune-graphs: expected a --device with CUDA graphs, got cpu")
        self.options = options
        torch.set_num_threads(options.threads)
        # What is measured in float32 is to be so on a GPU as well.
        torch.backends.cudnn.allow_tf32 = False
        self.device = "cpu" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
        with safe_open(options.checkpoint, "pt") as file:
            self.arguments: dict[str, Any] = json.loads(file.metadata()["model"])
        self.dense = self.build()
        self.dense.load_state_dict(load_file(options.checkpoint))
        self.dense.to(options.device).eval()
        self.anatomy = sc.inspect(self.dense)
        # Folders are read class by class: some of the images have to be a choice from all of them.
        batch_size = 64 if options.device == "cpu" else 1024
        test = self.loader("test", max_images=options.test_images, shuffle=True, batch_size=batch_size)
        self.test = Batches(test, self.anatomy.input_size, options.device)
        self.methods: list[str] = options.methods
        self.settings = {
            "checkpoint": hashlib.sha256(options.checkpoint.read_bytes()).hexdigest()[:16],
            "model": self.arguments,
            "calibration_images": options.calibration_images,
            "test_images": self.test.images,
            "mean": options.mean,
            "std": options.std,
            "crop_pct": options.crop_pct,
            "tune_images": options.tune_images,
            "tune_batch": options.tune_batch,
            "tune_lr": options.tune_lr,
            "tune_scale": options.tune_scale,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        self.path: Path = options.out / "accuracy.json"
        fresh = options.fresh or not self.path.is_file()
        self.rows: list[Row] = [] if fresh else self.read(self.path)
        for path in options.merge:
            self.merge(path)
        self.checked: set[tuple[Any, ...]] = set()
        self.dense_top1 = self.row({"table": "dense", "method": "dense"}, lambda: self.measured(self.dense))["top1"]

    def build(self) -> VisionTransformer:
        return VisionTransformer(**self.arguments)

    def loader(self, split: str, **arguments: Any) -> sc.data.ImageLoader:
        options = self.options
        prepare = {"mean": tuple(options.mean), "std": tuple(options.std)}
        if not arguments.get("train"):
            prepare["crop_pct"] = options.crop_pct
        arguments = {"batch_size": 64, "workers": options.workers, **prepare, **arguments}
        return sc.data.loader(options.data, self.dense, split=split, **arguments)

    @cached_property
    def training_images(self) -> tuple[Tensor, Tensor]:
        """Held-out images, then those of every draw: the beginning of one permutation, so no image is in two."""
        options = self.options
        needed = HELD_OUT + options.draws * options.calibration_images
        if "images" in options.tables:
            needed = max(needed, HELD_OUT + 2 * max(options.image_counts))
        images, labels = zip(*self.loader("train", max_images=needed, shuffle=True), strict=True)
        if sum(map(len, images)) < HELD_OUT + options.draws * options.calibration_images:
            raise SystemExit(f"expected {needed} training images, found {sum(map(len, images))}: fewer --draws")
        return torch.cat(images), torch.cat(labels)

    @cached_property
    def held_out(self) -> Tensor:
        return self.training_images[0][:HELD_OUT]

    @cached_property
    def held_out_logits(self) -> Tensor:
        return peers.logits(self.dense, self.held_out)

    @cached_property
    def draws(self) -> list[Draw]:
        images, labels = (x[HELD_OUT:].split(self.options.calibration_images) for x in self.training_images)
        return [Draw(self.dense, images[i], labels[i]) for i in range(self.options.draws)]

    def passes(self, seed: int) -> Iterable[Any]:
        """Batches to fine-tune on; which images, and what the transforms make of them, is the seed's choice."""
        options = self.options
        drawn = {"seed": seed, "max_images": options.tune_images, "scale": (options.tune_scale, 1.0)}
        loader = self.loader(
            "train", train=True, shuffle=True, batch_size=options.tune_batch, color_jitter=None, **drawn
        )
        if options.tune_passes is None:
            return loader
        source = [str(options.data.resolve()), self.anatomy.input_size, options.mean, options.std, drawn]
        name = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
        return Passes(loader, options.tune_passes / f"seed-{seed}-{name}", options.device)

    @cached_property
    def teacher(self) -> nn.Module:
        folder = self.options.tune_passes
        if folder is None:
            return self.dense
        return Answers(self.dense, folder / f"answers-{self.settings['checkpoint']}").eval()

    def merge(self, path: Path) -> None:
        """Take the fine-tuned models from another run's file that are not among the rows."""
        known = {tuple(row.get(name) for name in TUNED) for row in self.rows}
        tuned = [row for row in self.read(path) if row["table"] == "tuned"]
        self.rows += [row for row in tuned if tuple(row.get(name) for name in TUNED) not in known]
        self.write()

    def read(self, path: Path) -> list[Row]:
        found = json.loads(path.read_text())
        for name, value in json.loads(json.dumps(self.settings)).items():
            if found["settings"].get(name) != value:
                was = found["settings"].get(name)
                raise SystemExit(f"{path} is of {name} = {was}, not {value}: another --out, or --fresh")
        return [row for row in found["rows"] if row["method"] not in self.options.again]

    def write(self) -> None:
        machine = {
            "processor": processor(),
            "device": self.device,
            "threads": self.options.threads,
            "isa": sc.core.runtime.isa(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "secateur": sc.__version__,
        }
        text = json.dumps({"machine": machine, "settings": self.settings, "rows": self.rows}, indent=1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(self.path)

    def row(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row of this key, from the file or measured now; empty where the method does not know such a model."""
        for row in self.rows:
            if all(name in row and row[name] == value for name, value in key.items()):
                return row
        start = time.perf_counter()
        try:
            measured = measure()
        except sc.Unsupported as error:
            console.print(*map(str, key.values()), f"left out: {error}", highlight=False)
            return {}
        row = {**key, **measured, "seconds": round(time.perf_counter() - start, 1)}
        self.rows.append(row)
        self.write()
        result = f"{row['top1']:.2f} %" if "top1" in row else ""
        console.print(*map(str, key.values()), result, f"({row['seconds']} s)", highlight=False)
        return row

    def measured(self, model: nn.Module, *, speed: bool = False) -> Row:
        """Accuracy, cost, and images/s side by side with the dense model."""
        found: Row = {"top1": sc.evaluate(model, self.test).top1}
        if speed and self.options.repeats:
            timed = sc.bench(model, self.dense, batch_size=64, repeats=self.options.repeats)
            found |= {"images_per_second": timed.images_per_second, "speedup": timed.speedup}
            found["dense_images_per_second"] = timed.reference_images_per_second
            found["processor"] = processor()
        return found

    def divergence(self, model: nn.Module) -> float:
        return peers.divergence(self.held_out_logits, peers.logits(model, self.held_out))

    def prune(self, method: str, draw: Draw, ratios: Mapping[str, float]) -> peers.Outcome:
        """A pruned copy of the dense model, of exactly the counts that the ratios say."""
        sizes = sizes_at(self.anatomy, ratios)
        if method in OURS:
            outcome = self.planned(method, draw, ratios=dict(ratios))
        else:
            outcome = peers.PEERS[method].prune(draw.calibration, sizes)
        self.check(method, outcome.model, sizes)
        return outcome

    def planned(self, method: str, draw: Draw, **arguments: Any) -> peers.Outcome:
        plan = sc.plan(self.dense, draw.statistics, method=method, **arguments)
        model = copy.deepcopy(self.dense)
        sc.prune(model, plan)
        return peers.Outcome(model)

    def check(self, method: str, model: nn.Module, sizes: Mapping[str, int]) -> None:
        """The counts asked for, their cost, finite outputs; the first time for these counts, the same when reloaded."""
        found = sc.inspect(model)
        # A rotated width may hold its directions in more channels, and add a matrix.
        exact = method not in OURS or "width" not in sizes or sizes["width"] == self.anatomy.sizes["width"]
        for group in self.anatomy.groups:
            assert not (exact or group.kind in INNER) or found.sizes[group.name] == sizes[group.name], (
                f"{method}: {found.sizes[group.name]} units of {group.name} where {sizes[group.name]} were asked for"
            )
        if exact:
            assert found.macs == self.anatomy.macs_at(sizes), f"{method}: other MACs than asked for"
            assert found.params == self.anatomy.params_at(sizes), f"{method}: other parameters than asked for"
        answers = peers.logits(model, self.held_out[:16])
        assert bool(answers.isfinite().all()), f"{method}: outputs that are not finite"
        key = (method, *sizes.values())
        if key not in self.checked:
            self.checked.add(key)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.safetensors"
                sc.save(model, path, factory=(type(self.dense).__name__, self.arguments))
                again = peers.logits(sc.load(path), self.held_out[:16])
            # On a GPU the kernel, and its rounding, may depend on where the weights are.
            here = answers if self.device == "cpu" else peers.logits(copy.deepcopy(model).cpu(), self.held_out[:16])
            assert torch.equal(again, here), f"{method}: another model after save and load"

    def form(self, outcome: peers.Outcome) -> nn.Module:
        """Of two forms of one pruned model, the one nearer to the dense outputs."""
        if outcome.as_is is None:
            return outcome.model
        return min(outcome.model, outcome.as_is, key=self.divergence)


def cost(run: Run, model: nn.Module) -> Row:
    found = sc.inspect(model)
    return {"macs": found.macs / run.anatomy.macs, "params": found.params / run.anatomy.params}


def main_table(run: Run) -> None:
    for kept, index, method in itertools.product(run.options.budgets, range(run.options.draws), run.methods):
        budget = Budget("macs", kept)

        def measure(method: str = method, index: int = index, budget: Budget = budget) -> Row:
            ratios = uniform(run.anatomy, budget, method)
            outcome = run.prune(method, run.draws[index], ratios)
            found = {"ratios": ratios, **cost(run, outcome.model), **outcome.detail}
            found |= {"kl": run.divergence(outcome.model), **run.measured(outcome.model, speed=index == 0)}
            if outcome.as_is is not None:
                # Whichever is better for it is its row.
                theirs = run.measured(outcome.as_is)["top1"]
                found |= {"repaired": found["top1"], "as_is": theirs, "top1": max(found["top1"], theirs)}
            return found

        run.row({"table": "main", "budget": str(budget), "draw": index, "method": method}, measure)


def best(run: Run, method: str, draw: Draw, budget: Budget) -> tuple[nn.Module, Row]:
    """The allocation whose outputs are nearest to the dense model's, on images held out of everything else."""
    chosen: tuple[float, nn.Module, Row] | None = None
    tried, refused = 0, set()

    def consider(make: Callable[[], peers.Outcome], found: Row) -> None:
        nonlocal chosen, tried
        try:
            outcome = make()
        except (sc.Unsupported, sc.InvalidArgument) as error:
            refused.add(str(error))
            return
        spent = cost(run, outcome.model)
        if spent[budget.quantity] > budget.kept:
            refused.add(f"{found['allocation']}: {spent[budget.quantity]:.4f} of the dense {budget.quantity}")
            return
        model = run.form(outcome)
        kl = run.divergence(model)
        tried += 1
        if chosen is None or kl < chosen[0]:
            chosen = (kl, model, {**found, **spent, **outcome.detail})

    if method in OURS:
        for groups in (kinds_of(run.anatomy, method), INNER, (*kinds_of(run.anatomy, method), "heads", "layer")):
            consider(
                lambda groups=groups: run.planned(method, draw, groups=groups, target=budget.target),
                {"allocation": "own", "groups": groups},
            )
    else:
        for ratios in allocations(run.anatomy, budget, method):
            consider(lambda ratios=ratios: run.prune(method, draw, ratios), {"allocation": "grid", "ratios": ratios})
    if chosen is None:
        raise sc.Unsupported(
            f"{method}: no allocation reaches {budget}: {', '.join(sorted(refused)) or 'none of the grid'}"
        )
    kl, model, found = chosen
    more = {"kl": kl, "tried": tried, "refused": sorted(refused), "sizes": sizes_of(model)}
    return model, {**found, **more}


def sizes_of(model: nn.Module) -> dict[str, int]:
    try:
        return dict(sc.inspect(model).sizes)
    except sc.Unsupported:  # as another library left it
        return {}


def best_table(run: Run) -> None:
    for kept, index, method in itertools.product(run.options.budgets, range(run.options.draws), run.methods):
        budget = Budget("macs", kept)

        def measure(method: str = method, index: int = index, budget: Budget = budget) -> Row:
            model, found = best(run, method, run.draws[index], budget)
            return {**found, **run.measured(model, speed=index == 0)}

        run.row({"table": "best", "budget": str(budget), "draw": index, "method": method}, measure)


def allocation_table(run: Run) -> None:
    """One removed fraction against counts by error; whole heads and layers only where errors tell them apart."""
    for kept, method in itertools.product(run.options.allocation_budgets, run.methods):
        if method not in OURS:
            continue
        width = kinds_of(run.anatomy, method)
        for allocation, groups in (
            ("uniform", INNER),
            ("uniform", width),
            ("error", INNER),
            ("error", width),
            ("error", (*width, "heads", "layer")),
        ):
            arguments = {"target": sc.Target(macs=kept), "groups": groups, "allocation": allocation}

            def measure(method: str = method, arguments: Mapping[str, Any] = arguments) -> Row:
                model = run.planned(method, run.draws[0], **arguments).model
                return {"sizes": sizes_of(model), **cost(run, model), **run.measured(model)}

            key = {"table": "allocation", "budget": f"macs {kept:g}", "method": method, "allocation": allocation}
            run.row({**key, "groups": list(groups)}, measure)


def show_allocation(run: Run) -> None:
    rows = [row for row in run.rows if row["table"] == "allocation"]
    if not rows:
        return
    view = Table(title=f"points lost of {run.dense_top1:.2f} % top-1, by how counts are shared out; one draw")
    ways = list(dict.fromkeys((row["allocation"], tuple(row["groups"])) for row in rows))
    for column in ("method", "budget", *(f"{way}: {' '.join(groups)}" for way, groups in ways), "closes"):
        view.add_column(column, justify="right")
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        found = {
            (row["allocation"], tuple(row["groups"])): run.dense_top1 - row["top1"]
            for row in rows
            if (row["method"], row["budget"]) == (method, budget)
        }
        before, after = (
            [value for (way, _), value in found.items() if way == allocation] for allocation in ("uniform", "error")
        )
        closes = f"{1 - min(after) / min(before):.0%}" if before and after and min(before) > 0 else ""
        cells = [f"{found[way]:.2f}" if way in found else "" for way in ways]
        view.add_row(method, budget, *cells, closes)
    console.print(view)
    shares = [row["macs"] / float(row["budget"].split()[1]) for row in rows if row["allocation"] == "error"]
    console.print(f"counts by error: MACs of the plan over target {min(shares):.4f} … {max(shares):.4f}")


def sequential_table(run: Run) -> None:
    """Project at once and block by block; both choose their counts on the dense model, so they are the same."""
    for kept, index, allocation in itertools.product(
        run.options.sequential_budgets, range(run.options.draws), ("error", "uniform")
    ):
        arguments: dict[str, Any] = {"target": sc.Target(macs=kept), "allocation": allocation}
        draw = run.draws[index]

        def at_once(draw: Draw = draw, arguments: dict[str, Any] = arguments) -> nn.Module:
            return run.planned("project", draw, **arguments).model

        def by_block(draw: Draw = draw, arguments: dict[str, Any] = arguments) -> nn.Module:
            model = copy.deepcopy(run.dense)
            sc.prune_sequential(
                model, list(draw.images.split(64)), "project", **arguments, max_images=None, target_stream="pruned"
            )
            return model

        for name, make in (("at once", at_once), ("block by block", by_block)):

            def measure(make: Callable[[], nn.Module] = make) -> Row:
                model = make()
                return {"kl": run.divergence(model), "sizes": sizes_of(model), **run.measured(model)}

            key = {"table": "sequential", "budget": f"macs {kept:g}", "draw": index, "method": name}
            run.row({**key, "allocation": allocation}, measure)


def show_sequential(run: Run) -> None:
    rows = [row for row in run.rows if row["table"] == "sequential"]
    for budget, allocation in dict.fromkeys((row["budget"], row["allocation"]) for row in rows):
        found: dict[str, dict[int, Row]] = {"at once": {}, "block by block": {}}
        for row in rows:
            if (row["budget"], row["allocation"]) == (budget, allocation):
                found[row["method"]][row["draw"]] = row
        first, second = found.values()
        both = sorted(first.keys() & second.keys())
        assert all(first[draw]["sizes"] == second[draw]["sizes"] for draw in both)
        gains = {
            name: [sign * (second[draw][name] - first[draw][name]) for draw in both]
            for name, sign in (("top1", 1), ("kl", 1e3))
        }
        console.print(
            f"block by block against at once, {budget}, allocation {allocation}: top-1 "
            f"{_cell(gains['top1'], sign=True)} points, divergence {_cell(gains['kl'], sign=True)} millinats"
        )


def images_table(run: Run) -> None:
    """Accuracy and agreement against the number of calibration images, and the share of tokens that count."""
    budget = Budget("macs", run.options.image_budget)
    ratios = uniform(run.anatomy, budget)
    pool = run.training_images[0][HELD_OUT:]

    def accuracy(method: str, stats: sc.Statistics) -> float:
        model = copy.deepcopy(run.dense)
        sc.prune(model, sc.plan(run.dense, stats, method=method, ratios=ratios))
        return float(run.measured(model)["top1"])

    methods = [method for method in run.methods if method in OURS]
    if not methods:
        console.print("images: no method of secateur's own was asked for")
        return
    for count in run.options.image_counts:
        if 2 * count > len(pool):
            console.print(f"images: two disjoint draws of {count} need more training images")
            continue

        def measure(count: int = count) -> Row:
            pair = [calibrate(run.dense, pool[i * count : (i + 1) * count]) for i in range(2)]
            agreed = pair[0].agreement(pair[1]).values()
            found: Row = {name: [accuracy(name, stats) for stats in pair] for name in methods}
            found["spearman"] = statistics.mean(each.spearman for each in agreed)
            found["overlap"] = statistics.mean(each.overlap for each in agreed)
            return found

        run.row({"table": "images", "budget": str(budget), "method": "+".join(methods), "images": count}, measure)
    for index, method, fraction in itertools.product(range(run.options.draws), methods, (1.0, 0.25)):

        def measure_tokens(index: int = index, method: str = method, fraction: float = fraction) -> Row:
            stats = calibrate(run.dense, run.draws[index].images, token_fraction=fraction)
            return {"top1": accuracy(method, stats)}

        key = {"table": "tokens", "budget": str(budget), "draw": index, "method": method, "token_fraction": fraction}
        run.row(key, measure_tokens)


def tuned_table(run: Run) -> None:
    options = run.options
    budgets = [Budget("macs", kept) for kept in options.tune_budgets]
    budgets += [Budget("params", kept) for kept in options.tune_params]

    def pruned(method: str, budget: Budget, seed: int) -> nn.Module:
        draw = run.draws[seed % len(run.draws)]
        if method == "dense":
            return copy.deepcopy(run.dense)
        if method == "random":
            torch.manual_seed(seed)
            sizes = sizes_at(run.anatomy, uniform(run.anatomy, budget))
            return peers.random_twin(draw.calibration, run.build, sizes)
        if budget.quantity == "params":
            return best(run, method, draw, budget)[0]
        return run.form(run.prune(method, draw, uniform(run.anatomy, budget, method)))

    # One seed of everything, then what takes the least.
    cases = sorted(
        itertools.product(options.seeds, options.tune_epochs),
        key=lambda case: (case[0] != options.seeds[0], case[1], case[0]),
    )
    for (seed, epochs), budget in itertools.product(cases, budgets):
        # Of the parameters each keeps the sizes it chose itself: an untrained model of the same is no one model.
        references = [each for each in options.tune_references if (each, budget.quantity) != ("random", "params")]
        for method in (*references, *run.methods):

            def measure(method: str = method, budget: Budget = budget, seed: int = seed, epochs: int = epochs) -> Row:
                # A copy: graphs cannot take parameters that a backward pass on another stream knows.
                model = copy.deepcopy(pruned(method, budget, seed))
                before = run.measured(model)["top1"]
                batches = run.passes(seed)
                tuning = {"epochs": epochs, "lr": options.tune_lr, "amp": options.tune_amp, "seed": seed}
                start = time.perf_counter()
                with ExitStack() as stack:
                    stack.enter_context(attention(model, fused=options.tune_attention == "fused"))
                    if options.tune_graphs:
                        stack.enter_context(
                            captured(model, next(iter(batches))[0].to(options.device), options.tune_amp)
                        )
                    sc.finetune(model, batches, teacher=run.teacher, **tuning)
                took = {"tune_seconds": round(time.perf_counter() - start, 1), "torch": torch.__version__}
                return {"before": before, **run.measured(model), **took}

            # The dense model has no budget: one row serves all.
            where = "macs 1" if method == "dense" else str(budget)
            key = {"table": "tuned", "budget": where, "epochs": epochs, "seed": seed, "method": method}
            run.row({**key, "amp": options.tune_amp, "device": run.device}, measure)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and two standard errors; NaN for the errors of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), 2 * error


def lost(run: Run, table: str, budget: Budget, method: str) -> dict[int, float]:
    """Draw to points of top-1 lost against dense."""
    return {
        row["draw"]: run.dense_top1 - row["top1"]
        for row in run.rows
        if (row["table"], row.get("budget"), row["method"]) == (table, str(budget), method)
    }


def show_lost(run: Run, table: str, title: str) -> None:
    """Points lost by method and budget, then the paired leads of secateur's best over the peers."""
    if not any(row["table"] == table for row in run.rows):
        return
    budgets = [Budget("macs", kept) for kept in run.options.budgets]
    view = Table(title=f"{title}: points lost of {run.dense_top1:.2f} % top-1, {run.test.images:,} test images")
    view.add_column("method")
    for budget in budgets:
        view.add_column(str(budget), justify="right")
    view.add_column("note")
    means: dict[tuple[str, Budget], float] = {}
    for method in run.methods:
        cells = []
        for budget in budgets:
            found = list(lost(run, table, budget, method).values())
            if found:
                means[method, budget] = statistics.mean(found)
            cells.append(_cell(found))
        view.add_row(method, *cells, peers.PEERS[method].note if method in peers.PEERS else "")
    others = [method for method in run.methods if method in peers.PEERS]
    for ours in ("project", "refit"):
        for rival, named in (
            ("best peer", others),
            ("corp", ["corp"]),
            ("corp-paper", ["corp-paper"]),
            ("best but corp", [method for method in others if not method.startswith("corp")]),
        ):
            cells = []
            for budget in budgets:
                allowed = [method for method in named if (method, budget) in means]
                if (ours, budget) not in means or not allowed:
                    cells.append("")
                    continue
                other = min(allowed, key=lambda m: means[m, budget])
                mine, theirs = lost(run, table, budget, ours), lost(run, table, budget, other)
                leads = [theirs[draw] - mine[draw] for draw in mine.keys() & theirs.keys()]
                cells.append(f"{_cell(leads, sign=True)} {other}")
            if any(cells):
                view.add_row(f"[bold]{ours} ahead of {rival}", *cells, "paired over draws, ± two standard errors")
    console.print(view)
    for method in run.methods:
        rows = [row for row in run.rows if row["table"] == table and row["method"] == method and "as_is" in row]
        for budget in budgets:
            both = [(row["repaired"], row["as_is"]) for row in rows if row["budget"] == str(budget)]
            if both:
                repaired, as_is = (statistics.mean(values) for values in zip(*both, strict=True))
                console.print(
                    f"{method}, {budget}: scale repaired {repaired:.2f} %, as the library leaves it {as_is:.2f} %"
                )


def _cell(values: Sequence[float], *, sign: bool = False) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:+.2f}" * sign + f"{mean:.2f}" * (not sign) + ("" if math.isnan(error) else f" ± {error:.2f}")


def show_images(run: Run) -> None:
    rows = [row for row in run.rows if row["table"] == "images"]
    if rows:
        names = [name for name in OURS if any(name in row for row in rows)]
        view = Table(title=f"calibration images, macs {run.options.image_budget:g}; two disjoint draws of each count")
        for column in ("images", *(f"{name}, top-1" for name in names), "rank agreement", "overlap"):
            view.add_column(column, justify="right")
        for row in sorted(rows, key=lambda row: row["images"]):
            accuracies = (" / ".join(f"{top1:.2f}" for top1 in row.get(name, ())) for name in names)
            view.add_row(f"{row['images']:,}", *accuracies, f"{row['spearman']:.3f}", f"{row['overlap']:.3f}")
        console.print(view)
    tokens = [row for row in run.rows if row["table"] == "tokens"]
    for method in dict.fromkeys(row["method"] for row in tokens):
        by_fraction = {
            fraction: {r["draw"]: r["top1"] for r in tokens if (r["method"], r["token_fraction"]) == (method, fraction)}
            for fraction in (1.0, 0.25)
        }
        both = by_fraction[1.0].keys() & by_fraction[0.25].keys()
        change = _cell([by_fraction[0.25][draw] - by_fraction[1.0][draw] for draw in both], sign=True)
        console.print(f"{method}: a quarter of the tokens changes top-1 by {change} points")


def show_tuned(run: Run) -> None:
    """A table for each device, of rows that are all of it."""
    tuned = [row for row in run.rows if row["table"] == "tuned"]
    for device in dict.fromkeys(row["device"] for row in tuned):
        show_tuned_on(run, device, [row for row in tuned if row["device"] == device])


def show_tuned_on(run: Run, device: str, rows: Sequence[Row]) -> None:
    columns = sorted({(row["budget"], row["epochs"], row["amp"] or "") for row in rows if row["method"] != "dense"})
    title = "top-1 after distilled fine-tuning, and the lead over the dense model fine-tuned alike"
    view = Table(title=f"{title}; {device}")
    view.add_column("method")
    for budget, epochs, amp in columns:
        passes = f"{epochs} epochs" if epochs > 1 else "1 epoch"
        view.add_column(" ".join((f"{budget}, {passes}", amp)), justify="right")

    def found(method: str, budget: str, epochs: int, amp: str) -> dict[int, float]:
        wanted = (method, "macs 1" if method == "dense" else budget, epochs, amp)
        return {r["seed"]: r["top1"] for r in rows if (r["method"], r["budget"], r["epochs"], r["amp"] or "") == wanted}

    for method in ("dense", "random", *run.methods):
        cells = []
        for column in columns:
            mine, dense = found(method, *column), found("dense", *column)
            leads = [mine[seed] - dense[seed] for seed in mine.keys() & dense.keys()]
            cells.append(f"{_cell(list(mine.values()))} ({_cell(leads, sign=True)})" if mine else "")
        view.add_row(method, *cells)
    console.print(view)


def plot(run: Run) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "secateur"  # the same numbers give the same file
    from matplotlib import pyplot

    # Speed was measured side by side with the dense model, which is put at its median over the whole run.
    dense_speed = [row["dense_images_per_second"] for row in run.rows if "dense_images_per_second" in row] or [math.nan]
    speed_label = f"images / s, batch 64, {run.options.device}, {run.options.threads} threads"
    for axis, unit, label, name in (
        ("macs", 1.0, "MACs, share of dense", "accuracy_macs.svg"),
        ("speedup", statistics.median(dense_speed), speed_label, "accuracy_speed.svg"),
    ):
        tables = [table for table in ("main", "best") if any(row["table"] == table for row in run.rows)]
        if not tables:
            return
        figure, panels = pyplot.subplots(
            1, len(tables), figsize=(6 * len(tables), 4.5), layout="constrained", sharey=True, squeeze=False
        )
        titles = {"main": "same counts for all, width dense", "best": "each with its best allocation"}
        for panel, table in zip(panels[0], tables, strict=True):
            for index, method in enumerate(run.methods):
                points = []
                rows = [row for row in run.rows if (row["table"], row["method"]) == (table, method)]
                for budget in sorted({row["budget"] for row in rows}):
                    each = [row for row in rows if row["budget"] == budget]
                    places = [row[axis] * unit for row in each if axis in row]
                    if places:
                        points.append((statistics.mean(places), statistics.mean(row["top1"] for row in each)))
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    line = "-" if method in OURS else "--"
                    panel.plot(x, y, line, marker="o", markersize=3, color=f"C{index}", label=method)
            panel.axhline(run.dense_top1, color="black", linewidth=0.8, label="dense")
            panel.set_xlabel(label)
            panel.set_title(titles[table], fontsize="medium")
            panel.grid(alpha=0.3)
        panels[0][0].set_ylabel("top-1, %, no fine-tuning")
        panels[0][0].legend(fontsize="small")
        figure.savefig(run.options.out / name, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    run = Run(arguments())
    console.print(str(run.anatomy), highlight=False)
    console.print(f"dense {run.dense_top1:.2f} %")
    steps = {
        "main": main_table,
        "best": best_table,
        "allocation": allocation_table,
        "sequential": sequential_table,
        "images": images_table,
        "tuned": tuned_table,
    }
    # The peers take gradients, many of them subnormal, and those take the processor most of the time.
    with sc.core.torch_threads(), sc.core.subnormals_flushed(torch.device(run.options.device)):
        for table in () if run.options.show else run.options.tables:
            steps[table](run)
    machine = f"{processor()}, {run.options.threads} threads, torch {torch.__version__}, timm {timm.__version__}"
    console.print(machine)
    show_lost(run, "main", "same counts for all, width dense")
    show_lost(run, "best", "each with its best allocation")
    show_allocation(run)
    show_sequential(run)
    show_images(run)
    show_tuned(run)
    plot(run)


if __name__ == "__main__":
    main()
