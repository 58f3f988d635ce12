"""`finetune` on two processes, as torchrun starts them: gloo on the CPU, nccl on GPUs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning import quiet, tiny
from launch import on_ranks
from safetensors.torch import load_file
from secateur.data.batches import Stream
from secateur.data.loader import ImageLoader, loader
from secateur.errors import InvalidArgument, Unsupported
from secateur.training.finetune import finetune
from torch import Tensor

HEAD = """
import json, os, signal, sys, time
import torch
from torch import distributed
from safetensors.torch import save_file
from finetuning import Breaking, Killed, batches, quiet, tiny, weights
from secateur.data import loader
from secateur.training.finetune import finetune

RANK, OUT = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)

def digits(model, **arguments):
    return loader("digits", model, train=True, shuffle=True, **arguments)

def keep(model, result, name="end"):
    save_file(weights(model), f"{OUT}/{name}{RANK}.safetensors")
    with open(f"{OUT}/{name}{RANK}.json", "w") as file:
        json.dump([result.history, result.resumed], file)
"""


def kept(folder: Path, name: str = "end") -> tuple[list[dict[str, Tensor]], list[object]]:
    weights = [load_file(folder / f"{name}{rank}.safetensors") for rank in range(2)]
    return weights, [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(2)]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


EQUAL = """
model = quiet(num_classes=10)
with torch.no_grad():
    model.head.weight += RANK  # rank 0's weights count
images = digits(model, batch_size=4, max_images=29)
# The first takes 29 as 8 + 8 + 8 + 5; the validation loader is the first rank's alone.
validation = digits(model, batch_size=8, max_images=16) if RANK == 0 else None
result = finetune(model, images, epochs=2, ema=0.5, opt="momentum", lr=0.05, val_loader=validation)
keep(model, result)
assert not distributed.is_initialized()
assert images.images == 29 and len(images) == 8
# What is left of the wrapper would wait for the other rank here.
if RANK == 0:
    model(torch.zeros(1, 3, 8, 8)).sum().backward()

# A group of the caller's is used and left.
distributed.init_process_group("gloo")
model = quiet()
keep(model, finetune(model, batches(seed=RANK)), "theirs")
assert distributed.get_world_size() == 2
distributed.destroy_process_group()
"""


def test_two_ranks_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    for code, text in on_ranks(HEAD + EQUAL, tmp_path):
        assert code == 0, text
    model = quiet(num_classes=10)

    def digits(**arguments: int) -> object:
        return loader("digits", model, train=True, shuffle=True, **arguments)

    expected = finetune(
        model,
        digits(batch_size=8, max_images=29),
        epochs=2,
        ema=0.5,
        opt="momentum",
        lr=0.05,
        val_loader=digits(batch_size=8, max_images=16),
    )
    (first, second), results = kept(tmp_path)
    assert_same(first, second)
    assert results[0] == results[1]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
    history = results[0][0]
    assert [entry["images"] for entry in history] == [29, 29]
    for found, wanted in zip(history, expected.history, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    weights, results = kept(tmp_path, "theirs")
    assert_same(*weights)
    assert results[0][0][0]["images"] == 40


NCCL = """
os.environ |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{OUT}/nccl{RANK}.log"}
device = "cuda" if torch.cuda.device_count() > 1 else "cuda:0"
for name, options in (("end", {}), ("half", {"amp": "bfloat16"})):
    model = quiet(num_classes=10)
    with torch.no_grad():
        model.head.weight += RANK  # rank 0's weights count
    images = digits(model, batch_size=4, max_images=29)
    more = dict(epochs=2, ema=0.5, opt="momentum", lr=0.05, teacher=quiet(num_classes=10).to(device), device=device)
    keep(model, finetune(model, images, **options, **more), name)
assert not distributed.is_initialized()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_ranks_over_nccl_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Where there is one GPU both share it, which nccl 2.30 allows and older ones refuse."""
    outcomes = on_ranks(HEAD + NCCL, tmp_path)
    if any("Duplicate GPU detected" in text for _, text in outcomes):
        pytest.skip("this nccl wants a GPU for every rank")
    for code, text in outcomes:
        assert code == 0, text
    for rank in range(2):
        assert "Init COMPLETE" in (tmp_path / f"nccl{rank}.log").read_text()
    for name, amp, tolerance in (("end", None, 1e-4), ("half", "bfloat16", 1e-2)):
        model = quiet(num_classes=10)
        images = loader("digits", model, train=True, shuffle=True, batch_size=8, max_images=29)
        more = {"epochs": 2, "ema": 0.5, "opt": "momentum", "lr": 0.05, "amp": amp, "device": "cuda:0"}
        expected = finetune(model, images, teacher=quiet(num_classes=10).cuda(), **more)
        (first, second), results = kept(tmp_path, name)
        assert_same(first, second)
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(first[key], tensor.cpu(), rtol=tolerance, atol=tolerance / 10)
        for found, wanted in zip(results[0][0], expected.history, strict=True):
            assert found == pytest.approx(wanted, rel=tolerance)


RESUMED = """
def train(name, source=None, **more):
    model = tiny(num_classes=10)
    source = source or digits(model, batch_size=4, max_images=29)
    options = dict(mixup=0.5, cutmix=0.5, ema=0.8, teacher=tiny(num_classes=10), epochs=3)
    keep(model, finetune(model, source, **options, **more), name)

class Slow:
    '''The second rank breaks off in the middle of a pass.'''
    def __init__(self, source):
        self.source = source
    def __getattr__(self, name):
        return getattr(self.source, name)
    def __len__(self):
        return len(self.source)
    def __iter__(self):
        for index, batch in enumerate(self.source):
            if index == 3 and self.epoch == 1 and RANK == 1:
                raise Killed("enough")
            yield batch
    def set_epoch(self, epoch, start=0):
        self.epoch = epoch
        self.source.set_epoch(epoch, start)

train("whole")
path = f"{OUT}/run.safetensors"
model = tiny(num_classes=10)
try:
    train("broken", Slow(digits(model, batch_size=4, max_images=29).sharded(RANK, 2)), resume=path, checkpoint_every=3)
except Exception as error:
    assert ("rank 1: Killed: enough" if RANK == 0 else "enough") in str(error), error
else:
    raise SystemExit("not broken")
train("resumed", resume=path)
"""


def test_a_run_of_two_ranks_resumes_to_the_bit(tmp_path: Path) -> None:
    for code, text in on_ranks(HEAD + RESUMED, tmp_path):
        assert code == 0, text
    # Once both have ended: one rank may be done while the other still writes.
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    whole, whole_results = kept(tmp_path, "whole")
    resumed, results = kept(tmp_path, "resumed")
    assert [result[1] for result in results] == [6, 6]
    for rank in range(2):
        assert_same(resumed[rank], whole[rank])
        assert results[rank][0] == whole_results[rank][0]
    # One process would draw other random numbers.
    with pytest.raises(InvalidArgument, match=r"^resume: expected .* got one with ranks=2 where it is 1 now$"):
        finetune(
            tiny(num_classes=10),
            loader("digits", tiny(num_classes=10), batch_size=8, max_images=32),
            teacher=tiny(num_classes=10),
            mixup=0.5,
            cutmix=0.5,
            ema=0.8,
            epochs=3,
            resume=tmp_path / "run.safetensors",
        )


FAILING = """
from secateur.errors import InvalidArgument, NumericalError

def attempt(data, **others):
    try:
        finetune(quiet(), data, **others)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    else:
        print("nothing was raised", file=sys.stderr)
    assert not distributed.is_initialized()

