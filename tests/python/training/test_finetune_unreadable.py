"""`finetune` over images that cannot be read: left out, counted and named, and nothing else is otherwise."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import secateur as sc
import torch
from finetuning import Killed, quiet, same, tiny, weights
from launch import on_ranks
from PIL import Image
from safetensors.torch import load_file
from secateur.data.loader import ImageLoader, loader
from secateur.errors import InvalidArgument
from secateur.training.finetune import FinetuneResult, finetune
from secateur.training.loop import Run
from torch import Tensor

NOTICE = "ignore:left out an image:UserWarning"


def write_images(root: Path, broken: Iterable[int], count: int = 22) -> Path:
    """Noise in three classes, numbered in the loader's order; the broken ones are no images."""
    noise = np.random.default_rng(5)
    for number in range(count):
        file = root / "abc"[number * 3 // count] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(file)
        if number in broken:
            file.write_bytes(b"no image at all")
    return root


def images_of(folder: Path, limit: int = 22, **arguments: object) -> ImageLoader:
    return loader(folder, quiet(), **{"batch_size": 4, "train": True, "max_unreadable": limit, **arguments})


class Readable(list[tuple[Tensor, Tensor]]):
    """The batches that have an image, for a run that knows of no others."""

    def __init__(self, source: ImageLoader) -> None:
        super().__init__(source)
        self.source = source

    def set_epoch(self, epoch: int) -> None:
        self.source.set_epoch(epoch)
        self[:] = self.source


def numbers(texts: Iterable[str]) -> list[int]:
    """The numbers of the images that these texts name."""
    return [int(text.split("'")[1][-7:-4]) for text in texts]


def breaking_off(after: int) -> object:
    """Have a run stop before its batch of this number, as if it had been killed."""
    prepare, seen = Run._prepare, iter(range(10**6))

    def prepared(self: Run, batch: object) -> object:
        if next(seen) == after:
            raise Killed
        return prepare(self, batch)

    return mock.patch.object(Run, "_prepare", prepared)


@pytest.mark.parametrize("shuffle", [False, True])
def test_they_are_left_out_named_and_counted(tmp_path: Path, shuffle: bool) -> None:
    broken = [1, 5, 6, 13, 21]  # batches of 3, 2, 4, 3, 4 and 1, in order
    source = images_of(write_images(tmp_path / "images", broken), len(broken), shuffle=shuffle, seed=1)
    model, expected = quiet(), quiet()
    with pytest.warns(UserWarning, match="^left out an image that cannot be read: ") as caught:
        found = finetune(model, source, epochs=2, mixup=0.4)
    # One for each image and pass.
    assert sorted(numbers(str(one.message) for one in caught)) == sorted(2 * broken)
    assert sorted(numbers(source.unreadable)) == broken
    assert [(entry["step"], entry["images"], entry["unreadable"]) for entry in found.history] == [
        (6, 17, 5),
        (12, 17, 5),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = finetune(expected, Readable(source), epochs=2, mixup=0.4)
    assert same(weights(model), weights(expected))
    assert [{**entry, "unreadable": 5} for entry in whole.history] == found.history


def test_a_run_without_a_limit_does_not_count(tmp_path: Path) -> None:
    history = finetune(quiet(), images_of(write_images(tmp_path / "images", []), 0)).history
    assert "unreadable" not in history[0]


@pytest.mark.filterwarnings(NOTICE)
@pytest.mark.parametrize("amp", [None, "float16"])
@pytest.mark.parametrize("empty", [0, 2, 5])
def test_a_batch_of_them_alone_is_a_step_that_changes_nothing(tmp_path: Path, empty: int, amp: str | None) -> None:
    broken = range(4 * empty, min(22, 4 * empty + 4))
    source = images_of(write_images(tmp_path / "images", broken))
    # With a rate that is the same in all steps, the steps that are left are those of a run without the batch.
    options = {"epochs": 2, "min_lr": 1e-3, "lr": 1e-3, "warmup": 0, "mixup": 0.4, "amp": amp}
    model, expected = quiet(), quiet()
    found = finetune(model, source, **options)
    whole = finetune(expected, Readable(source), **options)
    assert same(weights(model), weights(expected))
    assert [(entry["step"], entry["images"]) for entry in found.history] == [
        (6, 22 - len(broken)),
        (12, 22 - len(broken)),
    ]
    assert [entry["loss"] for entry in found.history] == [entry["loss"] for entry in whole.history]


@pytest.mark.filterwarnings(NOTICE)
def test_the_learning_rate_follows_the_number_of_the_step(tmp_path: Path) -> None:
    # Each pass ends with an empty batch.
    source = images_of(write_images(tmp_path / "images", [2, 3], 4), batch_size=2)
    history = finetune(quiet(), source, epochs=10, lr=1.0, min_lr=0.1, warmup=4, opt="sgd").history
    expected = [
        0.2 + 0.2 * step if step < 4 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 16)) for step in range(20)
    ]
    assert [entry["lr"] for entry in history] == pytest.approx(expected[1::2])


