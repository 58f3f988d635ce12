"""`calibrate` on several processes, as torchrun starts them: the sums of one, and an end when a rank fails."""

from __future__ import annotations

import json
import time
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import torch
from finetuning import quiet
from launch import on_ranks, start_ranks
from secateur.data.loader import loader
from sums import assert_close

HEAD = """
import os, signal, sys, time
import torch
from torch import distributed
import secateur as sc
from finetuning import quiet
from secateur.data import ImageLoader, loader

RANK, OUT = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)

class Watched(ImageLoader):
    '''Calls `before` with the number of every batch of this rank.'''
    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            before(index)
            yield batch
    def sharded(self, *share, **how):
        found = super().sharded(*share, **how)
        found.__class__ = Watched
        return found

def digits(model, **arguments):
    found = loader("digits", model, **arguments)
    found.__class__ = Watched
    return found

def before(index):
    pass
"""

# What is calibrated: images in the loader, in a batch, asked for.
CASES = [(29, 4, None), (40, 4, 27), (5, 4, 1024), (1, 4, 8), (70, 9, None)]
OPTIONS = {"token_fraction": 0.5, "sensitivity": True, "head_gradients": True, "gradients": True}
SIZES = [(0, 3, 1, 4), (2, 5), (1, 1, 1, 2)]

EQUAL = f"""
for index, (count, batch_size, limit) in enumerate({CASES}):
    model = quiet(num_classes=10)
    images = digits(model, batch_size=batch_size, max_images=count, shuffle=True)
    stats = sc.calibrate(model, images, max_images=limit, **{OPTIONS})
    stats.save(f"{{OUT}}/{{index}}.{{RANK}}")
    assert not distributed.is_initialized()
    assert images.images == count
own = torch.rand(5, 10, 3, 8, 8, generator=torch.Generator().manual_seed(1))[RANK] * 2 - 1
batches = own[: sum({SIZES}[RANK])].split({SIZES}[RANK])
sc.calibrate(quiet().double(), batches, max_images=19, **{OPTIONS}).save(f"{{OUT}}/own.{{RANK}}")
# A group of the caller's is used and left.
distributed.init_process_group("gloo")
sc.calibrate(quiet().double(), batches, max_images=19).save(f"{{OUT}}/theirs.{{RANK}}")
assert distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
distributed.destroy_process_group()
"""

GPUS = f"""
gpu = RANK % torch.cuda.device_count()
for index, (count, batch_size, limit) in enumerate({CASES}):
    model = quiet(num_classes=10).cuda(gpu)
    images = digits(model, batch_size=batch_size, max_images=count, shuffle=True)
    sc.calibrate(model, images, max_images=limit, **{OPTIONS}).save(f"{{OUT}}/{{index}}.{{RANK}}")
"""


def digits_on_one(count: int, batch_size: int, limit: int | None, device: str = "cpu") -> sc.Statistics:
    torch.set_num_threads(1)
    model = quiet(num_classes=10).to(device)
    images = loader("digits", model, batch_size=batch_size, max_images=count, shuffle=True)
    return sc.calibrate(model, images, max_images=limit, **OPTIONS)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.faults)])
