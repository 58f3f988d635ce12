"""Kill calibrate, finetune, gates, search, prune_sequential and save at random points, and start them again.

    python kill_points.py FOLDER POINTS SEED

One process imports everything and forks the runs. Prints one JSON object: by job, the kills that hit a run at work, the
kills that came after its end, and the kills that left a file to go on from. Any difference is an AssertionError.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import secateur as sc
import torch
from finetuning import batches, quiet, tiny, weights
from safetensors.torch import load_file, save_file
from searching import TUNING, tuned
from secateur.data.loader import loader
from secateur.files import container


def calibrate(folder: Path) -> None:
    model = quiet(num_classes=10)
    images = loader("digits", model, batch_size=4, max_images=93)
    arguments = {"token_fraction": 0.5, "sensitivity": True, "head_gradients": True}
    stats = sc.calibrate(model, images, resume=folder / "file", checkpoint_every=2, **arguments)
    stats.save(folder / "result")


def same_statistics(found: Path, expected: Path) -> None:
    """Within 1e-12 of the largest element of each sum."""
    mine, theirs = sc.Statistics.load(found), sc.Statistics.load(expected)
    assert mine.settings == theirs.settings
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, array in theirs.tensors.items():
        assert np.abs(mine.tensors[name] - array).max() <= 1e-12 * np.abs(array).max(), name


def finetune(folder: Path) -> None:
    model = tiny()
    options = {"mixup": 0.4, "ema": 0.9, "epochs": 4}
    found = sc.finetune(model, batches(6), resume=folder / "file", checkpoint_every=1, **options)
    save_file({**weights(model), "steps": torch.tensor(found.steps)}, folder / "result")


def gates(folder: Path) -> None:
    model, method = tiny(), sc.trained_method("gates", ratios={"qk": 0.5, "v": 0.25, "ffn": 0.5})
    sc.finetune(model, batches(6), resume=folder / "file", checkpoint_every=1, ema=0.9, epochs=4, hooks=[method])
    plan = method.plan()
    keep = {name: torch.from_numpy(indices) for name, indices in plan.keep.items()}
    save_file(
        {**weights(model), **keep, **{f"plan.{name}": each for name, each in plan.weights.items()}}, folder / "result"
    )


def search(folder: Path) -> None:
    found = tuned(3, batches(), {**TUNING, "checkpoint_every": 2}, resume=folder / "file")
    history = json.dumps([str(row) for row in found.history]).encode()
    digest = torch.frombuffer(bytearray(hashlib.sha256(history).digest()), dtype=torch.uint8)
    save_file({**weights(found.model), "history": digest}, folder / "result")


def sequential(folder: Path) -> None:
    model = quiet(num_classes=10)
    images = loader("digits", model, batch_size=4, max_images=93)
    ratios = {"qk": 0.5, "v": 0.25, "ffn": 0.5}
    sc.prune_sequential(model, images, ratios=ratios, resume=folder / "file")
    save_file(weights(model), folder / "result")


def same_tensors(found: Path, expected: Path) -> None:
    mine, theirs = load_file(found), load_file(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def save(folder: Path) -> None:
    """One model over the other, again and again; the last is always the same."""
    models = [quiet(num_classes=classes, embed_dim=96) for classes in (3, 5)]
    for number in range(20):
        sc.save(models[number % 2], folder / "file")
    shutil.copy(folder / "file", folder / "result")


def same_bytes(found: Path, expected: Path) -> None:
    assert found.read_bytes() == expected.read_bytes()


# What runs, how its results compare, and what kind of file it leaves meanwhile.
JOBS: dict[str, tuple[Callable[[Path], None], Callable[[Path, Path], None], str]] = {
    "calibrate": (calibrate, same_statistics, "statistics"),
    "finetune": (finetune, same_tensors, "fine-tuning"),
    "gates": (gates, same_tensors, "fine-tuning"),
    "search": (search, same_tensors, "search"),
    "sequential": (sequential, same_tensors, "sequential"),
    "save": (save, same_bytes, "model"),
}


def start(job: Callable[[Path], None], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job(folder)
        code = 0
    finally:
        os._exit(code)


def killed(job: Callable[[Path], None], folder: Path, seconds: float) -> bool:
    """Run for so long; was it still at work?"""
    child = start(job, folder)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(min(0.001, max(0.0, end - time.monotonic())))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def whole(job: Callable[[Path], None], folder: Path) -> float:
    begin = time.monotonic()
    child = start(job, folder)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return time.monotonic() - begin


def main() -> None:
    root, points, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    torch.set_num_threads(1)
    loader("digits", quiet(num_classes=10))  # scikit-learn is slow to import
    found = {}
    for name, (job, same, kind) in JOBS.items():
        expected = root / f"{name}.whole"
        expected.mkdir()
        took = whole(job, expected)
        hit = late = left = 0
        while hit < points:
            folder = root / f"{name}.{hit}.{late}"
            folder.mkdir()
            # Some runs are killed more than once.
            for _ in range(chance.choice((1, 1, 2))):
                if hit == points or not killed(job, folder, chance.uniform(0.02, 1) * took):
                    late += hit < points
                    break
                hit += 1
                # Under its name a file is whole, with all its checksums, or it is not there.
                if (folder / "file").exists():
                    container.read(folder / "file", kind)
                    left += 1
            whole(job, folder)
            same(folder / "result", expected / "result")
            shutil.rmtree(folder)
        found[name] = {"killed": hit, "came_late": late, "left_a_file": left}
    sys.stdout.write(json.dumps({"seed": seed, **found}) + "\n")


if __name__ == "__main__":
    main()
