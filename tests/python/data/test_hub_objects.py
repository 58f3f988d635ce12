"""Data sets of Hugging Face's `datasets` in memory: columns, formats, transforms, splits, streams, and no classes."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import torch
from PIL import Image
from secateur.data.loader import in_batches, loader
from secateur.errors import InvalidArgument
from small_vits import small_vit
from timm.data import create_transform
from torch.utils.data import DataLoader

datasets = pytest.importorskip("datasets")

COUNT = 70  # more than one batch of single pictures
HALF = (0.5, 0.5, 0.5)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (14, 19, 3), dtype=np.uint8))


PICTURES = [picture(seed) for seed in range(COUNT)]
CLASSES = [(7 * index + 3) % 5 for index in range(COUNT)]
NAMES = datasets.ClassLabel(names=list("abcde"))


def data_set(**columns):
    """A data set of these columns; a pair is (values, feature), values alone have the type that is found."""
    found = {name: value[0] if isinstance(value, tuple) else value for name, value in columns.items()}
    made = datasets.Dataset.from_dict(found)
    for name, value in columns.items():
        if isinstance(value, tuple):
            made = made.cast_column(name, value[1])
    return made


IMAGES = (PICTURES, datasets.Image())


def by_hand(pictures):
    """What timm's transform makes of them for `small_vit`, by its published numbers."""
    prepare = create_transform((3, 12, 12), interpolation="bicubic", mean=HALF, std=HALF, crop_pct=0.9)
    return torch.stack([prepare(each) for each in pictures])


EXPECTED = by_hand(PICTURES)


@pytest.fixture
def model():
    found = small_vit()
    found.pretrained_cfg = {"input_size": (3, 224, 224), "mean": HALF, "std": HALF, "crop_pct": 0.9}
    found.pretrained_cfg["interpolation"] = "bicubic"
    return found


def read(batches):
    parts = list(zip(*batches, strict=True))
    return torch.cat(parts[0]), torch.cat(parts[1])


def same(source, model, targets, order=range(COUNT)):
    """The source is read alike by `loader` and as batches, and measured as by hand."""
    order = list(order)
    for batches in (loader(source, model, batch_size=32), in_batches(source, model)):
        assert batches.images == len(order)
        images, found = read(batches)
        assert torch.equal(images, EXPECTED[order])
        assert found.tolist() == [targets[index] for index in order]
    if min(targets) >= 0:
        hits = model(EXPECTED[order]).argmax(1) == torch.tensor([targets[index] for index in order])
        evaluation = sc.evaluate(model, source)
        assert evaluation.images == len(order)
        assert evaluation.top1 == pytest.approx(100 * float(hits.float().mean()))


@pytest.mark.parametrize(
    "columns",
    [
        {"image": IMAGES, "label": (CLASSES, NAMES)},
        {"label": CLASSES, "image": IMAGES},
        {"id": list(range(COUNT)), "image": IMAGES, "target": CLASSES, "caption": ["a"] * COUNT},
        {"picture": IMAGES, "kind": (CLASSES, NAMES), "size": [9] * COUNT},  # by type where no name is known
        {"img": IMAGES, "fine_label": (CLASSES, NAMES)},
        {"img": IMAGES, "label": (CLASSES, NAMES), "coarse": ([0] * COUNT, NAMES)},  # by name before type
        {"image": IMAGES, "label": (CLASSES, datasets.Value("uint8"))},
        {"image": IMAGES, "mask": IMAGES, "label": CLASSES},
    ],
)
def test_columns(model, columns):
    same(data_set(**columns), model, CLASSES)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas"])
def test_formats_are_of_no_matter(model, form):
    found = data_set(image=IMAGES, label=(CLASSES, NAMES))
    same(found.with_format(form), model, CLASSES)


def test_parts_and_orders(model):
    found = data_set(image=IMAGES, label=(CLASSES, NAMES), index=list(range(COUNT)))
    shuffled = found.shuffle(seed=3)
    assert list(shuffled["index"]) != list(range(COUNT))
    for part in (shuffled, found.select([5, 1, 66]), found.shard(3, 1), shuffled.select(range(4)), found.skip(60)):
        same(part, model, CLASSES, list(part["index"]))


