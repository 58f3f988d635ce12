"""The main job on real images in minutes: train, calibrate, halve the MACs, recover, measure, save, reload."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from rich import box
from rich.table import Table
from torch import nn

from .. import check
from ..budgets.target import Target
from ..calibration.calibrate import calibrate
from ..data.loader import ImageLoader, loader
from ..errors import Error, InvalidArgument
from ..exports.native import load, save
from ..families.registry import inspect
from ..files.container import digest
from ..latency.bench import Benchmark, bench
from ..plans.make import plan
from ..plans.prune import prune
from ..training.evaluate import Evaluation, evaluate
from ..training.finetune import finetune

if TYPE_CHECKING:
    import os

__all__ = ["Demo", "demo"]

_TARGET = 0.5
_BATCH = 32


@dataclass(frozen=True)
class Demo:
    """What the demo measured: accuracy in percent of the held-out digits, pairs are (dense, pruned)."""

    params: tuple[int, int]
    macs: tuple[int, int]
    steps: int
    finetune_steps: int
    trained: Evaluation
    pruned: Evaluation
    finetuned: tuple[Evaluation, Evaluation]
    reloaded: Evaluation
    benchmark: Benchmark
    file: Path
    file_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "file": str(self.file)}

    def table(self) -> Table:
        """Lay the figures out in one table, dense beside pruned."""
        table = Table(box=box.SIMPLE_HEAD, title="Handwritten digits, half held out", title_justify="left")
        for name in ("", "dense", "pruned", ""):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        (params, fewer), (macs, less) = self.params, self.macs
        speed = self.benchmark
        table.add_row("parameters", f"{params / 1e6:.2f} M", f"{fewer / 1e6:.2f} M", f"{fewer / params:.1%}")
        table.add_row("MACs", f"{macs / 1e6:.1f} M", f"{less / 1e6:.1f} M", f"{less / macs:.1%}")
        table.add_row(f"accuracy, trained {self.steps} steps", _percent(self.trained), "", "")
        table.add_row("accuracy, pruned", "", _percent(self.pruned), _points(self.pruned, self.trained))
        dense, pruned = self.finetuned
        name = f"accuracy, fine-tuned {self.finetune_steps} steps"
        table.add_row(name, _percent(dense), _percent(pruned), _points(pruned, dense))
        table.add_row("accuracy, reloaded in a new process", "", _percent(self.reloaded), "same bits")
        table.add_row(
            f"images/s, batch {speed.batch_size}, {speed.threads} threads",
            f"{speed.reference_images_per_second:,.0f}",
            f"{speed.images_per_second:,.0f}",
            f"{speed.speedup:.2f}x",
        )
        table.add_row("file", "", f"{self.file_bytes / 1e6:.2f} MB", "")
        table.caption = f"{self.file}, all in {self.seconds:.0f} s"
        table.caption_justify = "left"
        return table


def _percent(found: Evaluation) -> str:
    return f"{found.top1:.2f} %"


def _points(found: Evaluation, reference: Evaluation) -> str:
    return f"{found.top1 - reference.top1:+.2f} points"


def demo(
    folder: str | os.PathLike[str] = "demo",
    *,
    steps: int = 290,
    finetune_steps: int = 58,
    max_images: int | None = None,
    repeats: int = 15,
) -> Demo:
    """Train a ViT on scikit-learn's digits, halve its MACs by the method ``project``, compare it with the dense model.

    The dense model gets the same fine-tuning as the pruned one before the two are compared. What was saved is loaded
    in a new process, whose logits must have the same bits.

    Args:
        folder: where ``pruned.safetensors`` goes; made if it is not there.
        steps: of training, 32 images each.
        finetune_steps: at most a fifth of ``steps``.
        max_images: at most so many for calibration and for each evaluation.
        repeats: of the benchmark.

    Raises:
        InvalidArgument: scikit-learn is not installed, the fine-tuning is too long, or the folder is a file.
        Error: a check failed: the pruned model exceeds its target, or the reloaded one is another.
    """
    steps, finetune_steps = check.integer("steps", steps, 5), check.integer("finetune_steps", finetune_steps)
    max_images = check.integer("max_images", max_images, optional=True)
    repeats = check.integer("repeats", repeats)
    if finetune_steps > steps // 5:
        raise InvalidArgument(f"finetune_steps: expected from 1 to a fifth of {steps} steps, got {finetune_steps}")
    start = time.perf_counter()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidArgument(f"folder: expected a folder, or a path where one can be made, got {folder}") from error
    file = folder / "pruned.safetensors"

    model = _vit()
    held_out = _held_out(model, max_images)
    finetune(model, _training(model), steps=steps, opt="nadamw", lr=1e-3, min_lr=1e-5, label_smoothing=0.1)
    trained = evaluate(model, held_out)

    # Calibration needs no labels, and sees training images only.
    stats = calibrate(model, loader("digits", model, split="train", batch_size=_BATCH, max_images=max_images))
    pruned = copy.deepcopy(model)
    report = prune(pruned, plan(pruned, stats, method="project", target=Target(macs=_TARGET)))
    if report.macs[1] > _TARGET * report.macs[0]:
        raise Error(f"demo: expected at most {_TARGET:.0%} of the MACs, got {report.macs[1] / report.macs[0]:.1%}")
    after_cut = evaluate(pruned, held_out)

    teacher = copy.deepcopy(model)
    for student in (model, pruned):
        finetune(
            student,
            _training(student),
            teacher=teacher,
            steps=finetune_steps,
            opt="nadamw",
            lr=5e-4,
            min_lr=1e-5,
            alpha=0.7,
            temperature=2.0,
            seed=1,
        )
    finetuned = evaluate(model, held_out), evaluate(pruned, held_out)
    benchmark = bench(pruned, model, batch_size=_BATCH, repeats=repeats)

    save(pruned, file)
    reloaded = _reload(file, logits_digest(pruned, held_out), max_images)
    return Demo(
        params=report.params,
        macs=(inspect(model).macs, inspect(pruned).macs),
        steps=steps,
        finetune_steps=finetune_steps,
        trained=trained,
        pruned=after_cut,
        finetuned=finetuned,
        reloaded=reloaded,
        benchmark=benchmark,
        file=file,
        file_bytes=file.stat().st_size,
        seconds=time.perf_counter() - start,
    )


def _vit() -> nn.Module:
    """Build a ViT of width 192, 6 blocks and 3 heads for 32 x 32 images in patches of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=4,
            depth=6,
            num_classes=10,
            class_token=False,
            global_pool="avg",
        )
        # A patch is one pixel of a digit, so all is in the positions; at timm's 0.02 they take minutes to show.
        nn.init.trunc_normal_(model.get_parameter("pos_embed"), std=0.5, a=-2, b=2)
    return model