@pytest.mark.parametrize("limit", [1, 2])
def test_one_more_than_the_limit_is_an_error(tmp_path: Path, limit: int) -> None:
    broken = [1, 5, 6]
    source = images_of(write_images(tmp_path / "images", broken), limit)
    model = quiet()
    text = rf"^source: expected at most {limit} unreadable images, got '[^']*{broken[limit]:03}\.png' \([^\n]+\)$"
    with pytest.warns(UserWarning, match="left out") as caught, pytest.raises(InvalidArgument, match=text):
        finetune(model, source)
    assert numbers(str(one.message) for one in caught) == broken[:limit]
    assert not same(weights(model), weights(quiet()))  # the weights of the last good step


@pytest.mark.filterwarnings(NOTICE)
def test_no_image_that_can_be_read(tmp_path: Path) -> None:
    model = quiet()
    nothing = images_of(write_images(tmp_path / "images", range(8), 8))
    for length in ({"epochs": 1}, {"epochs": 2}, {"steps": 1}, {"steps": 5}):
        with pytest.raises(InvalidArgument, match="^loader: expected at least one image in every pass, got none$"):
            finetune(model, nothing, **length)
    assert same(weights(model), weights(quiet()))


@pytest.mark.filterwarnings(NOTICE)
def test_steps_that_end_before_the_first_image_of_a_pass(tmp_path: Path) -> None:
    source = images_of(write_images(tmp_path / "images", range(4), 8))
    found = finetune(quiet(), source, steps=3, val_loader=images_of(tmp_path / "images"))
    assert found.steps == 3
    assert [(entry["epoch"], entry["step"], entry["images"]) for entry in found.history] == [(0, 2, 4)]


@pytest.mark.filterwarnings(NOTICE)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("every", "after"), [(3, 3), (3, 10), (2, 5), (6, 7), (5, 17)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, workers: int, every: int, after: int) -> None:
    folder = write_images(tmp_path / "images", [1, 8, 9, 10, 11, 14, 20, 21])  # the third and the last batch are empty

    def train(**arguments: object) -> tuple[dict[str, Tensor], FinetuneResult, list[str]]:
        model = tiny()
        source = images_of(folder, 8, workers=workers)
        result = finetune(model, source, teacher=tiny(), steps=16, mixup=0.4, cutmix=1.0, ema=0.9, seed=4, **arguments)
        return weights(model), result, source.unreadable

    expected, whole, named = train()
    assert numbers(named) == [1, 8, 9, 10, 11, 14]  # 4 batches of the third pass
    path = tmp_path / "run.safetensors"
    if after < 16:
        with breaking_off(after), pytest.raises(Killed):
            train(resume=path, checkpoint_every=every)
    else:
        train(resume=path, checkpoint_every=every)
    torch.rand(3)
    found, resumed, names = train(resume=path, checkpoint_every=every)
    assert same(found, expected)
    assert resumed.history == whole.history
    assert resumed.resumed == (after // every * every if after < 16 else 16)
    # A run that is over reads nothing.
    assert names == (named if after < 16 else [])


@pytest.mark.filterwarnings(NOTICE)
def test_what_was_left_out_before_the_interruption_counts(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [1, 6, 13])
    path = tmp_path / "run.safetensors"
    with breaking_off(2), pytest.raises(Killed):
        finetune(quiet(), images_of(folder, 2), resume=path, checkpoint_every=2)
    for _ in range(2):
        source = images_of(folder, 2)
        with pytest.raises(
            InvalidArgument, match=r"^source: expected at most 2 unreadable images, got '[^']*013\.png'"
        ):
            finetune(quiet(), source, resume=path)
        assert numbers(source.unreadable) == [1, 6]
    # A limit may be raised; a lower one is passed by the next.
    with pytest.raises(InvalidArgument, match=r"^source: expected at most 1 unreadable images, got '[^']*013\.png'"):
        finetune(quiet(), images_of(folder, 1), resume=path)
    source = images_of(folder, 3)
    assert finetune(quiet(), source, resume=path).history[0]["unreadable"] == 3
    assert numbers(source.unreadable) == [1, 6, 13]


def test_a_wrapped_loader_is_refused_before_any_work(tmp_path: Path) -> None:
    class Wrapped:
        def __init__(self, source: ImageLoader) -> None:
            self.source = source

        def __getattr__(self, name: str) -> object:
            return getattr(self.source, name)

        def __iter__(self) -> object:
            pytest.fail("it began to work")

    source = Wrapped(images_of(write_images(tmp_path / "images", [1])))
    text = r"^{}: expected one of data\.loader itself with max_unreadable=22, got it wrapped in Wrapped$"
    with pytest.raises(InvalidArgument, match=text.format("loader")):
        finetune(quiet(), source)
    model = quiet()
    stats = sc.calibrate(model, [torch.rand(2, 3, 8, 8) * 2 - 1])
    with pytest.raises(InvalidArgument, match=text.format("train_loader")):
        sc.search(
            model,
            stats,
            objective=sc.AccuracyCritical(),
            loader=[(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))],
            finetune={"epochs": 1},
            train_loader=source,
            calibration_loader=[],
        )


