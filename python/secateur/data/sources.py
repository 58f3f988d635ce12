"""Sources of images: folders, tars, Hugging Face data sets and scikit-learn's digits, through timm's readers."""

from __future__ import annotations

import importlib.util
import tarfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from timm.data import create_dataset

from ..errors import InvalidArgument

if TYPE_CHECKING:
    import os

    from PIL import Image

__all__ = ["HUB_PREFIXES", "Digits", "Reader", "default_split", "files", "hub"]

HUB_PREFIXES = ("hfds", "hfids")
_TRAIN_FOLDERS = ("train", "training")
_EVAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test")


def default_split(source: str | os.PathLike[str], *, train: bool) -> str | None:
    """Return the split that `loader` reads by default: the one for training, or the one for evaluation.

    None means the whole source: a tar, or a folder without both a training and a validation folder.
    """
    name = str(source)
    if name == "digits":
        return "train" if train else "test"
    if name.partition(":")[0] in HUB_PREFIXES:
        return "train" if train else "validation"
    # Both must exist: a single folder "train" may be a class of vehicles.
    found = [
        next((folder for folder in folders if (Path(name) / folder).is_dir()), None)
        for folders in (_TRAIN_FOLDERS, _EVAL_FOLDERS)
    ]
    return None if None in found else found[0 if train else 1]


class Reader(Protocol):
    """The interface of timm's readers: a sequence of (open file or image, class index)."""

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...

    def __len__(self) -> int: ...


class Digits:
    """scikit-learn's digits as a timm reader."""

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise InvalidArgument(f"split: expected 'train' or 'test' for digits, got {split!r}")
        if importlib.util.find_spec("sklearn") is None:
            raise InvalidArgument(
                "source: expected scikit-learn to be installed for 'digits' (pip install scikit-learn), got no sklearn"
            )
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        halves = train_test_split(pixels, labels, test_size=0.5, stratify=labels, random_state=0)
        pixels, labels = (halves[0], halves[2]) if split == "train" else (halves[1], halves[3])
        self.split = split
        # The data set has grey levels 0 to 16.
        self._pixels = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._labels = labels

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        from PIL import Image

        return Image.fromarray(self._pixels[index]), int(self._labels[index])

    def __len__(self) -> int:
        return len(self._labels)


def files(name: str, split: str | None) -> tuple[Reader, str]:
    """Return timm's reader for an image folder or a tar, and the path that it reads.

    Raises:
        InvalidArgument: the source does not exist, or holds no images or no such split.
    """
    path = Path(name)
    arguments: dict[str, Any] = {}
    if path.is_dir():
        if split is not None and not (path / split).is_dir():
            raise InvalidArgument(f"split: expected a sub-folder of {name!r}, got {split!r}")
        path = path / (split or "")
    elif path.is_file() and path.suffix == ".tar":
        if split is not None:
            raise InvalidArgument(f"split: expected none for a tar, got {split!r}")
        # Else timm would save the index of a large tar as a pickle beside it.
        arguments = {"cache_tarinfo": False}
    else:
        raise InvalidArgument(
            "source: expected an image folder, a .tar, 'hfds:NAME', 'hfids:NAME' or 'digits', "
            f"got {name!r}" + ("" if path.exists() else ", which does not exist")
        )
    try:
        reader = create_dataset("", root=str(path), search_split=False, **arguments).reader
    except (RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        raise InvalidArgument(f"source: expected images in {str(path)!r}, got none ({error})") from error
    if arguments:
        weakref.finalize(reader, _close, reader.tar_state)
    return reader, str(path)


def _close(tar: Any) -> None:
    """Close the files that timm's reader opens and never closes itself."""
    for state in (*tar.children.values(), tar):
        if state.tf is not None:
            state.tf.close()


def hub(prefix: str, name: str, split: str, mode: str, seed: int, shuffle: bool, max_images: int | None) -> Any:
    """Return timm's data set for a Hugging Face data set: ``hfds`` by index, ``hfids`` as a stream.

    Raises:
        InvalidArgument: ``datasets`` is not installed, there is no such data set or split, or the length of a stream
            must be given.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InvalidArgument(
            f"source: expected the package 'datasets' for '{prefix}:{name}' (pip install datasets), got none installed"
        )
    arguments: dict[str, Any] = {"split": split, "input_img_mode": mode}
    if prefix == "hfids":
        # The reader shuffles a stream itself; with a batch size of 1 it makes exactly one pass.
        arguments.update(is_training=shuffle, seed=seed, batch_size=1)
    try:
        try:
            return create_dataset(f"{prefix}/{name}", **arguments)
        except ValueError as error:
            if prefix == "hfds" or "num_samples" not in str(error) or max_images is None or shuffle:
                raise
            return create_dataset(f"{prefix}/{name}", num_samples=max_images, **arguments)
    except Exception as error:  # hub, disk and network can raise anything
        if "num_samples" in str(error):
            raise InvalidArgument(
                f"max_images: expected a number, and no shuffle, for a stream of unknown length, got {max_images}, "
                f"shuffle={shuffle} for {name!r} ({split})"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidArgument(
            f"source: expected a Hugging Face data set with a split {split!r}, got {name!r} ({reason})"
        ) from error
