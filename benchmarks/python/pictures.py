"""Photographs in folders of classes, as a model takes them: decoded once, kept as bytes, normalised when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from torch import Tensor

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images (n, 3, H, W) in bytes with their classes (n,), or −1 where the class is not known.

    A slice of them is what timm's evaluation transform gives, to the bit: float32, divided by 255, then normalised.
    """

    pixels: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return self.pixels[which].float().div_(255).sub_(mean).div_(std)

    def only(self, which: Tensor) -> Pictures:
        return Pictures(self.pixels[which], self.labels[which], self.mean, self.std)

    @property
    def digest(self) -> str:
        found = hashlib.sha256(self.pixels.numpy())
        found.update(json.dumps([self.labels.tolist(), list(self.mean), list(self.std)]).encode())
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class Batches:
    """Batches (images, labels) that can be read again."""

    pictures: Pictures
    size: int = 50

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.pictures), self.size):
            yield self.pictures[first : first + self.size], self.pictures.labels[first : first + self.size]

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.size)


def read(folder: Path, config: Mapping[str, Any], cache: Path, classes: Sequence[str] | None = None) -> Pictures:
    """The images of ``folder``, which has one folder for each class, from ``cache`` where they were decoded before.

    Args:
        folder: its folders are read in alphabetical order, and so are their files.
        config: timm's data configuration of the model.
        cache: folder for the decoded images; nothing else is written.
        classes: names of the folders in the order of the model's classes; the folders themselves unless given.
    """
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise SystemExit(f"{folder}: expected folders of images, one for each class, got none")
    names = sorted({path.parent.name for path in files}) if classes is None else list(classes)
    place = {name: index for index, name in enumerate(names)}
    wanted = {name: config[name] for name in ("input_size", "interpolation", "crop_pct", "crop_mode")}
    listed = [(path.parent.name, path.name, path.stat().st_size) for path in files]
    name = hashlib.sha256(json.dumps([wanted, listed]).encode()).hexdigest()[:24]
    kept = cache / f"pictures-{name}.safetensors"
    if not kept.is_file():
        transform = create_transform(**wanted, is_training=False, normalize=False)
        pixels = torch.stack([_decoded(path, transform) for path in files])
        cache.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(".part")
        save_file({"pixels": pixels}, temporary)
        temporary.replace(kept)
    labels = torch.tensor([place.get(path.parent.name, -1) for path in files])
    return Pictures(load_file(kept)["pixels"], labels, config["mean"], config["std"])


def _decoded(path: Path, transform: Any) -> Tensor:
    with Image.open(path) as image:
        found: Tensor = transform(image.convert("RGB"))
    assert found.dtype == torch.uint8
    return found
