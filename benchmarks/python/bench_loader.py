"""Does calibration wait for its images? JPEGs in a folder, decoded by worker processes while the model computes.

make bench, or pytest --benchmark-enable benchmarks/python/bench_loader.py
On a machine whose cores the model fills, decoding costs what it costs, in whatever process; what workers can do is to
have every batch ready when the model asks for it. Both are shown: the time, and the share of it spent waiting.
"""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from PIL import Image
from secateur.data.loader import loader

BATCH = 32
RUNS = 3


@cache
def network():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224").eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that gives a folder of JPEGs of some size: shapes with noise on them, as heavy as photographs."""

    @cache
    def make(size, count):
        root = tmp_path_factory.mktemp("images")
        generator = np.random.default_rng(0)
        for index in range(count):
            shapes = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
                size, Image.BICUBIC
            )
            pixels = np.asarray(shapes) + generator.normal(0, 12, (size[1], size[0], 3)).astype(np.float32)
            path = root / f"class{index % 8}" / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        return root

    return make


class Waiting:
    """Batches of a loader, and the seconds that its reader has waited for them."""

    def __init__(self, batches):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self):
        batches = iter(self.batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


@pytest.mark.parametrize(
    ("size", "count", "threads", "workers"),
    [
        ((500, 375), 512, 2, 1),
        ((500, 375), 192, 2, 0),
        ((500, 375), 192, 1, 1),
        ((2000, 1500), 96, 1, 1),
    ],
)
def test_calibrate_from_a_folder(folder, paired, size, count, threads, workers):
    torch.set_num_threads(threads)
    root, model = folder(size, count), network()
    batches = list(loader(root, model, batch_size=BATCH))
    assert sum(len(images) for images, _ in batches) == count
    measured = []

    def measure():
        def seconds(run):
            start = time.perf_counter()
            result = run()
            return time.perf_counter() - start, result

        # A new loader each time: the start of its workers is part of the time.
        loading, _ = seconds(
            lambda: [len(images) for images, _ in loader(root, model, batch_size=BATCH, workers=workers)]
        )
        computing, expected = seconds(lambda: sc.calibrate(model, batches, collect="scores"))
        waiting = Waiting(loader(root, model, batch_size=BATCH, workers=workers))
        both, stats = seconds(lambda: sc.calibrate(model, waiting, collect="scores"))
        assert stats.images == count
        assert all(np.array_equal(array, stats.tensors[name]) for name, array in expected.tensors.items())
        measured.append([1e3 / count * t for t in (both, computing, loading, waiting.seconds)])

    paired.benchmark.pedantic(measure, rounds=RUNS, warmup_rounds=0)
    both, computing, loading, waiting = zip(*measured, strict=True)
    case = f"calibrate from JPEGs {size[0]}×{size[1]}, threads {threads}, workers {workers}"
    unit = "ms/image"
    paired.record(f"{case} ÷ from memory", both, computing, unit)
    paired.record("  ÷ the slower of decoding and model", both, list(map(max, computing, loading)), unit)
    paired.record("  ÷ decoding + model", both, [a + b for a, b in zip(computing, loading, strict=True)], unit)
    paired.record("  of it waiting for images ÷ all", waiting, both, unit)
