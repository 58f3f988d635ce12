"""Batches in the forms in which people hold them: by name, in tuples, as single pictures, of data sets in memory."""

from __future__ import annotations

import io
from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import secateur as sc
import torch
from PIL import Image
from secateur.data.loader import in_batches, loader
from secateur.data.model_input import split_batch
from secateur.errors import InvalidArgument
from small_vits import small_vit
from timm.data import create_transform
from torch.utils.data import Dataset

IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([4, 0, 2])


def picture(seed, mode="RGB", size=(19, 14)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def by_hand(pictures, side=12):
    """What timm's transform makes of them for `small_vit`, by its published numbers."""
    half = (0.5, 0.5, 0.5)
    prepare = create_transform((3, side, side), interpolation="bicubic", mean=half, std=half, crop_pct=0.9)
    return torch.stack([prepare(each.convert("RGB")) for each in pictures])


@pytest.fixture
def model():
    found = small_vit()
    half = (0.5, 0.5, 0.5)
    found.pretrained_cfg = {"input_size": (3, 224, 224), "mean": half, "std": half, "crop_pct": 0.9}
    found.pretrained_cfg["interpolation"] = "bicubic"
    return found


class Pictures(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@dataclass
class Record:
    image: torch.Tensor
    target: torch.Tensor | None = None


class Keyed:
    """Like TensorDict: names and items, but no mapping, and iteration is not over names."""

    def __init__(self, **held):
        self.held = held

    def keys(self):
        return self.held.keys()

    def __getitem__(self, name):
        return self.held[name]

    def __iter__(self):
        raise NotImplementedError


Pair = namedtuple("Pair", ["img", "label"])
Other = namedtuple("Other", ["first", "second"])


def same(found, images, targets):
    assert torch.equal(found[0], images)
    if targets is None:
        assert found[1] is None
    else:
        assert found[1].dtype == torch.int64
        assert torch.equal(found[1], targets)


@pytest.mark.parametrize("image", ["pixel_values", "image", "images", "img", "inputs", "x"])
@pytest.mark.parametrize("label", ["labels", "label", "targets", "target", "cls", "y"])
@pytest.mark.parametrize("kind", [dict, UserDict, lambda held: Keyed(**held)])
def test_by_name(image, label, kind):
    same(split_batch(kind({label: CLASSES, "index": [1, 2, 3], image: IMAGES})), IMAGES, CLASSES)


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, CLASSES),
        [IMAGES, CLASSES],
        (IMAGES, CLASSES, ["a", "b", "c"]),
        Pair(IMAGES, CLASSES),
        Other(IMAGES, CLASSES),
        Record(IMAGES, CLASSES),
        {"image": IMAGES.numpy(), "label": CLASSES.numpy()},
        {"image": list(IMAGES), "label": CLASSES.tolist()},
        {"image": list(IMAGES), "label": list(CLASSES)},
        {"image": IMAGES, "label": CLASSES[:, None]},
        {"image": IMAGES, "label": CLASSES, "labels": CLASSES.clone()},
        {"image": IMAGES, "label": None, "target": CLASSES},
        [{"image": IMAGES, "label": CLASSES}],
        ({"image": IMAGES}, CLASSES),
        ({"image": IMAGES}, {"label": CLASSES}),
        (IMAGES, {"label": CLASSES, "name": ["a", "b", "c"]}),
        list(zip(IMAGES, CLASSES, strict=True)),
        list(zip(IMAGES, CLASSES.tolist(), strict=True)),
        [{"pixel_values": image, "labels": index} for image, index in zip(IMAGES, CLASSES, strict=True)],
        [Record(image, index) for image, index in zip(IMAGES, CLASSES.tolist(), strict=True)],
    ],
)
def test_images_and_classes(batch):
    same(split_batch(batch), IMAGES, CLASSES)
    same(split_batch(batch, labels=False), IMAGES, None)


@pytest.mark.parametrize(
    "batch",
    [IMAGES, IMAGES.numpy(), (IMAGES,), {"image": IMAGES}, list(IMAGES), {"image": list(IMAGES)}, Record(IMAGES)],
)
def test_images_alone(batch):
    same(split_batch(batch), IMAGES, None)


@pytest.mark.parametrize(
    ("batch", "images", "targets"),
    [
        ((IMAGES[:1], 4), IMAGES[:1], CLASSES[:1]),
        ((IMAGES[:1], torch.tensor(4)), IMAGES[:1], CLASSES[:1]),
        ({"image": IMAGES[0], "label": 4}, IMAGES[:1], CLASSES[:1]),
        ({"path": ["a", "b", "c"], "image": IMAGES, "label": CLASSES}, IMAGES, CLASSES),
        ({"image": list(IMAGES), "label": CLASSES.tolist(), "labels": CLASSES.tolist()}, IMAGES, CLASSES),
        (list(zip(IMAGES, CLASSES.numpy(), strict=True)), IMAGES, CLASSES),
        # Columns of class indices are known only by a name.
        ((IMAGES, CLASSES[:, None]), IMAGES, CLASSES[:, None]),
        ({"image": IMAGES, "label": torch.stack([CLASSES, CLASSES], 1)}, IMAGES, torch.stack([CLASSES, CLASSES], 1)),
    ],
)
def test_targets_of_every_shape(batch, images, targets):
    same(split_batch(batch), images, targets)


def encoded(each, where="bytes", folder=None):
    file = io.BytesIO()
    each.save(file, "PNG")
    if where == "bytes":
        return {"bytes": file.getvalue(), "path": "not/there.png"}
    path = folder / "a.png"
    path.write_bytes(file.getvalue())
    return {"bytes": None, "path": str(path)}


def test_pictures_are_prepared_as_by_timm(model):
    pictures = [picture(0), picture(1, size=(30, 12)), picture(2, "L")]
    expected = by_hand(pictures)
    for batch in (pictures, tuple(pictures), {"image": pictures}, [{"image": each} for each in pictures]):
        same(split_batch(batch, model=model), expected, None)
    numbers = CLASSES.tolist()
    pairs = list(zip(pictures, numbers, strict=True))
    records = [{"image": each, "label": index} for each, index in pairs]
    columns = {"image": pictures, "label": numbers}
    for batch in (pairs, records, columns, (pictures, CLASSES), (pictures, numbers), [pictures, numbers]):
        same(split_batch(batch, model=model), expected, CLASSES)
    same(split_batch(pictures[0], model=model), expected[:1], None)
    same(split_batch({"image": pictures[0], "label": 4}, model=model), expected[:1], CLASSES[:1])
    same(split_batch(pairs[:1], model=model), expected[:1], CLASSES[:1])


def test_two_pairs_are_not_images_and_targets(model):
    pictures = [picture(0), picture(1)]
    same(split_batch([(pictures[0], 4), (pictures[1], 0)], model=model), by_hand(pictures), CLASSES[:2])
    same(split_batch([(IMAGES[0], 4), (IMAGES[1], 0)]), IMAGES[:2], CLASSES[:2])


def test_encoded_pictures(model, tmp_path):
    pictures = [picture(0), picture(1)]
    held = [encoded(pictures[0]), encoded(pictures[1], "path", tmp_path)]
    same(split_batch({"image": held, "label": [4, 0]}, model=model), by_hand(pictures), CLASSES[:2])
    same(split_batch(held, model=model), by_hand(pictures), None)


