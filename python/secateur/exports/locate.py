"""Finds the module at which an engine departs from the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Error
from .base import largest_difference, random_images, tolerance

__all__ = ["Run", "first_difference", "located_difference"]

# Runs a file on images; it returns the output, or a list of several.
Run = Callable[[Tensor], Any]


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


def located_difference(
    model: nn.Module,
    run: Run,
    batch_sizes: Sequence[int],
    engine: str,
    convert: Callable[[nn.Module, Path], Run],
    *,
    batch: int = 2,
    dtype: torch.dtype | None = None,
) -> float:
    """Return the largest absolute difference between an engine's and the model's outputs on random images.

    Args:
        model: in evaluation mode, on the CPU.
        run: runs the file.
        batch_sizes: of the images.
        engine: its name, for error texts.
        convert: makes of a module with several outputs, in an empty folder, what runs in the engine.
        batch: images on which modules are compared, if outputs differ.
        dtype: in which the engine computes, where it is not the model's.

    Raises:
        Error: the difference is more than rounding, or the engine fails on a batch or returns another shape; the text
            names the first module that differs, if one does.
    """

    def one(images: Tensor) -> Any:
        found = run(images)
        return found[0] if isinstance(found, (list, tuple)) and len(found) == 1 else found

    try:
        return largest_difference(model, one, batch_sizes, engine, dtype)
    except Error as error:
        try:
            with tempfile.TemporaryDirectory() as folder:
                first = first_difference(model, lambda watched: convert(watched, Path(folder)), batch, dtype)
        except Exception:  # the search is a favour; what it was for is the error
            first = None
        if first is None:
            raise
        name, off = first
        raise type(error)(f"{error}; the first module that differs is {name} (by {off:.3g})") from error


@torch.inference_mode()
def first_difference(
    model: nn.Module, load: Callable[[nn.Module], Run], batch: int, dtype: torch.dtype | None = None
) -> tuple[str, float] | None:
    """Return the name of the first module whose output differs in the engine, and by how much; None if none does.

    Of nested modules the inner one comes first.

    Args:
        model: in evaluation mode, on the CPU.
        load: makes of a module, whose outputs are several tensors, what runs in the engine and returns as many.
        batch: images that are compared.
        dtype: in which the engine computes, where it is not the model's.
    """
    images = random_images(model, batch)
    ended: list[str] = []
    with _kept(model, lambda name, output: ended.append(name) if output.is_floating_point() else None):
        model(images)
    names = [name for name in ended if ended.count(name) == 1]
    watched = _Watched(model, names).eval()
    wanted = watched(images)
    found = load(watched)(images)
    found = found if isinstance(found, (list, tuple)) else [found]
    for name, expected, other in zip(names, wanted, found, strict=True):
        off = float((torch.as_tensor(other).double() - expected.double()).abs().max())
        if not off <= tolerance(expected, dtype):
            return name, off
    return None
