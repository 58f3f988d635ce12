"""`secateur bench`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import secateur as sc

from . import lazy
from .options import (
    Checkpoint,
    Classes,
    Device,
    Json,
    Kwargs,
    Model,
    Pretrained,
    Runtime,
    Threads,
    UseEma,
    file_to_write,
    names,
)
from .output import collected

__all__ = ["bench"]


def bench(
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    reference: Annotated[
        Path | None,
        typer.Option(help="Compare with this file, of any kind that --checkpoint takes."),
    ] = None,
    reference_model: Annotated[
        str | None, typer.Option(help="Name of a timm model, where neither --reference nor --checkpoint says it.")
    ] = None,
    reference_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="More arguments of --reference-model.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in a batch; 32 by default, 1 with --table.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Side of an image in pixels; the model's own by default.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Number of timed runs; 15 by default, 7 with --table.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Number of runs before the timed ones.")] = 3,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            help="Time each layer at many sizes instead, and write the table for plan --latency-table.",
            callback=file_to_write,
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type with --table: float32, float16, bfloat16 or float64.")] = None,
    groups: Annotated[
        str | None, typer.Option(help="Kinds that plans will cut, with --table; all but tokens by default.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time the models as compiled by torch.compile.")] = False,
    runtime: Runtime = None,
    reference_runtime: Annotated[
        str | None, typer.Option(help="Engine that runs the reference; that of --runtime by default.")
    ] = None,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time inference, with --reference in paired runs; with --table, layer by layer, for plan --target-latency."""
    if table is not None and (reference is not None or reference_model is not None or input_size is not None):
        raise typer.BadParameter("--table goes without --reference and --input-size: it is about one model as it is")
    if table is None and (dtype is not None or groups is not None):
        raise typer.BadParameter("--dtype and --groups need --table")
    if table is not None and reference_runtime is not None:
        raise typer.BadParameter("--reference-runtime goes without --table")
    if compiled and runtime is not None:
        raise typer.BadParameter("expected --compile or --runtime, got both")
    with collected(as_json) as output:
        like = lazy.said(reference, "--reference")
        net = lazy.model_from(
            model, checkpoint, pretrained, num_classes, model_kwargs, use_ema, weights=False, like=like
        )
        if table is not None:
            measured = sc.measure_latency(
                net,
                batch_size=1 if batch_size is None else batch_size,
                dtype=dtype,
                device=device,
                compile=compiled,
                runtime=runtime,
                groups=None if groups is None else names(groups),
                repeats=7 if repeats is None else repeats,
            )
            measured.save(table)
            output.show(f"{measured} -> {table}", machine=measured.machine.to_dict(), file=str(table))
            return
        other = None
        if reference is not None or reference_model is not None:
            like = lazy.said(checkpoint, "--checkpoint")
            other = lazy.model_from(
                reference_model, reference, None, None, reference_kwargs, weights=False, prefix="reference-", like=like
            )
        found = sc.bench(
            net,
            other,
            batch_size=32 if batch_size is None else batch_size,
            input_size=input_size,
            repeats=15 if repeats is None else repeats,
            warmup=warmup,
            threads=threads,
            device=device,
            compile=compiled,
            runtime=runtime,
            reference_runtime=reference_runtime,
        )
        output.show(str(found), **asdict(found))
