"""Files of every kind that version 0.1.0 wrote, in tests/data: they must load forever. Do not write them anew.

A later format adds files of its own beside these (`python test_versions.py FOLDER` writes them).
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import torch
from finetuning import batches, quiet
from torch import nn

DATA = Path(__file__).parents[2] / "data"
FORMATS = sorted(folder.name for folder in DATA.iterdir() if folder.name[0].isdigit())
OPTIONS = {"steps": 4, "lr": 1e-3, "ema": 0.9}


def images() -> list[torch.Tensor]:
    return [batch.clamp(-1, 1) for batch, _ in batches(2)]


def search(model: nn.Module, stats: sc.Statistics, path: Path, rounds: int) -> sc.SearchResult:
    return sc.search(
        model,
        stats,
        objective=sc.AccuracyCritical(100.0),
        loader=batches(2),
        rounds=rounds,
        step=0.125,
        groups=("ffn",),
        round_to=1,
        finetune={"epochs": 1, "lr": 1e-3, "warmup": 0},
        train_loader=batches(2),
        calibration_loader=images(),
        resume=path,
    )


def write(folder: Path) -> None:
    model = quiet(embed_dim=8, depth=1)
    sc.save(model, folder / "dense.safetensors")
    stats = sc.calibrate(model, images(), sensitivity="noise", head_gradients=True)
    stats.save(folder / "statistics.safetensors")
    search(model, stats, folder / "search.safetensors", 2)
    sc.measure_latency(model, groups=("ffn",), repeats=1).save(folder / "latency.json")
    trained = quiet(embed_dim=8, depth=1)

    class Enough(list):  # type: ignore[type-arg]
        def __iter__(self) -> object:
            yield from list.__iter__(self)
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        sc.finetune(trained, Enough(batches(2)), resume=folder / "finetune.safetensors", checkpoint_every=1, **OPTIONS)
    plan = sc.plan(model, stats, ratios={"qk": 0.5, "v": 0.25, "ffn": 0.5}, method="refit")
    plan.save(folder / "plan.json")
    sc.prune(model, plan)
    sc.save(model, folder / "pruned.safetensors")


@pytest.mark.parametrize("version", FORMATS)
def test_files_of_every_version_load(version: str, tmp_path: Path) -> None:
    assert FORMATS
    folder = DATA / version
    model = sc.load(folder / "dense.safetensors")
    stats = sc.Statistics.load(folder / "statistics.safetensors")
    assert stats.images == 8
    assert sc.Statistics.merge([stats, stats]).images == 16
    assert np.isfinite(sc.plan(model, stats, method="snp", target=sc.Target(macs=0.8), round_to=1).loss).all()
    table = sc.LatencyTable.load(folder / "latency.json")
    assert table.batch_size == 1

    # Not trained further than where they stopped: the files know.
    for name in ("search", "finetune"):
        shutil.copy(folder / f"{name}.safetensors", tmp_path)
    found = search(model, stats, tmp_path / "search.safetensors", 3)
    assert (found.resumed, len(found.history)) == (2, 4)
    trained = sc.load(folder / "dense.safetensors")
    assert sc.finetune(trained, batches(2), resume=tmp_path / "finetune.safetensors", **OPTIONS).resumed == 2

    sc.prune(model, sc.Plan.load(folder / "plan.json"))
    pruned = sc.load(folder / "pruned.safetensors")
    assert model.state_dict().keys() == pruned.state_dict().keys()
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert pruned(images()[0]).shape == (4, 3)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
