"""calibrate, plan, prune, save and load, again and again: what grows?

    python rounds_of_work.py FOLDER ROUNDS

Prints one JSON object: seconds, and after a tenth of the rounds and at the end the resident memory (bytes), the open
files, the threads and the live Python objects.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import secateur as sc
import torch
from finetuning import batches, quiet


def one(folder: Path, number: int) -> None:
    model = quiet()
    images = [batch.clamp(-1, 1) for batch, _ in batches(2, seed=number)]
    stats = sc.calibrate(model, images, resume=folder / "run", checkpoint_every=1)
    (folder / "run").unlink()
    stats.save(folder / "stats")
    method = ("snp", "refit", "project")[number % 3]
    plan = sc.plan(
        model, sc.Statistics.load(folder / "stats"), ratios={"qk": 0.5, "v": 0.25, "ffn": 0.5}, method=method
    )
    plan.save(folder / "plan.json")
    sc.prune(model, sc.Plan.load(folder / "plan.json"))
    sc.save(model, folder / "model")
    again = sc.load(folder / "model")
    with torch.inference_mode():
        assert torch.equal(again(images[0]), model(images[0]))


def held() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "objects": len(gc.get_objects()),
    }


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    begin = time.monotonic()
    early = {}
    for number in range(rounds):
        one(folder, number)
        if number + 1 == max(rounds // 10, 12):
            early = held()
    found = {"rounds": rounds, "seconds": round(time.monotonic() - begin, 1), "early": early, "late": held()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
