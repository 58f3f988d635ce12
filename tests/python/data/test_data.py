from __future__ import annotations

import importlib.util
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from secateur.data.loader import loader
from secateur.data.model_input import data_config, images_in, model_input, split_batch
from secateur.errors import InvalidArgument
from timm.data import create_transform
from torch import nn

CLASSES = ("apple", "banana", "cherry")


def small_vit(**arguments: object) -> nn.Module:
    chosen = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**chosen, **arguments})


def write_images(root: Path, counts: tuple[int, ...] = (5, 4, 4), size: tuple[int, int] = (40, 36)) -> Path:
    """One flat colour per image; its red channel is the image's running number times 10."""
    number = 0
    for name, count in zip(CLASSES, counts, strict=True):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (10 * number, 5, 200)).save(root / name / f"{index:03}.png")
            number += 1
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def numbers(batches: object) -> list[int]:
    """Recover each image's running number from its normalised red channel."""
    model = small_vit()
    mean, std = (data_config(model)[key][0] for key in ("mean", "std"))
    images = torch.cat([images for images, _ in batches])
    return [round(float(value)) for value in (images[:, 0].mean(dim=(1, 2)) * std + mean) * 25.5]


def test_config_has_the_size_and_channels_the_model_was_built_with() -> None:
    assert data_config(small_vit())["input_size"] == (3, 32, 32)
    grey = data_config(small_vit(in_chans=1, img_size=(48, 32)))
    assert grey["input_size"] == (1, 48, 32)
    assert len(grey["mean"]) == len(grey["std"]) == 1
    # A model with another size than its published configuration is the trap: timm answers 224 here.
    assert timm.data.resolve_model_data_config(small_vit())["input_size"] == (3, 224, 224)


def test_config_of_a_convolutional_model_is_timms() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    assert data_config(model) == timm.data.resolve_model_data_config(model)


def test_folder_in_order_with_class_indices(folder: Path) -> None:
    batches = list(loader(folder, small_vit(), batch_size=5))
    assert [tuple(images.shape) for images, _ in batches] == [(5, 3, 32, 32), (5, 3, 32, 32), (3, 3, 32, 32)]
    assert numbers(batches) == list(range(13))
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 5 + [1] * 4 + [2] * 4


def test_evaluation_transform_is_timms(folder: Path) -> None:
    model = small_vit()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 44, 3), dtype=np.uint8))
    image.save(folder / "apple" / "000.png")
    expected = create_transform(**{**timm.data.resolve_model_data_config(model), "input_size": (3, 32, 32)})(image)
    assert torch.equal(next(iter(loader(folder, model)))[0][0], expected)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("max_images", "expected"), [(1, 1), (5, 5), (7, 7), (13, 13), (99, 13), (None, 13)])
def test_exact_counts_and_no_image_twice(folder: Path, shuffle: bool, max_images: int | None, expected: int) -> None:
    source = loader(folder, small_vit(), batch_size=5, max_images=max_images, shuffle=shuffle)
    found = numbers(source)
    assert len(found) == len(set(found)) == source.images == expected
    assert len(list(source)) == len(source)


def test_order_is_a_function_of_seed_and_epoch(folder: Path) -> None:
    def order(seed: int, epoch: int, max_images: int | None = None) -> list[int]:
        source = loader(folder, small_vit(), batch_size=4, shuffle=True, seed=seed, max_images=max_images)
        source.set_epoch(epoch)
        torch.rand(3)  # the global generator has no say
        return numbers(source)

    assert order(0, 0) == order(0, 0) != list(range(13))
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    # A limited loader keeps to its images in every epoch.
    assert order(0, 0, 6) != order(0, 3, 6)
    assert set(order(0, 0, 6)) == set(order(0, 3, 6))
    assert set(order(0, 0, 6)) != set(order(1, 0, 6))


