"""`secateur prune`."""

from pathlib import Path
from typing import Annotated

import typer

import secateur as sc

from . import lazy
from .options import Checkpoint, Classes, Json, Kwargs, Loose, Model, Out, Pretrained
from .output import collected, named

__all__ = ["prune"]


def prune(
    plan: Annotated[Path, typer.Option("--plan", help="The plan file that plan wrote.")],
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout", help="exact: attention of the kept sizes; stock: timm's own modules, padded with zeros."
        ),
    ] = "exact",
    last_block: Annotated[
        str | None,
        typer.Option(
            "--last-block",
            help="pooled: only the tokens that the output uses (default of class-token classifiers); whole: all.",
        ),
    ] = None,
    strict: Loose = True,
    as_json: Json = False,
) -> None:
    """Cut a model as planned, and save the smaller one."""
    with collected(as_json) as output:
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs)
        with named("--plan"):
            wanted = sc.Plan.load(plan)
        report = sc.prune(net, wanted, layout=layout, last_block=last_block, strict=strict)
        sc.save(net, out)
        output.show(str(report), f"-> {out}", **report.to_dict(), file=str(out))
