"""`secateur plan`."""

from pathlib import Path
from typing import Annotated

import typer

import secateur as sc

from . import lazy
from .options import (
    Allocation,
    Checkpoint,
    Classes,
    Device,
    Freeze,
    Groups,
    Json,
    Kwargs,
    Loose,
    Method,
    MethodOptions,
    MinKeep,
    Model,
    Out,
    Pretrained,
    RoundTo,
    Runtime,
    Threads,
    UseEma,
    json_object,
    multiples,
    names,
)
from .output import collected, named
from .typed_options import parsed

__all__ = ["plan"]

# Options of methods had flags of their own before there was --option.
_Old = Annotated[str | None, typer.Option(hidden=True)]


def plan(
    out: Out,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="The statistics file that calibrate wrote, if the method needs any.")
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    method: Method = "project",
    option: MethodOptions = None,
    target_macs: Annotated[float | None, typer.Option(help="Fraction of the MACs to keep.")] = None,
    target_params: Annotated[float | None, typer.Option(help="Fraction of the parameters to keep.")] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="Fraction of a batch's time to keep; checked by measuring.")
    ] = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="The file of bench --table; without it, --target-latency measures one.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Batch size of --target-latency; the table's by default, or 1.")
    ] = None,
    runtime: Runtime = None,
    ratios: Annotated[
        str | None,
        typer.Option(help='Fractions to remove, as {"qk": 0.5}, the name of a shipped configuration, or a file.'),
    ] = None,
    groups: Groups = None,
    freeze: Freeze = "",
    min_keep: MinKeep = None,
    round_to: RoundTo = None,
    allocation: Allocation = None,
    similarity: _Old = None,
    selection: _Old = None,
    head_score: _Old = None,
    strict: Loose = True,
    device: Device = None,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Choose what stays, for a budget (--target-macs, --target-params, --target-latency) or by --ratios."""
    kinds = None if groups is None else names(groups)
    if kinds == []:
        raise typer.BadParameter("expected --groups of kinds or groups, got none")
    targets = target_macs, target_params, target_latency
    if (ratios is None) == (targets == (None, None, None)):
        raise typer.BadParameter("expected either --ratios, or --target-macs, --target-params and/or --target-latency")
    if target_latency is None and (batch_size, runtime) != (None, None):
        raise typer.BadParameter("--batch-size and --runtime need --target-latency")
    if target_latency is None and latency_table is not None and round_to != "auto":
        raise typer.BadParameter("--latency-table needs --target-latency or --round-to auto")
    flags = {"similarity": similarity, "selection": selection, "head_score": head_score}
    with collected(as_json) as output:
        chosen_method = lazy.method_named(method)
        options = parsed(chosen_method, option, flags)
        needs = chosen_method.needs
        if stats is None and needs:
            raise typer.BadParameter(f"expected --stats FILE for the method {method}, which needs {', '.join(needs)}")
        with named("--stats"):
            statistics = None if stats is None else sc.Statistics.load(stats)
        like = lazy.said(statistics, f"--stats {stats}")
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema, like=like)
        net.to(lazy.place_for(net, device))
        chosen = sc.plan(
            net,
            statistics,
            method=method,
            target=sc.Target(*targets) if ratios is None else None,
            ratios=json_object(ratios) if ratios is not None and ratios.lstrip().startswith("{") else ratios,
            groups=kinds,
            freeze=names(freeze),
            min_keep=None if min_keep is None else json_object(min_keep),
            round_to=multiples(round_to),
            strict=strict,
            allocation=allocation,
            latency_table=latency_table,
            batch_size=batch_size,
            runtime=runtime,
            **options,
        )
        chosen.save(out)
        kept = {name: int(keep.shape[1]) for name, keep in chosen.keep.items()}
        output.show(
            f"{chosen} -> {out}",
            method=chosen.method,
            params=list(chosen.params),
            macs=list(chosen.macs),
            kept=kept,
            latency=chosen.to_dict()["latency"],
            loss=chosen.to_dict()["loss"],
            file=str(out),
        )
