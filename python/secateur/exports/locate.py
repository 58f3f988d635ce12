"""Finds the module at which an engine departs from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .base import random_images, tolerance

__all__ = ["first_difference"]


class _Watched(nn.Module):
    """A model whose outputs are those of its modules, in the order in which they end."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = model, names  # data_config looks into this one

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        with _kept(self.module, lambda name, output: outputs.append(output) if name in self.names else None):
            self.module(images)
        return tuple(outputs)


@contextmanager
def _kept(model: nn.Module, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _given, output: keep(name, output) if isinstance(output, Tensor) else None

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def first_difference(
    model: nn.Module, load: Callable[[nn.Module], Callable[[Tensor], Any]], batch: int
) -> tuple[str, float] | None:
    """Return the name of the first module whose output differs in the engine, and by how much; None if none does.

    Of nested modules the inner one comes first.

    Args:
        model: in evaluation mode, on the CPU.
        load: makes of a module, whose outputs are several tensors, what runs in the engine and returns as many.
        batch: images that are compared.
    """
    images = random_images(model, batch)
    ended: list[str] = []
    with _kept(model, lambda name, output: ended.append(name) if output.is_floating_point() else None):
        model(images)
    names = [name for name in ended if ended.count(name) == 1]
    watched = _Watched(model, names).eval()
    wanted = watched(images)
    found = load(watched)(images)
    for name, expected, other in zip(names, wanted, found, strict=True):
        off = float((torch.as_tensor(other).double() - expected.double()).abs().max())
        if not off <= tolerance(expected):
            return name, off
    return None