def test_a_pass_can_start_later_once(folder: Path) -> None:
    source = loader(folder, small_vit(), batch_size=4, shuffle=True)
    whole = numbers(source)
    source.set_epoch(0, start=2)
    assert numbers(source) == whole[8:]
    assert numbers(source) == whole


def test_training_augmentation_is_a_function_of_seed_epoch_and_image(folder: Path) -> None:
    def images(epoch: int, seed: int = 0, workers: int = 0) -> torch.Tensor:
        source = loader(
            folder, small_vit(), train=True, batch_size=13, seed=seed, workers=workers, auto_augment="rand-m9"
        )
        source.set_epoch(epoch)
        return next(iter(source))[0]

    first = images(0)
    assert torch.equal(first, images(0))
    assert torch.equal(first, images(0, workers=1))
    assert not torch.equal(first, images(1))
    assert not torch.equal(first, images(0, seed=1))


def test_training_leaves_the_global_generators_alone(folder: Path) -> None:
    source = loader(folder, small_vit(), train=True, auto_augment="augmix-m5")

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    list(source)
    assert draw() == expected


def test_transform_arguments_are_passed_on(folder: Path) -> None:
    model = small_vit()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 44, 3), dtype=np.uint8)).save(
        folder / "apple" / "000.png"
    )
    config = {**data_config(model), "crop_pct": 0.5}
    with Image.open(folder / "apple" / "000.png") as image:
        expected = create_transform(**config)(image)
    assert torch.equal(next(iter(loader(folder, model, crop_pct=0.5)))[0][0], expected)
    with pytest.raises(InvalidArgument, match=r"^transform: expected arguments of timm's .*, got 'crop_percent'$"):
        loader(folder, model, crop_percent=0.5)


def test_split_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train", (3, 3, 3))
    model = small_vit()
    # Alone it may be a class of vehicles.
    assert loader(tmp_path, model).images == 9
    write_images(tmp_path / "val", (1, 1, 2))
    assert loader(tmp_path, model).images == 4
    assert loader(tmp_path, model, train=True).images == 9
    assert loader(tmp_path, model, split="train").images == 9
    with pytest.raises(InvalidArgument, match=r"^split: expected a sub-folder of .*, got 'test'$"):
        loader(tmp_path, model, split="test")


def test_tar_equals_folder_and_leaves_no_pickle(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname="images")
    model = small_vit()
    for workers in (0, 2):
        packed = loader(path, model, batch_size=3, workers=workers)
        for found, expected in zip(packed, loader(folder, model, batch_size=3), strict=True):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["images", "images.tar"]
    with pytest.raises(InvalidArgument, match=r"^split: expected none for a tar, got 'val'$"):
        loader(path, model, split="val")


