"""Where a model is, and where it runs for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter or buffer is; the CPU if it has none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def place_for(model: nn.Module, device: torch.device | str | None = None, *, argument: str = "model") -> torch.device:
    """Return where a model is to run: ``device``, or else where it is.

    Raises:
        InvalidArgument: it is no module or without weights (``argument`` names it), or there is no such device.
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
    """Put a model into one mode and on one device, and every module of it back afterwards, on an exception too.

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