data = batches(4, seed=RANK)
data[2][0][0, 0, 0, 0] = float("nan") if RANK else 0.0
attempt(data)
data = batches(4, seed=RANK)
attempt([data[0], data[1] if RANK else (data[1][0], data[1][1] + 9)])
attempt(data[: 4 - RANK], steps=4)
attempt(data, lr=-1.0 if RANK else 1.0)
attempt(data, mixup=0.1 * RANK)
attempt(data, val_loader=[1])
attempt(data, resume=f"{OUT}/run" if RANK else f"{OUT}/none/run")
"""

FAILURES = [
    (
        "NumericalError: loss: expected a finite value, got nan in step 3; the weights are those after step 2",
        "NumericalError: loss: expected a finite value, got nan in step 3; the weights are those after step 2",
    ),
    (
        "InvalidArgument: loader: expected class indices from 0 to 2, got 11",
        "InvalidArgument: rank 0: loader: expected class indices from 0 to 2, got 11",
    ),
    (
        "InvalidArgument: loader: expected as many batches on every rank, got 3 in pass 0 on 1 of 2 ranks and more on",
        "InvalidArgument: loader: expected as many batches on every rank, got 3 in pass 0 on 1 of 2 ranks and more on",
    ),
    (
        "InvalidArgument: rank 1: lr: expected a number of more than 0, got -1.0",
        "InvalidArgument: lr: expected a number of more than 0, got -1.0",
    ),
    (
        "InvalidArgument: mixup: expected the same on every rank, got 0.0 on rank 0 and 0.1 on rank 1",
        "InvalidArgument: mixup: expected the same on every rank, got 0.0 on rank 0 and 0.1 on rank 1",
    ),
    (
        "InvalidArgument: loader: expected batches of images (B, C, H, W) or (images, targets), got int",
        "InvalidArgument: rank 0: loader: expected batches of images (B, C, H, W) or (images, targets), got int",
    ),
    (
        "InvalidArgument: resume: expected a file in an existing folder, got ",
        "InvalidArgument: rank 0: resume: expected a file in an existing folder, got ",
    ),
]


def test_what_fails_on_one_rank_ends_the_run_on_both(tmp_path: Path) -> None:
    done = on_ranks(HEAD + FAILING, tmp_path)
    assert [code for code, _ in done] == [0, 0], done
    for rank, (_, text) in enumerate(done):
        lines = text.splitlines()
        assert len(lines) == len(FAILURES), text
        for line, expected in zip(lines, FAILURES, strict=True):
            assert line.startswith(expected[rank]), text


DYING = """
class Dying(list):
    def __iter__(self):
        for index, batch in enumerate(list.__iter__(self)):
            if index == 2 and RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch
finetune(quiet(), Dying(batches()))
"""


def test_a_rank_that_is_killed_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    (code, text), (killed, _) = on_ranks(HEAD + DYING, tmp_path)  # gloo itself waits for half an hour
    assert killed == -signal.SIGKILL
    assert code == 1, text
    assert "RuntimeError" in text or "DistBackendError" in text, text


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "tuned.safetensors"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "secateur", "finetune", "--model", "vit_tiny_patch16_224", "--no-pretrained", "--num-classes", "10"),
        *("--model-kwargs", '{"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}'),
        *("--data", "digits", "--max-images", "30", "--batch-size", "5", "--threads", "1", "--out", str(out)),
        *("--mixup", "0.2", "--cutmix", "1.0", "--ema", "0.9", "--amp", "bfloat16", "--val-data", "digits", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one object: the second rank says nothing
    assert found["steps"] == 3
    assert found["history"][0]["images"] == 30
    assert "top1" in found["history"][0]
    assert [item.name for item in tmp_path.iterdir()] == ["tuned.safetensors"]


@pytest.mark.parametrize(("images", "ranks"), [(29, 2), (29, 3), (9, 2), (24, 3), (3, 2), (26, 3), (2, 3)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_hold_every_image_once(images: int, ranks: int, shuffle: bool) -> None:
    def read(source: object, epoch: int) -> list[list[tuple[float, ...]]]:
        source.set_epoch(epoch)
        return [[tuple(image.flatten().tolist()) for image in batch] for batch, _ in source]

    whole = loader("digits", tiny(), batch_size=4 * ranks, max_images=images, shuffle=shuffle)
    small = loader("digits", tiny(), batch_size=4, max_images=images, shuffle=shuffle)
    for epoch in range(2):
        shards = [small.sharded(rank, ranks) for rank in range(ranks)]
        found = [read(shard, epoch) for shard in shards]
        expected = read(whole, epoch)
        if images % (4 * ranks) in range(1, ranks):  # a rank would have had none of the last
            expected = expected[:-1]
        assert {len(batches) for batches in found} == {len(expected)} == {len(shard) for shard in shards}
        assert [sum(map(len, batches)) for batches in found] == [shard.images for shard in shards]
        for parts, batch in zip(zip(*found, strict=True), expected, strict=True):
            assert sorted(image for part in parts for image in part) == sorted(batch)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        if expected:
            shards[0].set_epoch(epoch, 1)
            assert len(list(shards[0])) == len(expected) - 1


def test_shards_that_cannot_be() -> None:
    source = loader("digits", tiny(), batch_size=4)
    with pytest.raises(InvalidArgument, match=r"^rank: expected less than the 2 ranks, got 2$"):
        source.sharded(2, 2)
    with pytest.raises(Unsupported, match=r"^loader: expected a data set that can be shared out, got the stream some$"):
        ImageLoader(object.__new__(Stream), None, 4, "some").sharded(0, 2)