def test_a_processors_tensor_comes_before_its_picture():
    batch = {"image": [picture(0)] * 3, "pixel_values": IMAGES, "label": CLASSES}
    same(split_batch(batch), IMAGES, CLASSES)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"photo": IMAGES}, "expected images by one name, such as 'pixel_values' or 'image', got 'photo'"),
        ({}, "expected images by one name, such as 'pixel_values' or 'image', got an empty mapping"),
        (
            {"image": IMAGES, "img": IMAGES},
            "expected images by one name, such as 'pixel_values' or 'image', got 'image', 'img'",
        ),
        (
            {"image": IMAGES, "label": CLASSES, "target": CLASSES + 1},
            "expected targets by one name, such as 'labels', got 'label' and 'target'",
        ),
        (
            ({"image": IMAGES, "label": CLASSES}, CLASSES),
            "expected targets in one place, got 'label' and a second item",
        ),
        (
            [IMAGES[0], IMAGES[1, :, 1:]],
            "expected images of one shape and type in a batch, got (3, 11, 12), (3, 12, 12)",
        ),
        (
            [{"image": IMAGES[0]}, {"image": IMAGES}],
            "expected batches of images (B, C, H, W) or (images, targets), got a list of 2 mappings that are not one "
            "image 'image' each",
        ),
        (
            [{"image": IMAGES[0]}, {"label": 1}],
            "expected batches of images (B, C, H, W) or (images, targets), got a tensor of shape (3, 12, 12)",
        ),
        (
            (IMAGES[0], IMAGES[1]),
            "expected batches of images (B, C, H, W) or (images, targets), got a tensor of shape (3, 12, 12)",
        ),
        ({"image": IMAGES, "label": ["a", "b", "c"]}, "expected one target for each of 3 images, got list"),
        (
            {"image": IMAGES, "label": CLASSES[:2]},
            "expected one target for each of 3 images, got targets of shape (2,)",
        ),
        ([], "expected batches of images (B, C, H, W) or (images, targets), got NoneType"),
        ("abc", "expected batches of images (B, C, H, W) or (images, targets), got str"),
        (
            [IMAGES[0], "a"],
            "expected batches of images (B, C, H, W) or (images, targets), got a tensor of shape (3, 12, 12)",
        ),
        ([picture(0)], "expected batches of images (B, C, H, W) or (images, targets), got a PIL image"),
        (
            [(IMAGES[0], 4), IMAGES[1]],
            "expected batches of images (B, C, H, W) or (images, targets), got tuple",
        ),
        # One image, or a batch of grey ones.
        (
            {"image": IMAGES[0], "label": CLASSES},
            "expected batches of images (B, C, H, W) or (images, targets), got a tensor of shape (3, 12, 12)",
        ),
        (
            [{"image": IMAGES[0], "label": 1}, {"image": IMAGES[1]}],
            "expected one target for each of 2 images, got list",
        ),
        ({"image": IMAGES, "label": [True, False, True]}, "expected one target for each of 3 images, got list"),
        (
            {"image": IMAGES, "label": [torch.tensor(1), torch.tensor([2]), torch.tensor(3)]},
            "expected one target for each of 3 images, got list",
        ),
        (
            [(IMAGES[0], torch.tensor(0.5)), (IMAGES[1], torch.tensor(0.5))],
            "expected batches of images (B, C, H, W) or (images, targets), got tuple",
        ),
        (
            [IMAGES[0], IMAGES[1].double()],
            "expected images of one shape and type in a batch, got torch.float32, torch.float64",
        ),
        ([{"photo": IMAGES}], "expected images by one name, such as 'pixel_values' or 'image', got 'photo'"),
        (
            {"image": [picture(0)] * 3, "x": IMAGES.byte()},
            "expected images by one name, such as 'pixel_values' or 'image', got 'image', 'x'",
        ),
        (
            dict.fromkeys("abcdefghi", 0),
            "expected images by one name, such as 'pixel_values' or 'image', got 'a', 'b', 'c', 'd', 'e', 'f', 'g', "
            "'h', …",
        ),
        (
            {"image": np.array(["a"])},
            "expected batches of images (B, C, H, W) or (images, targets), got ndarray",
        ),
    ],
)
def test_refusals(batch, text):
    with pytest.raises(InvalidArgument) as caught:
        split_batch(batch)
    assert str(caught.value) == f"loader: {text}"


def test_pictures_and_tensors_in_one_list(model):
    with pytest.raises(InvalidArgument, match=r"^loader: expected [^\n]*$"):
        split_batch([picture(0), IMAGES[0]], model=model)
    with pytest.raises(InvalidArgument, match=r"^loader: [^\n]*$"):
        split_batch([{"image": picture(0), "label": 1}, (picture(1), 2)], model=model)


PICTURES = [picture(seed) for seed in range(70)]