@pytest.mark.filterwarnings(NOTICE)
def test_a_search_with_fine_tuning(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [1, 8, 9, 10, 11])
    model, train = quiet(), images_of(folder, 5)
    calibration = images_of(folder, 5, train=False)
    stats = sc.calibrate(model, calibration)
    assert stats.images == 17

    def search(path: Path) -> sc.SearchResult:
        return sc.search(
            model,
            stats,
            objective=sc.AccuracyCritical(100.0),
            loader=images_of(folder, 5, train=False),
            rounds=2,
            method="snp",
            finetune={"epochs": 1, "checkpoint_every": 2},
            train_loader=train,
            calibration_loader=calibration,
            resume=path,
        )

    expected = search(tmp_path / "whole.safetensors")
    assert numbers(train.unreadable) == [1, 8, 9, 10, 11]
    path = tmp_path / "search.safetensors"
    with breaking_off(9), pytest.raises(Killed):  # in the second round's training
        search(path)
    assert (tmp_path / "search.round2.safetensors").is_file()
    found = search(path)
    assert found.resumed == 1
    assert same(weights(found.model), weights(expected.model))


HEAD = """
import json, os, sys, warnings
import torch
from safetensors.torch import save_file
from finetuning import Killed, quiet, tiny, weights
from secateur.data import loader
from secateur.errors import InvalidArgument
from secateur.training.finetune import finetune
from secateur.training.loop import Run

warnings.filterwarnings("ignore", "left out an image")
warnings.filterwarnings("ignore", "Grad strides do not match")  # torch, of batches of one
RANK, OUT = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)

def images(name, limit=22, **arguments):
    return loader(f"{OUT}/{name}", quiet(), **{"batch_size": 2, "train": True, "max_unreadable": limit, **arguments})

def keep(model, result, name):
    save_file({key: each.contiguous() for key, each in weights(model).items()}, f"{OUT}/{name}{RANK}.safetensors")
    with open(f"{OUT}/{name}{RANK}.json", "w") as file:
        json.dump([result.history, result.resumed], file)
"""

RANKED = """
for name in ("one", "both", "first", "second"):
    model = quiet()
    keep(model, finetune(model, images(name), epochs=2, ema=0.5, lr=1e-3), name)
model = quiet()
keep(model, finetune(model, images("both"), epochs=2, amp="float16", lr=1e-3), "scaled")
"""

# Rank 0 has the even images, rank 1 the odd ones; a batch of both is four in order.
RANKED_CASES = {"one": [2, 7], "both": [4, 5, 6, 7, 9], "first": [0, 2, 9, 11], "second": [1, 3, 12, 14, 13, 21]}