def test_undecoded_pictures(model):
    found = data_set(image=IMAGES, label=CLASSES).cast_column("image", datasets.Image(decode=False))
    assert set(found[0]["image"]) == {"bytes", "path"}
    same(found, model, CLASSES)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (
            {"image": IMAGES, "fine_label": (CLASSES, NAMES), "coarse_label": (CLASSES, NAMES)},
            "expected one column of classes, got 'fine_label', 'coarse_label' "
            "(dataset.select_columns([image, label]) says which)",
        ),
        (
            {"image": IMAGES, "label": CLASSES, "target": CLASSES},
            "expected one column of classes, got 'label', 'target' (dataset.select_columns([image, label]) says which)",
        ),
        (
            {"image": IMAGES, "label": list("abcdefg") * 10},
            "expected class indices in 'label', got string (dataset.class_encode_column('label') makes them)",
        ),
        (
            {"image": IMAGES, "label": [0.5] * COUNT},
            "expected class indices in 'label', got float64 (dataset.class_encode_column('label') makes them)",
        ),
        (
            {"left": IMAGES, "right": IMAGES, "label": CLASSES},
            "expected one column of images, got 'left', 'right' (dataset.select_columns says which)",
        ),
        (
            {"image": IMAGES, "img": IMAGES, "label": CLASSES},
            "expected one column of images, got 'image', 'img' (dataset.select_columns says which)",
        ),
        (
            {"image": ["a.png"] * COUNT, "label": CLASSES},
            "expected one column of images, got 'image', 'label' "
            "(dataset.cast_column(name, datasets.Image()) says which)",
        ),
    ],
)
def test_what_cannot_be_told(model, columns, text):
    found = data_set(**columns)
    for read_, name in ((loader, "source"), (in_batches, "loader")):
        with pytest.raises(InvalidArgument) as caught:
            read_(found, model)
        assert str(caught.value) == f"{name}: {text}"


def test_the_advice_helps(model):
    two = data_set(image=IMAGES, fine_label=(CLASSES, NAMES), coarse_label=([0] * COUNT, NAMES))
    same(two.select_columns(["image", "fine_label"]), model, CLASSES)
    words = data_set(image=IMAGES, label=[f"n{index}" for index in CLASSES])
    same(words.class_encode_column("label"), model, CLASSES)
    left = data_set(left=IMAGES, right=(PICTURES[::-1], datasets.Image()), label=CLASSES)
    same(left.select_columns(["left", "label"]), model, CLASSES)
    same(data_set(image=IMAGES, fine_label=CLASSES).rename_column("fine_label", "label"), model, CLASSES)


WITHOUT = [
    (
        data_set(image=IMAGES, fine_label=CLASSES),
        "no column of classes among 'image', 'fine_label' (dataset.rename_column('fine_label', 'label') says which)",
    ),
    (
        data_set(image=IMAGES, fine=CLASSES, coarse=CLASSES).with_format("torch"),
        "no column of classes among 'image', 'fine', 'coarse' (dataset.rename_column(name, 'label') says which)",
    ),
    (
        data_set(image=IMAGES, caption=["a"] * COUNT),
        "no column of classes among 'image', 'caption' (dataset.rename_column(name, 'label') says which)",
    ),
    (
        [{"image": each, "fine_label": index} for each, index in zip(PICTURES, CLASSES, strict=True)],
        "no 'labels', 'label' or 'targets' among 'image', 'fine_label' (rename the one that is the class to 'label')",
    ),
    (PICTURES, "images alone"),
]


@pytest.mark.parametrize(("source", "got"), WITHOUT)
def test_without_classes_evaluate_says_what_there_is(model, source, got):
    same(source, model, [-1] * COUNT)
    batches = loader(source, model, batch_size=32)
    for held in (source, batches, batches.sharded(0, 2)):
        with pytest.raises(InvalidArgument) as caught:
            sc.evaluate(model, held)
        assert str(caught.value) == f"loader: expected (images, targets), got {got}"
    with pytest.raises(InvalidArgument) as caught:
        sc.finetune(model, batches, steps=1)
    assert str(caught.value) == f"loader: expected (images, targets), got {got}"


def test_a_class_of_minus_one_is_no_missing_class(model):
    for source in (data_set(image=IMAGES, label=[-1] * COUNT), [(each, -1) for each in PICTURES]):
        with pytest.raises(InvalidArgument, match=r"^loader: expected class indices from 0 to \d+, got -1$"):
            sc.evaluate(model, source)


@pytest.mark.parametrize("source", [source for source, _ in WITHOUT])
def test_calibration_and_distillation_need_no_classes(model, source):
    expected = sc.calibrate(model, [EXPECTED])
    found = sc.calibrate(model, source)
    assert found.images == expected.images == COUNT
    sc.finetune(model, loader(source, model, batch_size=32), teacher=small_vit(), alpha=1, steps=1)


def test_calibration_does_not_look_at_columns_of_classes(model):
    for columns in ({"fine": (CLASSES, NAMES), "coarse": (CLASSES, NAMES)}, {"label": list("abcdefg") * 10}):
        assert sc.calibrate(model, data_set(image=IMAGES, **columns)).images == COUNT


