"""From --model, --checkpoint and what goes with them to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import typer

from ..checkpoints.description import Description, described, said_by
from ..checkpoints.load import built, loaded, source_of, stated
from ..errors import Error, InvalidArgument
from .options import json_object
from .output import named

if TYPE_CHECKING:
    from torch import nn

    from ..plans.plan import Plan
    from ..statistics.statistics import Statistics

__all__ = ["model_from", "said"]


def said(value: Path | Plan | Statistics | None, option: str) -> Description | None:
    """Return what a plan, statistics, or a file say about the dense model; None for other files, or none."""
    if value is None:
        return None
    if isinstance(value, Path):
        try:
            return said_by(value)
        except (Error, OSError):
            return None  # it is read again, where it is needed
    return described(value, option)


def model_from(
    name: str | None,
    file: Path | None,
    pretrained: bool | None,
    classes: int | None,
    kwargs: str | None,
    use_ema: bool = False,
    *,
    weights: bool = True,
    prefix: str = "",
    like: Description | None = None,
) -> nn.Module:
    """Build or load a model, in evaluation mode.

    Args:
        name: a timm model name, or a file of secateur about the model; None where ``file`` or ``like`` says it.
        file: any file that ``load_dense`` reads.
        pretrained: take timm's weights, or random ones; random ones are the same in every process.
        classes: number of classes.
        kwargs: a JSON object of more arguments.
        use_ema: take the moving average of a checkpoint.
        weights: refuse random weights unless ``pretrained`` is False: those of this command would make no sense.
        prefix: what the names of the options begin with, as in "--teacher-model".
        like: what another file of the command says about the model.

    Raises:
        typer.BadParameter: options that do not go together, or no weights.
        InvalidArgument: timm cannot build the model, or the file is another.
    """
    option = f"--{prefix.removesuffix('-') or 'checkpoint'}"
    if name is None and file is None and like is None:
        raise typer.BadParameter(f"expected {option} FILE or --{prefix}model NAME")
    if file is not None and pretrained:
        raise typer.BadParameter(f"expected {option} or --{prefix}pretrained, got both")
    if use_ema and file is None:
        raise typer.BadParameter("--use-ema needs --checkpoint FILE")
    arguments: dict[str, Any] = {} if kwargs is None else json_object(kwargs)
    if classes is not None:
        arguments["num_classes"] = classes
    model = None if name is None else stated(name)
    if file is not None:
        with named(option):
            return loaded(file, model, arguments, use_ema=use_ema, like=like)
    if name is not None and source_of(name) is not None and pretrained is not False:
        with named(f"--{prefix}model"):
            return loaded(name, None, arguments)
    found = model or like
    assert found is not None
    found.require()
    if weights and pretrained is None:
        about = f": {found.source} says the model, {found.name}, and holds no weights" if found.from_file else ""
        random = "" if prefix else " (or --no-pretrained for random weights)"
        raise typer.BadParameter(f"expected {option} FILE or --{prefix}pretrained{random}{about}")
    arguments = {**found.arguments, **arguments}
    if pretrained and prefix and found.from_file:
        classes, config = arguments.get("num_classes"), timm.get_pretrained_cfg(found.weights_name)
        if config is not None and classes not in (None, config.num_classes):
            # timm would leave the head random.
            raise InvalidArgument(
                f"{option}: expected a file, since {found.source} is of {classes} classes, got --{prefix}pretrained, "
                f"whose weights have {config.num_classes}"
            )
    return built(found, arguments, pretrained=bool(pretrained)).eval()