@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_data_sets(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    source = f"{prefix}:{tmp_path / 'images'}"
    write_images(tmp_path / "images" / "train")
    write_images(tmp_path / "images" / "validation", (1, 2, 2))
    datasets.load_dataset(str(tmp_path / "images"), cache_dir=tmp_path / "cache")  # makes the lengths known
    model = small_vit()
    assert numbers(loader(source, model, batch_size=2)) == [0, 1, 2, 3, 4]
    limited = loader(source, model, batch_size=2, max_images=3, workers=1)
    assert numbers(limited) == [0, 1, 2]
    limited.set_epoch(0, start=1)
    assert numbers(limited) == [2]
    shuffled = numbers(loader(source, model, split="train", shuffle=True, batch_size=5))
    assert sorted(shuffled) == list(range(13)) != shuffled
    training = loader(source, model, train=True, batch_size=5)
    first = torch.cat([images for images, _ in training])
    torch.rand(3)
    training.set_epoch(0, start=1)
    assert torch.equal(torch.cat([images for images, _ in training]), first[5:])
    training.set_epoch(1)
    assert not torch.equal(torch.cat([images for images, _ in training]), first)
    with pytest.raises(InvalidArgument, match=r"^(source|max_images): expected .* \(.*nope.*\)"):
        loader(source, model, split="nope")


def test_grey_model_gets_one_channel(folder: Path) -> None:
    images, _ = next(iter(loader(folder, small_vit(in_chans=1))))
    assert images.shape == (13, 1, 32, 32)


def test_digits_are_real_stratified_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    model = small_vit(num_classes=10, in_chans=1, img_size=8, patch_size=2)
    config = data_config(model)
    halves = {}
    for split in ("train", "test"):
        images, targets = next(iter(loader("digits", model, split=split, batch_size=2000)))
        halves[split] = (images * config["std"][0] + config["mean"][0]) * 16, targets
    assert [len(halves[split][1]) for split in ("train", "test")] == [898, 899]
    counts = [torch.bincount(halves[split][1]) for split in ("train", "test")]
    assert int((counts[0] - counts[1]).abs().max()) <= 1
    # At 8 x 8 pixels the transform resizes nothing: every scikit-learn image is in exactly one half, unaltered.
    pixels, labels = load_digits(return_X_y=True)
    found = {
        (tuple(row), int(label))
        for images, targets in halves.values()
        for row, label in zip(images.flatten(1).round().int().tolist(), targets, strict=True)
    }
    assert found == {(tuple(row), int(label)) for row, label in zip(pixels.astype(int).tolist(), labels, strict=True)}
    assert sum(len(targets) for _, targets in halves.values()) == len(labels)


def test_digits_split_does_not_depend_on_the_seed() -> None:
    model = small_vit()
    first, second = (next(iter(loader("digits", model, batch_size=8, seed=seed)))[0] for seed in (0, 1))
    assert torch.equal(first, second)
    assert loader("digits", model, train=True).images == 898
    with pytest.raises(InvalidArgument, match=r"^split: expected 'train' or 'test' for digits, got 'val'$"):
        loader("digits", model, split="val")


def test_missing_sources_say_what_is_missing(tmp_path: Path) -> None:
    model = small_vit()
    with pytest.raises(
        InvalidArgument, match=r"^source: expected an image folder, .* got '.*nowhere', which does not ex"
    ):
        loader(tmp_path / "nowhere", model)
    with pytest.raises(InvalidArgument, match=r"^source: expected images in '.*', got none \("):
        loader(tmp_path, model)
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(InvalidArgument, match=r"^source: expected an image folder, .* got '.*text.txt'$"):
        loader(tmp_path / "text.txt", model)
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.add(tmp_path / "text.txt", arcname="text.txt")
    with pytest.raises(InvalidArgument, match=r"^source: expected images in '.*empty.tar', got none"):
        loader(tmp_path / "empty.tar", model)
    (tmp_path / "broken.tar").write_bytes(b"this is no tar at all")
    with pytest.raises(InvalidArgument, match=r"^source: expected images in '.*broken.tar', got none"):
        loader(tmp_path / "broken.tar", model)


@pytest.mark.parametrize(
    ("source", "package", "text"),
    [
        ("digits", "sklearn", r"^source: expected scikit-learn to be installed for 'digits'"),
        ("hfds:user/pictures", "datasets", r"^source: expected the package 'datasets' for 'hfds:user/pictures'"),
        ("hfids:user/pictures", "datasets", r"^source: expected the package 'datasets' for 'hfids:user/pictures'"),
    ],
)
def test_missing_packages_are_named(source: str, package: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InvalidArgument, match=text):
        loader(source, small_vit())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_not_replaced_by_its_neighbour(folder: Path, workers: int) -> None:
    (folder / "banana" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    name = Path("banana", "001.png")
    with pytest.raises(InvalidArgument, match=rf"^source: expected a readable image, got '{name}' \([^\n]*\)$"):
        list(loader(folder, small_vit(), batch_size=4, workers=workers))


def breaking(folder: Path) -> list[str]:
    """Break three images of 13, each in another way: no image, cut short, a lie about its size."""
    (folder / "apple" / "003.png").write_bytes(b"no image at all")
    whole = (folder / "banana" / "001.png").read_bytes()
    (folder / "banana" / "001.png").write_bytes(whole[: len(whole) // 2])
    (folder / "banana" / "002.png").write_bytes(whole[:16] + b"\x7f\xff\xff\xff" + whole[20:])
    return [str(Path(*parts)) for parts in (("apple", "003.png"), ("banana", "001.png"), ("banana", "002.png"))]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_images_that_cannot_be_read_are_left_out_to_a_limit(folder: Path, workers: int, batch_size: int) -> None:
    names = breaking(folder)
    source = loader(folder, small_vit(), batch_size=batch_size, workers=workers, max_unreadable=3)
    for _ in range(2):
        with pytest.warns(UserWarning, match="^left out an image that cannot be read: ") as caught:
            found = numbers(source)
        assert found == [number for number in range(13) if number not in (3, 6, 7)]
        assert [text.split("'")[1] for text in source.unreadable] == names
        assert [str(one.message).split("'")[1] for one in caught] == names
        assert {one.filename for one in caught} == {__file__}  # whoever reads is told
    limited = loader(folder, small_vit(), batch_size=batch_size, workers=workers, max_unreadable=2)
    text = rf"^source: expected at most 2 unreadable images, got '{names[2]}' \([^\n]+\)$"
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InvalidArgument, match=text):
        list(limited)
    assert len(limited.unreadable) == 2


def test_ranks_stay_in_step_where_a_whole_batch_is_left_out(folder: Path) -> None:
    breaking(folder)
    source = loader(folder, small_vit(), batch_size=2, max_unreadable=3)
    with pytest.warns(UserWarning, match="left out"):
        shares = [list(source.sharded(rank, 2, whole_batches=True)) for rank in range(2)]
    assert [[len(images) for images, _ in share] for share in shares] == [[2, 2, 2, 1], [1, 0, 2]]


def test_every_batch_counts_the_empty_ones_and_goes_on_from_the_middle(folder: Path) -> None:
    names = breaking(folder)
    source = loader(folder, small_vit(), batch_size=2, max_unreadable=3)
    with pytest.warns(UserWarning, match="left out") as caught:
        whole = list(source.every_batch())
    assert {one.filename for one in caught} == {__file__}
    assert [len(images) for images, _ in whole] == [2, 1, 2, 0, 2, 2, 1]
    assert len(whole) == len(source)
    assert whole[3][1].shape == (0,)
    before = source.unreadable[:1]
    source.set_epoch(0, 2, before)
    with pytest.warns(UserWarning, match="left out") as caught:
        rest = list(source.every_batch())
    assert [len(images) for images, _ in rest] == [2, 0, 2, 2, 1]
    assert len(caught) == 2
    assert [text.split("'")[1] for text in source.unreadable] == names
    assert len(before) == 1
    # Of the very next pass alone.
    with pytest.warns(UserWarning, match="left out"):
        list(source)
    assert len(source.unreadable) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"max_images": 0}, "max_images: expected an integer of at least 1, got 0"),
        ({"workers": -1}, "workers: expected an integer of at least 0, got -1"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"batch_size": 1.5}, "batch_size: expected an integer of at least 1, got 1.5"),
        ({"batch_size": "3"}, "batch_size: expected an integer of at least 1, got '3'"),
        ({"max_unreadable": -1}, "max_unreadable: expected an integer of at least 0, got -1"),
        ({"workers": True}, "workers: expected an integer of at least 0, got True"),
    ],
)
def test_numbers_out_of_range(folder: Path, arguments: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        loader(folder, small_vit(), **arguments)


def test_what_is_no_model_is_refused(folder: Path) -> None:
    for what in ("vit_tiny_patch16_224", None, torch.zeros(3)):
        with pytest.raises(InvalidArgument, match=f"^model: expected an nn.Module, got {type(what).__name__}$"):
            loader(folder, what)


def test_models_of_other_channels_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^model: expected 1 or 3 input channels \(grey or RGB images\), got 4$"):
        loader(folder, small_vit(in_chans=4))


def test_split_batch() -> None:
    images, targets = torch.zeros(2, 3, 4, 4), torch.tensor([1, 0])
    assert split_batch(images) == (images, None)
    assert split_batch([images, targets, "more"]) == (images, targets)
    for batch, got in (
        ((), "NoneType"),
        ("text", "str"),
        (torch.zeros(3, 4, 4), r"a tensor of shape \(3, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), r"a tensor of shape \(0, 3, 4, 4\)"),
        ((images, targets[:1]), r"targets of shape \(1,\)"),
        ((images, ["a", "b"]), "list"),
    ):
        with pytest.raises(InvalidArgument, match=f"^loader: expected .*, got {got}$"):
            split_batch(batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_take_the_type_of_the_model(dtype: torch.dtype) -> None:
    found = model_input(small_vit().to(dtype), torch.ones(2, 3, 32, 32))
    assert (found.dtype, found.shape) == (dtype, (2, 3, 32, 32))
    assert model_input(small_vit().to(dtype), torch.ones(2, 3, 32, 32), "meta").device.type == "meta"


def test_integer_parameters_do_not_decide_the_type() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2).double())
    model[0].table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert model_input(model, torch.ones(1, 3, 2, 2)).dtype == torch.float64
    images = torch.ones(1, 3, 2, 2, dtype=torch.float16)
    assert model_input(nn.Identity(), images) is images
    assert model_input(nn.Identity(), images, "meta").device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "shape", "expected"),
    [
        ({}, (4, 3, 40, 40), r"\(B, 3, 32, 32\)"),
        ({}, (4, 3, 32, 40), r"\(B, 3, 32, 32\)"),
        ({}, (4, 1, 32, 32), r"\(B, 3, 32, 32\)"),
        ({"in_chans": 1}, (4, 3, 32, 32), r"\(B, 1, 32, 32\)"),
        ({}, (3, 32, 32), r"\(B, 3, 32, 32\)"),
        ({"dynamic_img_size": True}, (4, 1, 40, 40), r"\(B, 3, H, W\) with sides in multiples of 8 x 8"),
        ({"dynamic_img_size": True}, (4, 3, 40, 41), r"\(B, 3, H, W\) with sides in multiples of 8 x 8"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (4, 1, 40, 41), r"\(B, 3, H, W\)"),
    ],
)
def test_images_of_another_shape_are_refused(
    arguments: dict[str, object], shape: tuple[int, ...], expected: str
) -> None:
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InvalidArgument, match=f"^loader: expected images {expected}, got {got}$"):
        model_input(small_vit(**arguments), torch.zeros(shape))


