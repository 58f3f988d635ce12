"""From --model, --checkpoint and what goes with them to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import timm
import torch
import typer

from ..errors import InvalidArgument
from ..exports.native import load
from ..files.container import KEY, little_endian
from ..files.safetensors import read_table, read_tensors
from ..runtime import generators
from .options import json_object
from .output import named

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["load_state", "model_from"]


def model_from(
    name: str | None,
    file: Path | None,
    pretrained: bool | None,
    classes: int | None,
    kwargs: str | None,
    *,
    weights: bool = True,
    prefix: str = "",
) -> nn.Module:
    """Build or load a model, in evaluation mode.

    Args:
        name: a timm model name, or None for a file of secateur.
        file: a file of secateur, or with ``name`` a state dict.
        pretrained: take timm's weights, or random ones; random ones are the same in every process.
        classes: number of classes, with ``name``.
        kwargs: a JSON object of more arguments, with ``name``.
        weights: refuse random weights unless ``pretrained`` is False: those of this command would make no sense.
        prefix: what the names of the options begin with, as in "--teacher-model".

    Raises:
        typer.BadParameter: options that do not go together.
        InvalidArgument: timm cannot build the model, or the file is another.
    """
    option = f"--{prefix.removesuffix('-') or 'checkpoint'}"
    if name is None:
        if file is None:
            raise typer.BadParameter(f"expected --{prefix}checkpoint FILE or --{prefix}model NAME")
        if pretrained is not None or classes is not None or kwargs is not None:
            raise typer.BadParameter("--pretrained, --num-classes and --model-kwargs need --model")
        with named(option):
            return load(file)
    if file is not None and pretrained:
        raise typer.BadParameter("expected --checkpoint or --pretrained, got both")
    if weights and file is None and pretrained is None:
        raise typer.BadParameter("expected --checkpoint FILE or --pretrained (or --no-pretrained for random weights)")
    arguments = {} if kwargs is None else json_object(kwargs)
    if classes is not None:
        arguments["num_classes"] = classes
    try:
        # Random weights are the same in every process: what one command made of them, another finds again.
        with generators.kept():
            torch.default_generator.manual_seed(0)
            model: nn.Module = timm.create_model(name, pretrained=bool(pretrained), **arguments)
    except Exception as error:  # timm, the hub and the network raise what they like; it is this model that failed
        raise InvalidArgument(f"model: expected a model that timm can build, got {name!r} ({error})") from error
    if file is not None:
        load_state(model, name, file, option)
    return model.eval()


def load_state(model: nn.Module, name: str, file: Path, option: str) -> None:
    """Load a state dict of any program into a model.

    Raises:
        InvalidArgument: the file is no .safetensors file, is a file of secateur, or holds other parameters.
    """
    with named(option):
        little_endian(file)
    try:
        with file.open("rb") as opened:
            # Of any program: metadata are any strings, in a header of at most 8 MiB.
            metadata, entries = read_table(opened)
            own = KEY in metadata
            state = {} if own else read_tensors(opened, entries)
    except (ValueError, OSError, RuntimeError) as error:
        raise InvalidArgument(f"{option}: expected a .safetensors file, got {str(file)!r} ({error})") from error
    if own:
        raise InvalidArgument(f"{option}: expected a plain state dict with --model, got a file of secateur's own")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InvalidArgument(f"{option}: expected the parameters of {name!r}, got others ({error})") from error
