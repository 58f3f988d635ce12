"""A run that was broken off ends with the bits of one that was not, and takes up no other run's checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetuning import Breaking, Killed, batches, same, tiny, weights
from launch import run_script
from secateur.data.loader import loader
from secateur.errors import InvalidArgument
from secateur.training.finetune import FinetuneResult, finetune
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def image_source(kind: str) -> object:
    if kind == "list":
        return batches()
    if kind == "torch":
        images, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
        return DataLoader(TensorDataset(images, targets), batch_size=4, shuffle=True)
    return loader("digits", tiny(num_classes=10), train=True, shuffle=True, batch_size=4, max_images=20)


@pytest.mark.parametrize("kind", ["list", "torch", "secateur"])
@pytest.mark.parametrize(("every", "after"), [(3, 3), (3, 7), (5, 9), (5, 5), (2, 13)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, kind: str, every: int, after: int) -> None:
    def train(source: object, **arguments: object) -> tuple[dict[str, Tensor], FinetuneResult]:
        model = tiny(num_classes=10)
        result = finetune(model, source, teacher=tiny(num_classes=10), steps=14, seed=4, **arguments)
        return weights(model), result

    expected, whole = train(image_source(kind))
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train(Breaking(image_source(kind), after), resume=path, checkpoint_every=every)
    torch.rand(3)
    found, resumed = train(image_source(kind), resume=path, checkpoint_every=every)
    assert same(found, expected)
    assert resumed.history == whole.history
    assert resumed.resumed == after // every * every
    assert [entry["step"] for entry in whole.history] == [5, 10, 14]
    # Once more is no more training.
    again, done = train(Breaking(image_source(kind), 0), resume=path)
    assert same(again, expected)
    assert (done.resumed, done.history) == (14, whole.history)


@pytest.mark.parametrize("opt", ["sgd", "adamw", "muon", "lion", "adafactor"])
def test_resuming_holds_for_optimizers_of_every_kind(tmp_path: Path, opt: str) -> None:
    expected, model = tiny(), tiny()
    finetune(expected, batches(), epochs=2, opt=opt, lr=1e-3)
    path = tmp_path / "run.safetensors"
    arguments = {"epochs": 2, "opt": opt, "lr": 1e-3, "resume": path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        finetune(model, Breaking(batches(), 7), **arguments)
    model = tiny()
    assert finetune(model, batches(), **arguments).resumed == 6
    assert same(weights(model), weights(expected))


def test_buffers_are_in_the_checkpoint(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))

    expected, model = build(), build()
    finetune(expected, batches(), epochs=2)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        finetune(model, Breaking(batches(), 7), epochs=2, resume=path, checkpoint_every=4)
    model = build()
    finetune(model, batches(), epochs=2, resume=path)
    assert same(weights(model), weights(expected))
    assert int(model[1].num_batches_tracked) == 10


SCRIPT = """
import os, signal
import torch
torch.set_num_threads(1)  # as the tests' own process
from finetuning import tiny, batches
from secateur.training.finetune import finetune

class Kill(list):
    seen = 0
    def __iter__(self):
        for batch in list.__iter__(self):
            if Kill.seen == 14:
                os.kill(os.getpid(), signal.SIGKILL)
            Kill.seen += 1
            yield batch

