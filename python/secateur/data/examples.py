"""Data sets and lists of single images as sources: of Hugging Face, of torch, lists of PIL images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import InvalidArgument
from ..runtime import generators
from . import forms

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Examples", "Grouped", "is_stream", "is_transformed", "of_hub", "one_by_one", "split_of"]


def of_hub(source: object) -> str:
    """Return the name of the class of `datasets` that the source is of, or nothing."""
    names = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    for base in type(source).__mro__:
        if base.__module__.partition(".")[0] == "datasets" and base.__name__ in names:
            return base.__name__
    return ""


def is_stream(source: object) -> bool:
    """Return whether it is a data set of `datasets` that is read in its own order only."""
    return of_hub(source) == "IterableDataset"


def is_transformed(source: Any) -> bool:
    """Return whether a data set of `datasets` has a transform of its own (``with_transform``, ``set_transform``)."""
    return of_hub(source) == "Dataset" and source.format["type"] == "custom"


def one_by_one(source: object) -> bool:
    """Return whether iterating over the source gives single pictures, with or without a class, and not batches."""
    if of_hub(source):
        return True
    if isinstance(source, (list, tuple)):
        return bool(source) and forms.is_example(source[0])
    if isinstance(source, DataLoader) or not isinstance(source, Dataset) or isinstance(source, IterableDataset):
        return False
    if not hasattr(source, "__len__") or len(source) == 0:
        return False
    with generators.kept():  # a transform may draw
        first = source[0]
    if forms.is_single_tensor(first):
        raise InvalidArgument(
            f"source: expected pictures or batches, got the data set {type(source).__name__} of single tensors; pass "
            "torch.utils.data.DataLoader(dataset, batch_size=64)"
        )
    return forms.is_example(first)


def split_of(source: Any, split: str | None, *, train: bool) -> Any:
    """Return the split of a dictionary of data sets; the source itself if it is one data set.

    Raises:
        InvalidArgument: there is no such split, or a split of one data set.
    """
    if not of_hub(source).endswith("Dict"):
        if split is not None:
            raise InvalidArgument(f"split: expected none for a {type(source).__name__}, got {split!r}")
        return source
    split = split or ("train" if train else "validation")
    if split not in source:
        raise InvalidArgument(f"split: expected one of {', '.join(map(repr, source))}, got {split!r}")
    return source[split]


class Examples:
    """A data set or list of single pictures as a reader: (picture, class index), -1 where there is no class.

    With ``labels`` false, classes are not looked at. ``unlabelled`` describes a source in which none were found.

    Raises:
        InvalidArgument: it holds no pictures, several that could be meant, or labels that are not class indices.
    """

    def __init__(self, source: Any, *, labels: bool = True) -> None:
        self._labels = labels
        self.description = f"{type(source).__name__} of {len(source)} images"
        self.unlabelled = ""
        if of_hub(source):
            if is_transformed(source):
                raise InvalidArgument(
                    "source: expected pictures, got what the data set's own transform makes of them; pass batches: "
                    "torch.utils.data.DataLoader(dataset, batch_size=64)"
                )
            image, label = _image_column(source.features), _label_column(source.features) if labels else None
            if labels and label is None:
                self.unlabelled = _unlabelled(source.features)
            # Formats of torch and numpy make tensors of pictures.
            source = source.with_format(None).select_columns([name for name in (image, label) if name is not None])
            names = {image: "image"} | ({} if label is None else {label: "label"})
            self.description = f"datasets.Dataset {source._fingerprint}"
            source = source.rename_columns({old: new for old, new in names.items() if old != new})
        elif not one_by_one(source):
            raise InvalidArgument(
                "source: expected a path, a name, or a data set or list of PIL images, alone, in pairs (image, class) "
                f"or in mappings, got {type(source).__name__}"
            )
        self._source = source
        label = forms.example(source[0], labels)[1]
        _index(label)
        if label is None and labels and not self.unlabelled:
            self.unlabelled = _unlabelled_items(source[0])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = forms.example(self._source[index], self._labels)
        return forms.opened(image), _index(label)


def _image_column(features: Any) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(found) > 1:
        known = [name for name in forms.IMAGES if name in found]
        found = known if len(known) == 1 else found
    if len(found) != 1:
        names = ", ".join(map(repr, found or features))
        hint = "select_columns" if found else "cast_column(name, datasets.Image())"
        raise InvalidArgument(f"source: expected one column of images, got {names} (dataset.{hint} says which)")
    return str(found[0])


def _label_column(features: Any) -> str | None:
    """Return the column of class indices: by its name, or the only one that is known to be one."""
    found = [name for name in forms.LABELS if name in features]
    found = found or [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    if len(found) > 1:
        raise InvalidArgument(
            f"source: expected one column of classes, got {', '.join(map(repr, found))} "
            "(dataset.select_columns([image, label]) says which)"
        )
    if not found:
        return None
    feature = features[found[0]]
    if type(feature).__name__ != "ClassLabel" and "int" not in str(getattr(feature, "dtype", "")):
        raise InvalidArgument(
            f"source: expected class indices in {found[0]!r}, got {getattr(feature, 'dtype', type(feature).__name__)} "
            f"(dataset.class_encode_column({found[0]!r}) makes them)"
        )
    return str(found[0])


def _unlabelled(features: Any) -> str:
    """Describe a data set without a column of classes, and say how to choose one."""
    whole = [name for name, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
    which = repr(whole[0]) if len(whole) == 1 else "name"
    names = ", ".join(map(repr, features))
    return f"no column of classes among {names} (dataset.rename_column({which}, 'label') says which)"


def _unlabelled_items(item: Any) -> str:
    found = forms.without_labels(item)
    return found if forms.named(item) is None else f"{found} (rename the one that is the class to 'label')"


def _index(label: Any) -> int:
    if label is None:
        return -1
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():
        return int(label)
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise InvalidArgument(f"source: expected class indices, got {label!r}")
    return int(label)


class Grouped:
    """Single examples in lists of ``size``, which `split_batch` reads; can be read several times if they can."""

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self._size = dataset, size

    def __iter__(self) -> Iterator[Sequence[Any]]:
        source = iter(self.dataset)
        while group := list(islice(source, self._size)):
            yield group