def transformed(batch):
    prepare = create_transform((3, 12, 12), interpolation="bicubic", mean=HALF, std=HALF, crop_pct=0.9)
    return {"pixel_values": [prepare(each) for each in batch["image"]], "label": batch["label"]}


def test_a_transform_of_its_own(model):
    found = data_set(image=IMAGES, label=CLASSES).with_transform(transformed)
    assert sc.evaluate(model, found) == sc.evaluate(model, data_set(image=IMAGES, label=CLASSES))
    assert sc.calibrate(model, found).images == COUNT
    sizes = [len(group) for group in in_batches(found, model)]
    assert sizes == [64, 6]
    with pytest.raises(InvalidArgument) as caught:
        loader(found, model)
    assert str(caught.value) == (
        "source: expected pictures, got what the data set's own transform makes of them; pass batches: "
        "torch.utils.data.DataLoader(dataset, batch_size=64)"
    )
    assert sc.evaluate(model, DataLoader(found, batch_size=64)) == sc.evaluate(model, found)


def test_streams(model):
    found = data_set(image=IMAGES, label=CLASSES)
    stream = found.to_iterable_dataset()
    assert sc.evaluate(model, stream) == sc.evaluate(model, found)
    assert sc.evaluate(model, stream, max_images=66).images == 66
    assert [len(group) for group in in_batches(stream, model)] == [64, 6]
    assert sc.calibrate(model, stream).images == COUNT
    text = (
        "source: expected a data set with indices, got a {} (pass 'hfids:NAME', or the data set itself to calibrate or "
        "evaluate)"
    )
    for source in (stream, datasets.IterableDatasetDict(train=stream)):
        with pytest.raises(InvalidArgument) as caught:
            loader(source, model)
        assert str(caught.value) == text.format(type(source).__name__)
    named = found.rename_column("label", "fine_label")
    for source in (named.to_iterable_dataset(), named.with_transform(lambda batch: batch)):
        with pytest.raises(InvalidArgument) as caught:
            sc.evaluate(model, source)
        got = "no 'labels', 'label' or 'targets' among 'image', 'fine_label'"
        assert str(caught.value) == f"loader: expected (images, targets), got {got}"


def test_splits(model):
    first = data_set(image=(PICTURES[:10], datasets.Image()), label=CLASSES[:10])
    rest = data_set(image=(PICTURES[10:], datasets.Image()), label=CLASSES[10:])
    splits = datasets.DatasetDict(train=rest, validation=first)
    for arguments, count in (({}, 10), ({"train": True}, 60), ({"split": "train"}, 60), ({"split": "validation"}, 10)):
        assert loader(splits, model, **arguments).images == count
    with pytest.raises(InvalidArgument, match=r"^split: expected one of 'train', 'validation', got 'test'$"):
        loader(splits, model, split="test")
    with pytest.raises(InvalidArgument, match=r"^split: expected none for a Dataset, got 'train'$"):
        loader(first, model, split="train")
    del splits["validation"]
    with pytest.raises(InvalidArgument, match=r"^split: expected one of 'train', got 'validation'$"):
        loader(splits, model)
    for run in (sc.evaluate, sc.calibrate):
        with pytest.raises(InvalidArgument, match=r"^loader: expected one split, got a DatasetDict of 'train'$"):
            run(model, splits)
    streams = datasets.IterableDatasetDict(train=first.to_iterable_dataset(), test=first.to_iterable_dataset())
    with pytest.raises(
        InvalidArgument, match=r"^loader: expected one split, got a IterableDatasetDict of 'train', 'tes"
    ):
        sc.calibrate(model, streams)


@pytest.mark.parametrize("kind", ["plain", "stream", "list"])
def test_finetuning_wants_batches(model, kind):
    found = data_set(image=IMAGES, label=CLASSES)
    source = {"plain": found, "stream": found.to_iterable_dataset(), "list": PICTURES}[kind]
    with pytest.raises(InvalidArgument) as caught:
        sc.finetune(model, source, steps=1)
    assert str(caught.value) == (
        f"loader: expected batches, got a {type(source).__name__} of single images; pass secateur.data.loader("
        "dataset, model, batch_size=…, shuffle=True, train=True)"
    )


def test_a_class_of_that_name_of_another_library(model):
    other = type("Dataset", (), {"__module__": "mydatasets", "__iter__": lambda self: iter([(EXPECTED, CLASSES)])})()
    assert in_batches(other, model) is other
    sub = type("Mine", (datasets.Dataset,), {"__module__": "mine"})
    found = data_set(image=IMAGES, label=CLASSES)
    found.__class__ = sub
    same(found, model, CLASSES)