def test_several_ranks_have_the_sums_of_one(tmp_path: Path, ranks: int) -> None:
    """In float32, folds, phases of tokens, Grams of single images, sensitivity and gradients included."""
    for code, text in on_ranks(HEAD + EQUAL, tmp_path, ranks):
        assert code == 0, text
    for index, case in enumerate(CASES):
        whole = digits_on_one(*case)
        assert whole.images == min(case[0], case[2] or case[0])
        for rank in range(ranks):
            assert_close(whole, sc.Statistics.load(tmp_path / f"{index}.{rank}"))
    everything = torch.rand(5, 10, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    parts = [everything[rank, : sum(sizes)].split(sizes) for rank, sizes in enumerate(SIZES[:ranks])]
    in_order = [batch for batch in chain(*zip_longest(*parts)) if batch is not None and len(batch) > 0]
    whole = sc.calibrate(quiet().double(), in_order, max_images=19, **OPTIONS)
    for rank in range(ranks):
        assert_close(whole, sc.Statistics.load(tmp_path / f"own.{rank}"))
        assert sc.Statistics.load(tmp_path / f"theirs.{rank}").images == whole.images


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_on_gpus_have_the_sums_of_one(tmp_path: Path) -> None:
    for code, text in on_ranks(HEAD + GPUS, tmp_path):
        assert code == 0, text
    for index, case in enumerate(CASES):
        whole = digits_on_one(*case, device="cuda")
        for rank in range(2):
            assert_close(whole, sc.Statistics.load(tmp_path / f"{index}.{rank}"))


@pytest.mark.parametrize(("images", "ranks"), [(29, 2), (29, 3), (9, 2), (24, 3), (3, 2), (1, 3)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_whole_batches_are_dealt_out(images: int, ranks: int, shuffle: bool) -> None:
    source = loader("digits", quiet(), batch_size=4, max_images=images, shuffle=shuffle)
    source.set_epoch(1)
    expected = [batch for batch, _ in source]
    shares = [source.sharded(rank, ranks, whole_batches=True) for rank in range(ranks)]
    found = [[batch for batch, _ in share] for share in shares]
    assert [len(batches) for batches in found] == [len(share) for share in shares]
    assert [sum(map(len, batches)) for batches in found] == [share.images for share in shares]
    in_order = [batch for batch in chain(*zip_longest(*found)) if batch is not None]
    assert len(in_order) == len(expected)
    assert all(map(torch.equal, in_order, expected))
    shares[0].set_epoch(1, 1)
    assert len(list(shares[0])) == len(found[0]) - 1


FAILING = """
def attempt(model, data, **others):
    try:
        sc.calibrate(model, data, **others)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    else:
        print("nothing was raised", file=sys.stderr)
    assert not distributed.is_initialized()

model = quiet(num_classes=10)
data = digits(model, batch_size=4, max_images=29)
attempt(model, data, gamma=8 + RANK)
attempt(model, data, gamma=0 if RANK else 8)
attempt(model, data, sensitivity=RANK == 0)
attempt(model, data, sensitivity=True, row_weights=RANK == 0)
attempt(model, [torch.zeros(1, 3, 8, 8)], resume=f"{OUT}/run")
attempt(model, [torch.zeros(1, 3, 8, 8 + RANK)])
attempt(model, [])
other = quiet(num_classes=10)
with torch.no_grad():
    other.blocks[1].mlp.fc2.weight[0, 0] += RANK
attempt(other, data)
attempt(quiet(num_classes=10).to(torch.bfloat16 if RANK else torch.float32), data)

def before(index):
    if index == 2 and RANK == 1:
        raise OSError("the disk is gone")
attempt(model, data, resume=f"{OUT}/loader")
def before(index):
    pass

good = torch.rand(4, 3, 8, 8) * 2 - 1
bad = good.clone()
if RANK:
    bad[2, 0, 0, 0] = float("nan")
attempt(model, [good, bad])
attempt(model, [good * 9])
hook = model.blocks[0].register_forward_hook(lambda _m, _a, y: y * float("nan") if RANK else y)
attempt(model, data, resume=f"{OUT}/layer")
hook.remove()
attempt(model, data, resume=f"{OUT}/loader", max_images=10)
attempt(model, data, resume=f"{OUT}/none/run" if RANK else f"{OUT}/run")
attempt(model, digits(model, batch_size=4, max_images=13), resume=f"{OUT}/loader")
"""

FAILURES = [
    ("InvalidArgument: gamma: expected the same on every rank, got 8 on rank 0 and 9 on rank 1",) * 2,
    (
        "InvalidArgument: rank 1: gamma: expected an integer of at least 1, got 0",
        "InvalidArgument: gamma: expected an integer of at least 1, got 0",
    ),
    ("InvalidArgument: sensitivity: expected the same on every rank, got True on rank 0 and False on rank 1",) * 2,
    ("InvalidArgument: row_weights: expected the same on every rank, got True on rank 0 and False on rank 1",) * 2,
    ("Unsupported: resume: expected a loader of data.loader on several ranks, got list",) * 2,
    (
        "InvalidArgument: rank 1: loader: expected images (B, 3, 8, 8), got (1, 3, 8, 9)",
        "InvalidArgument: loader: expected images (B, 3, 8, 8), got (1, 3, 8, 9)",
    ),
    ("InvalidArgument: loader: expected at least one image, got none",) * 2,
    ("InvalidArgument: rank 1: model: expected the same model, got other weights of blocks.1.mlp.fc2.weight",) * 2,
    ("InvalidArgument: rank 1: model: expected the same model, got other weights of blocks.0.attn.proj",) * 2,
    ("Error: rank 1: OSError: the disk is gone", "OSError: the disk is gone"),
    (
        "NumericalError: rank 1: loader: expected finite values, got nan in image 14",
        "NumericalError: loader: expected finite values, got nan in image 14",
    ),
    (
        "UserWarning: calibration images range over",
        "Error: rank 0: UserWarning: calibration images range over",
    ),
    (
        "NumericalError: rank 1: blocks.1.norm1 x: expected finite values, got ",
        "NumericalError: blocks.1.norm1 x: expected finite values, got ",
    ),
    (
        "InvalidArgument: rank 0: resume: expected a file of at most 10 images, got 16",
        "InvalidArgument: rank 0: resume: expected a file of at most 10 images, got 16",
    ),
    (
        "InvalidArgument: rank 1: resume: expected a file in an existing folder, got ",
        "InvalidArgument: resume: expected a file in an existing folder, got ",
    ),
    ("InvalidArgument: resume: expected a loader of at least 16 images, got 3 fewer",) * 2,
]


def test_what_fails_on_one_rank_ends_the_run_on_both(tmp_path: Path) -> None:
    done = on_ranks(HEAD + FAILING, tmp_path)
    assert [code for code, _ in done] == [0, 0], done
    for rank, (_, text) in enumerate(done):
        lines = text.splitlines()
        assert len(lines) == len(FAILURES), text
        for line, expected in zip(lines, FAILURES, strict=True):
            assert line.startswith(expected[rank].replace("rank 0: ", "" if rank == 0 else "rank 0: ")), text
    # What had been collected when the loader failed; nothing of a forward pass that failed.
    assert [item.name for item in tmp_path.iterdir()] == ["loader"]
    kept = sc.Statistics.load(tmp_path / "loader")
    model = quiet(num_classes=10)
    images = loader("digits", model, batch_size=4, max_images=29)
    torch.set_num_threads(1)
    assert_close(sc.calibrate(model, images, max_images=16), kept)
    resumed = sc.calibrate(model, images, resume=tmp_path / "loader")
    assert_close(sc.calibrate(model, images), resumed)


BROKEN = """
def before(index):
    if index == 5 and RANK == 1:
        os.kill(os.getpid(), signal.{signal})
model = quiet(num_classes=10)
sc.calibrate(model, digits(model, batch_size=2, max_images=30), resume=f"{{OUT}}/run", checkpoint_every=2)
"""
RESUMED = """
model = quiet(num_classes=10)
stats = sc.calibrate(model, digits(model, batch_size=2, max_images=30), resume=f"{OUT}/run")
stats.save(f"{OUT}/resumed.{RANK}")
"""


@pytest.mark.parametrize(("name", "seconds"), [("SIGKILL", 0), ("SIGSTOP", 4)])
def test_a_rank_that_dies_or_hangs_ends_the_others_in_time(tmp_path: Path, name: str, seconds: float) -> None:
    """After which any number of ranks goes on from the last checkpoint."""
    running = start_ranks(HEAD + BROKEN.format(signal=name), tmp_path, SECATEUR_RANK_TIMEOUT="4")
    try:
        while not (tmp_path / "run").exists():
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.01)
        begin = time.monotonic()
        text = running[0].communicate(timeout=60)[1]
        took = time.monotonic() - begin
    finally:
        for each in running:
            each.kill()
            each.communicate()
    assert running[0].returncode == 1
    assert "secateur.errors.Error: ranks: expected all 2 to answer within 4 s, got one that died or hangs" in text
    assert seconds <= took < seconds + 25  # the interpreter's end is slow on a busy machine
    assert [item.name for item in tmp_path.iterdir()] == ["run"]
    assert sc.Statistics.load(tmp_path / "run").images == 16
    torch.set_num_threads(1)
    model = quiet(num_classes=10)
    images = loader("digits", model, batch_size=2, max_images=30)
    whole = sc.calibrate(model, images)
    if name == "SIGKILL":
        sc.calibrate(model, images, resume=tmp_path / "run").save(tmp_path / "resumed.2")
    else:
        for code, text in on_ranks(HEAD + RESUMED, tmp_path, 3):
            assert code == 0, text
    for found in ("run", "resumed.2"):
        assert_close(whole, sc.Statistics.load(tmp_path / found))


def test_a_time_out_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for text in ("soon", "0", "-3", "nan"):
        monkeypatch.setenv("SECATEUR_RANK_TIMEOUT", text)
        with pytest.raises(sc.InvalidArgument, match=f"^SECATEUR_RANK_TIMEOUT: expected .* more than 0, got '?{text}"):
            sc.calibrate(quiet(), [torch.zeros(1, 3, 8, 8)])


def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    arguments = [
        *("calibrate", "--model", "vit_tiny_patch16_224", "--no-pretrained", "--num-classes", "10"),
        *("--model-kwargs", '{"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}'),
        *("--data", "digits", "--max-images", "30", "--batch-size", "4", "--threads", "1", "--out", str(out)),
        "--json",
    ]
    running = start_ranks(f"from secateur.cli import main\nraise SystemExit(main({arguments}))", tmp_path)
    (first, _), (second, _) = (each.communicate() for each in running)
    assert [each.returncode for each in running] == [0, 0]
    needed = sc.Statistics.load(out).images_needed()
    # One object: the second says nothing.
    assert (json.loads(first), second) == ({"images": 30, "images_needed": needed, "file": str(out)}, "")
    assert [item.name for item in tmp_path.iterdir()] == ["stats.safetensors"]
    assert np.array_equal(sc.Statistics.load(out).images_by_fold, (15, 15))
