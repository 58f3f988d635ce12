"""`secateur export`."""

from typing import Annotated

import typer

import secateur as sc

from . import lazy
from .options import Checkpoint, Classes, Json, Kwargs, Model, Out, Pretrained, Threads, UseEma
from .output import collected
from .typed_options import parsed

__all__ = ["export"]


def export(
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    file_format: Annotated[
        str, typer.Option("--format", help="Format of the file: onnx, openvino, torch, or native for secateur's own.")
    ] = "onnx",
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes to compare the file with the model on.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="An option of the format, repeatable, as opset=20."),
    ] = None,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a model for another engine, and check the file there."""
    with collected(as_json) as output:
        options = parsed(lazy.exporters.named(file_format), option, {"batch_sizes": batch_sizes})
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema)
        report = sc.export(net, out, format=file_format, **options)
        output.show(str(report), **report.to_dict())