@pytest.mark.filterwarnings(NOTICE)
def test_two_ranks_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    for name, broken in RANKED_CASES.items():
        write_images(tmp_path / name, broken)
    for code, text in on_ranks(HEAD + RANKED, tmp_path):
        assert code == 0, text
    for name in [*RANKED_CASES, "scaled"]:
        folder, options = (name, {"ema": 0.5}) if name != "scaled" else ("both", {"amp": "float16"})
        model = quiet()
        expected = finetune(model, images_of(tmp_path / folder), epochs=2, lr=1e-3, **options)
        first, second = (load_file(tmp_path / f"{name}{rank}.safetensors") for rank in range(2))
        assert same(first, second)
        if name != "scaled":
            for key, tensor in model.state_dict().items():
                torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-4)
        results = [json.loads((tmp_path / f"{name}{rank}.json").read_text()) for rank in range(2)]
        assert results[0] == results[1]
        for entry, wanted in zip(results[0][0], expected.history, strict=True):
            assert entry == pytest.approx(wanted, rel=1e-3 if name != "scaled" else 2e-2)
            assert (entry["images"], entry["unreadable"]) == (22 - len(RANKED_CASES[folder]), len(RANKED_CASES[folder]))


BY_HAND = """
model = quiet().to(memory_format=torch.channels_last)  # what is added is values, not memory
options = {"opt": "momentum", "lr": 0.1, "weight_decay": 0.0, "clip_grad": None}
keep(model, finetune(model, images("one"), **options), "one")
"""


@pytest.mark.filterwarnings(NOTICE)
@pytest.mark.parametrize("broken", [[0, 2], [1, 3], [3]])
def test_a_step_of_two_ranks_by_hand(tmp_path: Path, broken: list[int]) -> None:
    """The gradient is the mean over the images that there are, whichever rank has them."""
    folder = write_images(tmp_path / "one", broken, 4)
    for code, text in on_ranks(HEAD + BY_HAND, tmp_path):
        assert code == 0, text
    model = quiet()
    pictures, targets = next(iter(images_of(folder)))
    assert len(pictures) == 4 - len(broken)
    torch.nn.functional.cross_entropy(model(pictures), targets).backward()
    found = load_file(tmp_path / "one0.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], (parameter - 0.1 * parameter.grad).detach(), rtol=1e-4, atol=1e-6)


RANKS_RESUMED = """
def train(name, limit=6, **more):
    model = tiny()
    options = dict(mixup=0.5, cutmix=0.5, ema=0.8, teacher=tiny(), epochs=3)
    source = images("some", limit, shuffle=True)
    keep(model, finetune(model, source, **options, **more), name)

def attempt(name, text, **more):
    try:
        train(name, **more)
    except Exception as error:
        assert text in str(error), error
    else:
        raise SystemExit(f"{name}: nothing was raised")

train("whole")
path, prepare, seen = f"{OUT}/run.safetensors", Run._prepare, iter(range(1000))

def broken_off(self, batch):
    if RANK == 1 and next(seen) == 10:
        raise Killed("enough")
    return prepare(self, batch)

Run._prepare = broken_off
attempt("broken", "enough", resume=path, checkpoint_every=4)
Run._prepare = prepare
train("resumed", resume=path)
# The same limit on every rank; each counts its own.
attempt("uneven", "max_unreadable: expected the same on every rank, got 6 on rank 0 and 7 on rank 1", limit=6 + RANK)
attempt("over", "unreadable images, got", limit=1)
"""


def test_two_ranks_resume_to_the_bit_and_end_together(tmp_path: Path) -> None:
    write_images(tmp_path / "some", [1, 4, 5, 6, 7, 15])
    for code, text in on_ranks(HEAD + RANKS_RESUMED, tmp_path):
        assert code == 0, text
    for rank in range(2):
        whole, resumed = (load_file(tmp_path / f"{name}{rank}.safetensors") for name in ("whole", "resumed"))
        assert same(whole, resumed)
        told = [json.loads((tmp_path / f"{name}{rank}.json").read_text()) for name in ("whole", "resumed")]
        assert told[0][0] == told[1][0]
        assert told[1][1] == 8
        assert [entry["unreadable"] for entry in told[0][0]] == [6, 6, 6]