def test_dynamic_sizes_and_other_models_take_what_they_take() -> None:
    dynamic, padding = small_vit(dynamic_img_size=True), small_vit(dynamic_img_size=True, dynamic_img_pad=True)
    for model, shape in (
        (dynamic, (2, 3, 40, 16)),
        (padding, (2, 3, 41, 33)),
        (timm.create_model("resnet18"), (2, 3, 33, 35)),
    ):
        assert model(model_input(model, torch.zeros(shape))).shape[0] == 2


def test_integer_images_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^loader: expected floating-point images, got torch.uint8$"):
        model_input(small_vit(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_images_in_a_loader(folder: Path) -> None:
    ours = loader(folder, small_vit(), batch_size=5)
    torchs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(7, 2)), batch_size=2)
    assert [images_in(ours, limit) for limit in (None, 5, 20)] == [13, 5, 13]
    assert [images_in(torchs, limit) for limit in (None, 5, 20)] == [7, 5, 7]
    assert [images_in(iter(()), limit) for limit in (None, 5)] == [None, 5]


class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self) -> object:
        return iter(())

    def __len__(self) -> int:
        raise TypeError("unknown")


def test_a_length_that_cannot_be_told() -> None:
    assert images_in(torch.utils.data.DataLoader(Endless())) is None
