"""`secateur export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import secateur as sc

from . import lazy
from .options import DATA, Checkpoint, Classes, Json, Kwargs, Model, Pretrained, Seed, Split, Threads, UseEma
from .output import collected
from .typed_options import options_of, parsed

__all__ = ["export"]


def export(
    out: Annotated[Path, typer.Option("--out", help="The file to write, or a new folder.")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Format: onnx, openvino, executorch, ncnn, coreml, litert, torch, timm, transformers, hub (for timm), "
            "or native (secateur's own file).",
        ),
    ] = "onnx",
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes to compare the file with the model on.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="An option of the format, repeatable, as opset=20."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images for formats of fewer bits, as --option int8=true: a folder, a .tar, hfds:NAME, or digits.",
            rich_help_panel=DATA,
        ),
    ] = None,
    split: Split = None,
    max_images: Annotated[
        int, typer.Option("--max-images", min=1, help="Use this many images, drawn by --seed.", rich_help_panel=DATA)
    ] = 300,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a model for another engine, and check the file there."""
    with collected(as_json) as output:
        exporter = lazy.exporters.named(file_format)
        options: dict[str, Any] = parsed(exporter, option, {"batch_sizes": batch_sizes})
        if data is not None and "loader" not in {each.name for each in options_of(exporter)}:
            raise typer.BadParameter(f"expected no --data for {file_format}, which has no fewer bits, got {data}")
        lazy.path_for(exporter, "--out", out)
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema)
        if data is not None:
            options["loader"] = sc.data.loader(
                data,
                net,
                split=split or sc.data.default_split(data, train=True),
                max_images=max_images,
                # Folders are sorted by class: the first images would be of a few classes only.
                shuffle=not data.startswith("hfids:"),
                seed=seed,
            )
            options.setdefault("max_images", max_images)
        report = sc.export(net, out, format=file_format, **options)
        output.show(str(report), **report.to_dict())
