"""`secateur prune`."""

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
    Device,
    Freeze,
    Groups,
    Json,
    Kwargs,
    Loose,
    MaxImages,
    MethodOptions,
    MinKeep,
    Model,
    Out,
    Pretrained,
    Resume,
    RoundTo,
    Seed,
    Split,
    StepsTable,
    Threads,
    Unreadable,
    UseEma,
    Workers,
    json_object,
    multiples,
    names,
)
from .output import collected, named
from .typed_options import parsed

if TYPE_CHECKING:
    from torch import nn

    from ..data.loader import ImageLoader

__all__ = ["prune"]

BUDGET = "Without a plan"


def prune(
    out: Out,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="The plan file that plan wrote; with --data, only its sizes and method are used."),
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="exact: attention of the kept sizes; stock: timm's own modules, padded with zeros; auto: by --engine.",
        ),
    ] = "exact",
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="With --layout auto, what the model will run in: a runtime or a format (torch by default).",
        ),
    ] = None,
    last_block: Annotated[
        str | None,
        typer.Option(
            "--last-block",
            help="Tokens of the last block: pooled (that the output uses; default of class-token classifiers), whole.",
        ),
    ] = None,
    strict: Loose = True,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images to fit the pruned model on, block by block: a folder, a .tar, hfds:NAME, or digits.",
            rich_help_panel=DATA,
        ),
    ] = None,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = 1024,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    method: Annotated[
        str | None,
        typer.Option("--method", help="The pruning method: the plan's, or project.", rich_help_panel=BUDGET),
    ] = None,
    option: MethodOptions = None,
    target_macs: Annotated[
        float | None, typer.Option(help="Fraction of the MACs to keep.", rich_help_panel=BUDGET)
    ] = None,
    target_params: Annotated[
        float | None, typer.Option(help="Fraction of the parameters to keep.", rich_help_panel=BUDGET)
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            help='Fractions to remove, as {"qk": 0.5}, the name of a shipped configuration, or a file.',
            rich_help_panel=BUDGET,
        ),
    ] = None,
    groups: Groups = None,
    freeze: Freeze = "",
    min_keep: MinKeep = None,
    round_to: RoundTo = None,
    allocation: Allocation = None,
    latency_table: StepsTable = None,
    one_shot: Annotated[
        bool,
        typer.Option("--one-shot", help="Plan and cut all blocks at once, from one calibration of the dense model."),
    ] = False,
    streams: Annotated[
        str, typer.Option(help="Keep both streams of all images (memory), or compute them anew (recompute).")
    ] = "memory",
    resume: Resume = None,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Cut a model as planned, or for a budget with --data, and save the smaller one.

    With --data, each block of the pruned model is fitted to the dense model's residual stream on these images, which
    needs no labels. Methods that only select, and --one-shot, plan and cut all blocks at once.
    """
    budget = {"--target-macs": target_macs, "--target-params": target_params, "--ratios": ratios}
    given = [name for name, value in budget.items() if value is not None]
    if plan is None and data is None:
        raise typer.BadParameter("expected --plan FILE, or --data and a budget, got neither")
    if plan is not None and given:
        raise typer.BadParameter(f"expected --plan or a budget, got both --plan and {given[0]}")
    if plan is None and (not given or (ratios is not None and len(given) > 1)):
        raise typer.BadParameter("expected --data with --plan, --ratios, or --target-macs and/or --target-params")
    if plan is not None and data is not None and one_shot:
        raise typer.BadParameter("expected --plan without --data for --one-shot, got both")
    with collected(as_json) as output, lazy.joined() as ranks:
        planned = None
        if plan is not None:
            with named("--plan"):
                planned = sc.Plan.load(plan)
        # Refused before images are read.
        how: dict[str, Any] = {"layout": lazy.chosen_layout(layout, engine), "last_block": last_block}
        like = lazy.said(planned, f"--plan {plan}")
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema, like=like)
        if data is None:
            assert planned is not None
            report = sc.prune(net, planned, **how, strict=strict)
        else:
            chosen = method or ("project" if planned is None else planned.method)
            options = parsed(lazy.method_named(chosen), option)
            net.to(lazy.place_for(net, ranks.device(device)))
            images = sc.data.loader(
                data,
                net,
                split=split or sc.data.default_split(data, train=True),
                batch_size=batch_size,
                workers=workers,
                max_images=max_images,
                # Folders are sorted by class: the first images would be of a few classes only.
                shuffle=not data.startswith("hfids:"),
                seed=seed,
                max_unreadable=max_unreadable,
            )
            wanted: dict[str, Any] = {
                "target": sc.Target(target_macs, target_params) if planned is None and ratios is None else None,
                "ratios": json_object(ratios) if ratios is not None and ratios.lstrip().startswith("{") else ratios,
                "groups": None if groups is None else names(groups),
                "freeze": names(freeze),
                "min_keep": None if min_keep is None else json_object(min_keep),
                "round_to": multiples(round_to),
                "allocation": allocation,
                "latency_table": latency_table,
            }
            if planned is None and (one_shot or not lazy.method_named(chosen).changes_weights):
                report = _at_once(net, images, chosen, wanted, options, max_images, how)
            else:
                kind: Any = streams  # the function checks it
                report = sc.prune_sequential(
                    net,
                    images,
                    chosen,
                    sizes_of=planned,
                    **wanted,
                    streams=kind,
                    resume=resume,
                    max_images=max_images,
                    **how,
                    **options,
                )
        with ranks.together():
            if ranks.rank == 0:
                sc.save(net, out)
                output.show(str(report), f"-> {out}", **report.to_dict(), file=str(out))


def _at_once(
    net: nn.Module,
    images: ImageLoader,
    method: str,
    wanted: dict[str, Any],
    options: dict[str, Any],
    max_images: int | None,
    how: dict[str, Any],
) -> sc.Report:
    """Calibrate the dense model, plan, and cut."""
    stats = None
    by_noise = wanted["allocation"] == "error"
    needs = lazy.method_named(method).needs
    if needs or by_noise:
        stats = sc.calibrate(
            net,
            images,
            max_images=max_images,
            sensitivity="noise" if by_noise else False,
            gradients="gradients" in needs,
        )
    measured = wanted["target"] is not None and wanted["allocation"] in (None, "measured")
    found = sc.plan(net, stats, method=method, loader=images if measured else None, **wanted, **options)
    return sc.prune(net, found, **how)