def _training(model: nn.Module) -> ImageLoader:
    return loader("digits", model, split="train", batch_size=_BATCH, train=True, shuffle=True)


def _held_out(model: nn.Module, max_images: int | None) -> ImageLoader:
    return loader("digits", model, split="test", batch_size=_BATCH, max_images=max_images)


@torch.inference_mode()
def logits_digest(model: nn.Module, images: ImageLoader) -> str:
    """SHA-256 of a model's logits over a loader, in evaluation mode."""
    model.eval()
    return digest(torch.cat([model(batch) for batch, _ in images]))


def _reload(file: Path, expected: str, max_images: int | None) -> Evaluation:
    """Load the file in a new process and evaluate it there."""
    code = "import json, sys; from secateur.cli.digits import report_file; report_file(*map(json.loads, sys.argv[1:]))"
    # The number of threads may decide the order of a sum.
    arguments = (str(file), torch.get_num_threads(), max_images)
    command = [sys.executable, "-c", code, *map(json.dumps, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Error(f"demo: expected the saved file to load in a new process, got {reason}")
    found = json.loads(done.stdout)
    if found["digest"] != expected:
        raise Error("demo: expected the reloaded model to give the same logits to the bit, got others")
    return Evaluation(**found["evaluation"])


def report_file(file: str, threads: int, max_images: int | None) -> None:
    """Print what the demo compares of a saved model, as JSON: the far side of the demo's new process."""
    torch.set_num_threads(threads)
    model = load(file)
    held_out = _held_out(model, max_images)
    found = {"digest": logits_digest(model, held_out), "evaluation": asdict(evaluate(model, held_out))}
    sys.stdout.write(json.dumps(found))
