"""Finds where a model is, and moves it to where it runs for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InvalidArgument, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def runnable(model: nn.Module | torch.export.ExportedProgram, argument: str = "model") -> nn.Module:
    """Return the module of an exported program; a module as it is.

    Raises:
        InvalidArgument: it is neither (``argument`` names it).
    """
    found = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    if not isinstance(found, nn.Module):
        raise InvalidArgument(f"{argument}: expected an nn.Module, got {type(found).__name__}")
    return found


def place_for(model: object, device: torch.device | str | None = None, *, argument: str = "model") -> torch.device:
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
        reason = first_line(error)
        raise InvalidArgument(f"device: expected one that is there, got {str(device)!r} ({reason})") from error
    if place.type == "meta":
        raise InvalidArgument(f"device: expected one that computes, got {str(device)!r}")
    return place


def set_mode(model: nn.Module, training: bool) -> None:
    """Set a model's mode; the module of an exported program keeps the one that it was exported in.

    Raises:
        InvalidArgument: that one is the other one.
    """
    try:
        model.train(training)
    except NotImplementedError as error:
        if training:
            raise InvalidArgument(
                "model: expected one that can train, got the module of an exported program, whose mode is fixed"
            ) from error
        graph = getattr(model, "graph", None)
        if any(_trains(node) for node in getattr(graph, "nodes", ())):
            raise InvalidArgument(
                "model: expected a program exported in evaluation mode, got one exported in training mode, with "
                "dropout or batch norms that learn"
            ) from error


def _trains(node: Any) -> bool:
    """Return whether a node of a graph drops units at random or updates a batch norm."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return False
    name = str(schema.name).removeprefix("aten::")
    if name == "_native_batch_norm_legit_functional":
        return True
    if "dropout" in name and node.args[1] == 0:
        return False
    at = {"dropout": 2, "native_dropout": 2, "feature_dropout": 2, "batch_norm": 5, "_native_batch_norm_legit": 5}.get(
        name
    )
    return at is not None and len(node.args) > at and bool(node.args[at])


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
    # A frozen module of torch.jit has no mode.
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    home = device_of(model)
    try:
        set_mode(model, training)
        if place != home:
            model.to(place)
        yield place
    finally:
        for module, mode in modes:
            module.training = mode
        if device is not None and device_of(model) != home:
            model.to(home)
