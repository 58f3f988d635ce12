"""What fine-tuning repeats: the images of each pass and the teacher's answers, kept for the next model; CUDA graphs."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import secateur as sc
import torch
from safetensors.torch import load_file, save_file
from secateur.families.vision_transformer.modules import PrunedAttention
from torch import Tensor, nn


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(dict(tensors), temporary)
    temporary.replace(path)


class Passes(Iterable[Any]):
    """Training batches of a loader, the images of every pass kept in a file: the same for all models of one seed.

    The transforms of an epoch of small images take a core longer than a GPU's steps do.
    """

    def __init__(self, loader: sc.data.ImageLoader, folder: Path, device: str) -> None:
        self.loader, self.folder, self.device, self.epoch = loader, folder, device, 0

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def file(self) -> Path:
        """The file of the present pass, written where there is none."""
        path = self.folder / f"pass-{self.epoch}.safetensors"
        if not path.is_file():
            self.loader.set_epoch(self.epoch)
            # What worker processes send stays in shared memory, with a file open for each tensor, until it is copied.
            parts = [(images.clone(), targets.clone()) for images, targets in self.loader]
            images, targets = map(torch.cat, zip(*parts, strict=True))
            keep(path, {"images": images, "targets": targets})
        return path

    def __iter__(self) -> Iterator[Any]:
        found = load_file(self.file(), device=self.device)
        batches = (found[name].split(self.loader.batch_size) for name in ("images", "targets"))
        yield from zip(*batches, strict=True)


class Answers(nn.Module):
    """A teacher whose logits are kept in files, by the images' bits and the precision they were asked for in.

    On one core of a CPU a dense teacher takes as long as the training step of a model of half its MACs.
    """

    def __init__(self, teacher: nn.Module, folder: Path) -> None:
        super().__init__()
        self.teacher, self.folder = teacher, folder

    def forward(self, images: Tensor) -> Tensor:
        kind = images.device.type
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else str(images.dtype)
        content = hashlib.sha256(images.cpu().contiguous().numpy())
        content.update(f"{tuple(images.shape)} {images.dtype} {precision} {kind}".encode())
        path = self.folder / f"{content.hexdigest()[:32]}.safetensors"
        if path.is_file():
            return load_file(path, device=str(images.device))["logits"]
        logits: Tensor = self.teacher(images)
        keep(path, {"logits": logits})
        return logits


@contextmanager
def attention(model: nn.Module, *, fused: bool) -> Iterator[None]:
    """Have a model's attention be torch's fused function, or plain products, while the block runs.

    timm's fused attention knows no scale but 1/√head_dim. Where its products have another, as in what Torch-Pruning
    leaves, the two are not one function, and the module stays as it is.
    """
    before = [
        (module, module.fused_attn)
        for module in model.modules()
        if hasattr(module, "fused_attn")
        and (isinstance(module, PrunedAttention) or math.isclose(module.scale, module.head_dim**-0.5))
    ]
    try:
        for module, _ in before:
            module.fused_attn = fused
        yield
    finally:
        for module, was in before:
            module.fused_attn = was


@contextmanager
def captured(model: nn.Module, images: Tensor, amp: str | None) -> Iterator[None]:
    """Have a model on a GPU train by CUDA graphs of forward and backward, for images of this shape, in the block.

    A model of CIFAR's size has kernels shorter than their launch: several processes share a GPU better this way. What
    the kernels compute is the same.
    """
    if hasattr(model, "set_distilled_training"):
        raise SystemExit("--tune-graphs: expected a model of one head, whose forward pass is the same in training")
    eager, training = model.forward, model.training
    precision = None if amp is None else getattr(torch, amp)
    model.train()
    with torch.autocast("cuda", precision, enabled=amp is not None, cache_enabled=False):
        torch.cuda.make_graphed_callables(model, (images,), allow_unused_input=True)
    model.train(training)
    graphed = model.forward

    def forward(batch: Tensor) -> Any:
        return (graphed if batch.shape == images.shape else eager)(batch)

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward
