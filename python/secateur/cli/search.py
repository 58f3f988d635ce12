"""`secateur search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import secateur as sc

from . import lazy
from .options import (
    DATA,
    Allocation,
    BatchSize,
    Checkpoint,
    Classes,
    Data,
    Device,
    Freeze,
    Groups,
    Json,
    Kwargs,
    MaxImages,
    Method,
    MethodOptions,
    MinKeep,
    Model,
    Out,
    Pretrained,
    Resume,
    RoundTo,
    Runtime,
    Seed,
    Split,
    Stats,
    StepsTable,
    Threads,
    Unreadable,
    UseEma,
    Workers,
    file_to_write,
    json_object,
    multiples,
    names,
)
from .output import collected, named
from .typed_options import parsed

if TYPE_CHECKING:
    from ..searches.objectives import Objective

__all__ = ["search"]


def search(
    data: Data,
    stats: Stats,
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = None,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    max_drop: Annotated[
        float | None, typer.Option(help="Find the fewest parameters that lose at most this many points of accuracy.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Find the most accurate model with this fraction of the parameters.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Find the most accurate model with this fraction of the MACs.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Find the most accurate model in this fraction of the measured time.")
    ] = None,
    runtime: Runtime = None,
    method: Method = "project",
    option: MethodOptions = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds at most.")] = 12,
    step: Annotated[float, typer.Option(help="Fraction that the first round removes.")] = 0.1,
    groups: Groups = None,
    freeze: Freeze = "",
    min_keep: MinKeep = None,
    round_to: RoundTo = None,
    allocation: Allocation = None,
    latency_table: StepsTable = None,
    finetune: Annotated[
        str | None, typer.Option(metavar="JSON", help='Train the model of each round, as {"epochs": 1, "lr": 1e-4}.')
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(help="Images to train and calibrate on; --data by default.", rich_help_panel=DATA)
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Split of --train-data; the training split by default.", rich_help_panel=DATA)
    ] = None,
    resume: Resume = None,
    history: Annotated[
        Path | None, typer.Option("--history", help="Write the rounds to this JSON file.", callback=file_to_write)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Plot the rounds to this .png, .svg or .pdf file (needs matplotlib).", callback=file_to_write
        ),
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the smallest model of an accuracy (--max-drop), or the most accurate of a budget, and save it."""
    objective = _objective(max_drop, params, macs, latency, runtime)
    kinds = None if groups is None else names(groups)
    tuning = None if finetune is None else json_object(finetune)
    if plot is not None:
        lazy.check_figure(plot)
    with collected(as_json) as output:
        options = parsed(lazy.method_named(method), option)
        with named("--stats"):
            statistics = sc.Statistics.load(stats)
        like = lazy.said(statistics, f"--stats {stats}")
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema, like=like)
        net.to(lazy.place_for(net, device))

        shuffle = max_images is not None and not data.startswith("hfids:")
        reading: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "seed": seed,
            "max_unreadable": max_unreadable,
        }
        validation = sc.data.loader(data, net, split=split, max_images=max_images, shuffle=shuffle, **reading)
        training = calibration = None
        if tuning is not None:
            source = train_data or data
            part = train_split or sc.data.default_split(source, train=True)
            training = sc.data.loader(source, net, split=part, shuffle=True, train=True, **reading)
            images = statistics.images
            calibration = sc.data.loader(source, net, split=part, shuffle=True, max_images=images, **reading)
        found = sc.search(
            net,
            statistics,
            objective=objective,
            loader=validation,
            method=method,
            rounds=rounds,
            step=step,
            groups=kinds,
            freeze=names(freeze),
            min_keep=None if min_keep is None else json_object(min_keep),
            round_to=multiples(round_to),
            allocation=allocation,
            latency_table=latency_table,
            finetune=tuning,
            train_loader=training,
            calibration_loader=calibration,
            resume=resume,
            **options,
        )
        sc.save(found.model, out)
        if history is not None:
            found.save_history(history)
        if plot is not None:
            found.plot(plot)
        output.show(str(found), f"-> {out}", **found.to_dict(), file=str(out))


def _objective(
    max_drop: float | None, params: float | None, macs: float | None, latency: float | None, runtime: str | None
) -> Objective:
    """Return the one that is named by the requirement."""
    given = [
        name
        for name, value in (("max-drop", max_drop), ("params", params), ("macs", macs), ("latency", latency))
        if value is not None
    ]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        raise typer.BadParameter(f"expected one of --max-drop, --params, --macs and --latency, got {got}")
    if runtime is not None and latency is None:
        raise typer.BadParameter("--runtime needs --latency")
    if max_drop is not None:
        return sc.AccuracyCritical(max_drop)
    if params is not None:
        return sc.MemoryConstrained(params)
    return sc.LatencySensitive(macs=macs, latency=latency, runtime=runtime or "torch")
