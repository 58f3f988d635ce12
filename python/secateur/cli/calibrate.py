"""`secateur calibrate`."""

from typing import Annotated, Any

import typer

import secateur as sc

from . import lazy
from .options import (
    BatchSize,
    Checkpoint,
    Classes,
    Data,
    Device,
    Every,
    Json,
    Kwargs,
    MaxImages,
    Model,
    Out,
    Pretrained,
    Resume,
    Seed,
    Split,
    Threads,
    Unreadable,
    UseEma,
    Workers,
    names,
)
from .output import collected

__all__ = ["calibrate"]


def calibrate(
    data: Data,
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = 1024,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    collect: Annotated[
        str, typer.Option(help="What to collect: scores, or all for second moments too (refit and project need them).")
    ] = "all",
    gamma: Annotated[int, typer.Option(min=1, help="Number of leading singular directions that SNP scores.")] = 8,
    token_fraction: Annotated[float, typer.Option(help="Fraction of the tokens that enter the moments.")] = 1.0,
    row_weights: Annotated[
        bool | None,
        typer.Option(
            "--row-weights/--no-row-weights",
            help="Weigh tokens in the moments by what depends on them. Default: with --sensitivity.",
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Also measure what cutting each group costs, to share out budgets."),
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Methods that --sensitivity measures; project by default."),
    ] = None,
    noise: Annotated[
        bool,
        typer.Option("--noise", help="Instead measure how much noise costs, for --allocation error."),
    ] = False,
    head_gradients: Annotated[
        bool,
        typer.Option("--head-gradients", help="Also score heads by gradients, for plan --option head_score=michel."),
    ] = False,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Also gather gradients, for methods that need them (see secateur methods)."),
    ] = False,
    loss: Annotated[
        str | None,
        typer.Option(help="What gradients are of: labels, for their cross-entropy; else the model's own answers."),
    ] = None,
    amp: Annotated[
        str | None, typer.Option(help="Type of the forward passes of gradients: bfloat16, under autocast.")
    ] = None,
    resume: Resume = None,
    checkpoint_every: Every = None,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Collect a model's statistics over images, without labels; reads the training split by default."""
    if noise and (sensitivity or methods is not None):
        raise typer.BadParameter("expected --noise without --sensitivity and --methods")
    with collected(as_json) as output, lazy.joined() as ranks:
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema)
        net.to(lazy.place_for(net, ranks.device(device)))
        split = split or sc.data.default_split(data, train=True)
        # Folders are sorted by class: the first images would be of a few classes only.
        shuffle = not data.startswith("hfids:")
        images = sc.data.loader(
            data,
            net,
            split=split,
            batch_size=batch_size,
            workers=workers,
            max_images=max_images,
            shuffle=shuffle,
            seed=seed,
            max_unreadable=max_unreadable,
        )
        kind: Any = collect  # the function checks it
        what: Any = loss
        stats = sc.calibrate(
            net,
            images,
            max_images=max_images,
            collect=kind,
            gamma=gamma,
            token_fraction=token_fraction,
            row_weights=row_weights,
            sensitivity="noise" if noise else sensitivity,
            methods=None if methods is None else names(methods),
            head_gradients=head_gradients,
            gradients=gradients,
            loss=what,
            amp=amp,
            resume=resume,
            checkpoint_every=checkpoint_every,
        )
        with ranks.together():
            if ranks.rank == 0:
                stats.save(out)
                text = f"{stats.images:,} images of {images.description} -> {out}"
                needed = stats.images_needed()
                if needed > 0:
                    text += f"; about {needed:,} suffice"
                output.show(text, images=stats.images, images_needed=needed, file=str(out))