finetune(tiny(), Kill(batches(size=5)), epochs=4, resume={path!r}, checkpoint_every=4, **{options!r})
"""


def test_a_killed_process_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    options = {"mixup": 0.4, "cutmix": 1.0, "ema": 0.9, "label_smoothing": 0.1}
    code = SCRIPT.format(path=str(path), options=options)
    ended, _, errors = run_script(code)
    assert ended == -signal.SIGKILL, errors
    assert [item.name for item in tmp_path.iterdir()] == ["run.safetensors"]
    expected, model = tiny(), tiny()
    whole = finetune(expected, batches(size=5), epochs=4, **options)
    found = finetune(model, batches(size=5), epochs=4, resume=path, **options)
    assert (found.resumed, found.history) == (12, whole.history)  # in the middle of a pass
    assert same(weights(model), weights(expected))


def interrupted(path: Path) -> Path:
    with pytest.raises(Killed):
        finetune(tiny(), Breaking(batches(), 3), resume=path, checkpoint_every=2)
    return path


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"lr": 1e-3}, r"got one with lr=0.0005 where it is 0.001 now"),
        ({"seed": 1}, r"got one with seed=0 where it is 1 now"),
        ({"steps": 9}, r"got one with steps=5 where it is 9 now"),
        ({"opt": "lion"}, r"got one with opt='adamw' where it is 'lion' now"),
        ({"mixup": 0.2}, r"got one with mixup=0.0 where it is 0.2 now"),
        ({"cutmix": 1}, r"got one with cutmix=0.0 where it is 1.0 now"),
        ({"ema": 0.9}, r"got one with ema=None where it is 0.9 now"),
        ({"amp": "bfloat16"}, r"got one with amp=None where it is 'bfloat16' now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, arguments: dict[str, object], text: str) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    model = tiny()
    before = weights(model)
    with pytest.raises(InvalidArgument, match=f"^resume: expected a checkpoint of this run, {text}$"):
        finetune(model, batches(), resume=path, **arguments)
    assert same(weights(model), before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    with pytest.raises(
        InvalidArgument, match=r"^resume: expected a checkpoint of this model, got blocks.1.attn.proj.bias"
    ):
        finetune(tiny(depth=1), batches(), resume=path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    whole = path.read_bytes()
    model = tiny()
    before = weights(model)
    for damaged in (whole[:-100], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b"no file of ours"):
        path.write_bytes(damaged)
        with pytest.raises(InvalidArgument):
            finetune(model, batches(), resume=path)
    assert same(weights(model), before)


def nudged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] += 1e-6
    return model


def pairs(count: int = 20, batch_size: int = 4) -> object:
    images, targets = (torch.cat(parts)[:count] for parts in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


@pytest.mark.parametrize(
    ("model", "teacher", "source", "text"),
    [
        (lambda: nudged(tiny()), tiny, pairs, "that began with this model, got one whose model had other weights"),
        (tiny, lambda: nudged(tiny()), pairs, "that began with this teacher, got one whose teacher had other weights"),
        (tiny, tiny, lambda: pairs(batch_size=2), "of this loader, got one with batches=5 where it is 10 now"),
        (tiny, tiny, lambda: pairs(12), "of this loader, got one with batches=5 where it is 3 now"),
        (tiny, tiny, lambda: pairs(18), "of this loader, got one with images=20 where it is 18 now"),
        (tiny, tiny, lambda: pairs(5, 1), "of this loader, got one with batch_size=4 where it is 1 now"),
    ],
)
def test_a_checkpoint_that_began_otherwise_is_refused(
    tmp_path: Path,
    model: Callable[[], nn.Module],
    teacher: Callable[[], nn.Module],
    source: Callable[[], object],
    text: str,
) -> None:
    path = tmp_path / "run.safetensors"
    finetune(tiny(), pairs(), teacher=tiny(), steps=4, resume=path)
    assert finetune(tiny(), pairs(), teacher=tiny(), steps=4, resume=path).resumed == 4
    student = model()
    before = weights(student)
    with pytest.raises(InvalidArgument, match=f"^resume: expected a checkpoint {text}$"):
        finetune(student, source(), teacher=teacher(), steps=4, resume=path)
    assert same(weights(student), before)


def test_a_checkpoint_of_other_frozen_parameters_is_refused(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "run.safetensors")
    model = tiny()
    model.patch_embed.requires_grad_(False)
    before = weights(model)
    with pytest.raises(InvalidArgument, match=r"^resume: expected a checkpoint of the parameters that require"):
        finetune(model, batches(), resume=path)
    assert same(weights(model), before)
