"""Finds where a model is, and moves it to where it runs for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def place_for(model: nn.Module, device: torch.device | str | None = None, *, argument: str = "model") -> torch.device:
    """Return the device that a model is to run on: ``device``, or else its own.

    Raises:
        InvalidArgument: it is not a module or has no weights (``argument`` names it), or there is no such device.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"{argument}: expected an nn.Module, got {type(model).__name__}")
    if any(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
        raise InvalidArgument(f"{argument}: expected a model with weights, got one on the meta device")
    if device is None:
        return device_of(model)
    try:
        place = torch.device(device)
        if place.type != "cpu":
            torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidArgument(f"device: expected one that is there, got {str(device)!r} ({reason})") from error
    if place.type == "meta":
        raise InvalidArgument(f"device: expected one that computes, got {str(device)!r}")
    return place


@contextmanager
def borrowed(
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    training: bool = False,
    argument: str = "model",
) -> Iterator[torch.device]:
    """Move a model to a mode and a device while the block runs, and restore every module afterwards in any case.

    Raises:
        InvalidArgument: as `place_for`.
    """
    place = place_for(model, device, argument=argument)
    modes = [(module, module.training) for module in model.modules()]
    home = device_of(model)
    try:
        model.train(training)
        if place != home:
            model.to(place)
        yield place
    finally:
        for module, mode in modes:
            module.training = mode
        if device is not None and device_of(model) != home:
            model.to(home)