@pytest.mark.parametrize(
    ("source", "classes"),
    [
        (PICTURES, None),
        (tuple(PICTURES), None),
        ([(each, index % 5) for index, each in enumerate(PICTURES)], True),
        ([{"image": each, "label": index % 5} for index, each in enumerate(PICTURES)], True),
        (Pictures(*PICTURES), None),
        (Pictures(*((each, index % 5) for index, each in enumerate(PICTURES))), True),
        (Pictures(*({"img": each, "target": torch.tensor(i % 5)} for i, each in enumerate(PICTURES))), True),
        (Pictures(*(Pair(each, np.int64(index % 5)) for index, each in enumerate(PICTURES))), True),
    ],
)
def test_sources_in_memory(model, source, classes):
    expected = by_hand(PICTURES)
    targets = torch.arange(70) % 5 if classes else torch.full((70,), -1)
    for batches, size in ((loader(source, model, batch_size=32), 32), (in_batches(source, model), 64)):
        assert batches.images == 70
        found = list(batches)
        assert len(found[0][0]) == size
        same([torch.cat(part) for part in zip(*found, strict=True)], expected, targets)
    if classes:
        evaluation = sc.evaluate(model, source)
        hits = model(expected).argmax(dim=1) == targets
        assert (evaluation.images, evaluation.top1) == (70, pytest.approx(100 * float(hits.float().mean())))


def test_labels_are_left_alone_where_they_are_not_wanted(model):
    source = [{"image": each, "label": "a word"} for each in PICTURES[:2]]
    found = next(iter(in_batches(source, model, labels=False)))
    same(found, by_hand(PICTURES[:2]), torch.full((2,), -1))
    with pytest.raises(InvalidArgument, match=r"^loader: expected class indices, got 'a word'$"):
        in_batches(source, model)
    with pytest.raises(InvalidArgument, match=r"^source: expected class indices, got 'a word'$"):
        loader(source, model)


def test_grey_models(model):
    grey = small_vit(in_chans=1)
    found = next(iter(loader(PICTURES[:2], grey)))[0]
    assert found.shape == (2, 1, 12, 12)
    assert torch.equal(split_batch(PICTURES[:2], model=grey)[0], found)


def test_batches_stay_what_they_are(model):
    for batches in ([IMAGES, IMAGES], [(IMAGES, CLASSES)], [{"image": IMAGES, "label": CLASSES}], iter([IMAGES])):
        assert in_batches(batches, model) is batches


def test_single_tensors_in_a_data_set_are_refused(model):
    for item in ((IMAGES[0], 1), {"image": IMAGES[0], "label": 1}):
        with pytest.raises(InvalidArgument) as caught:
            in_batches(Pictures(item, item), model)
        assert str(caught.value) == (
            "loader: expected pictures or batches, got the data set Pictures of single tensors; pass "
            "torch.utils.data.DataLoader(dataset, batch_size=64)"
        )


def test_what_is_no_source(model):
    for source in ([], [IMAGES], [1, 2]):
        with pytest.raises(InvalidArgument, match=r"^source: expected a path, a name, or a data set or list of PIL im"):
            loader(source, model)
    with pytest.raises(InvalidArgument, match=r"^split: expected none for a list, got 'train'$"):
        loader(PICTURES[:2], model, split="train")


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (IMAGES, "images alone"),
        ({"pixel_values": IMAGES, "id": 3}, "no 'labels', 'label' or 'targets' among 'pixel_values', 'id'"),
        ({"image": IMAGES, "label": None}, "no 'labels', 'label' or 'targets' among 'image', 'label'"),
    ],
)
def test_evaluate_says_that_there_are_no_labels(model, batch, got):
    with pytest.raises(InvalidArgument) as caught:
        sc.evaluate(model, [batch])
    assert str(caught.value) == f"loader: expected (images, targets), got {got}"


def test_evaluate_takes_every_form_alike(model):
    expected = sc.evaluate(model, [(IMAGES, CLASSES)])
    for batch in ({"pixel_values": IMAGES, "labels": CLASSES}, Record(IMAGES, CLASSES), UserDict(x=IMAGES, y=CLASSES)):
        assert sc.evaluate(model, [batch]) == expected
