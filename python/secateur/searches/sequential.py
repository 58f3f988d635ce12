"""Prunes block by block: each block's statistics are collected with the blocks before it already pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import check, core
from ..anatomy import Anatomy
from ..anatomy.fingerprint import Fingerprint
from ..anatomy.groups import Indices
from ..budgets.limits import limits_of
from ..budgets.target import Target
from ..calibration.calibrate import calibrate, calibrate_block
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..latency.table import LatencyTable
from ..methods.registry import method_named, options_of
from ..plans.make import check_budget, plan, sizes_for
from ..plans.on_the_clock import table_for
from ..plans.plan import Plan
from ..plans.prune import prune
from ..plans.report import Report
from ..surgery.stock_layout import check_layout

__all__ = ["prune_sequential"]


@torch.inference_mode(False)
@core.host_by_default()
def prune_sequential(
    model: nn.Module,
    loader: Iterable[Any],
    method: str = "project",
    target: Target | None = None,
    *,
    ratios: Mapping[str, float] | str | Path | None = None,
    groups: Iterable[str] | None = None,
    freeze: Iterable[str] = (),
    min_keep: Mapping[str, int] | None = None,
    round_to: int | Mapping[str, int] | None = None,
    allocation: str | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    batch_size: int | None = None,
    runtime: str | None = None,
    max_images: int | None = 1024,
    token_fraction: float = 1.0,
    layout: str = "exact",
    **options: Any,
) -> Report:
    """Prune a model in place, block by block, fitting each block to the outputs of the pruned ones before it.

    The sizes of all groups are fixed first, on the dense model; with a target, this needs a calibration of the whole
    model (unless ``allocation="uniform"``). Then each block, from the first to the last, is calibrated, planned and
    pruned, with only its own statistics in memory; the residual width comes last. The loader is read once for each of
    these calibrations, and forward passes end after the block.

    Everything is done on a copy; the model is changed at the end, or not at all.

    Args:
        model: a supported timm model.
        loader: as for ``calibrate``; it is read several times and must yield the same images each time.
        method: as for ``plan``.
        target: fraction kept, as for ``plan``.
        ratios: fraction removed by kind or group, or a per-block file, as for ``plan``.
        groups: as for ``plan``.
        freeze: as for ``plan``.
        min_keep: as for ``plan``.
        round_to: as for ``plan``.
        allocation: as for ``plan``.
        latency_table: as for ``plan``.
        batch_size: as for ``plan``.
        runtime: as for ``plan``.
        max_images: the largest number of images per calibration; None for all.
        token_fraction: as for ``calibrate``.
        layout: as for ``prune``.
        **options: options of the method.

    Raises:
        InvalidArgument: an argument that does not fit, or an iterator, which can be read only once.
        Unsupported: the model is not of a supported family, or does not allow a cut or the layout.
    """
    check_layout(layout)
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise InvalidArgument(
            f"loader: expected batches that can be read several times, got {type(loader).__name__}"
            f"{', an iterator' if isinstance(loader, Iterator) else ''}"
        )
    max_images = check.integer("max_images", max_images, optional=True)
    token_fraction = check.fraction("token_fraction", token_fraction, open_low=True)
    check_budget(target, ratios, allocation, latency_table, batch_size, runtime)
    chosen = asdict(options_of(method_named(method), options))
    if chosen.get("head_score") == "michel":
        raise InvalidArgument("head_score: expected one that takes no gradients block by block, got 'michel'")
    anatomy = family_of(model).inspect(model)
    limits = limits_of(groups, freeze, min_keep, round_to)
    table = None
    if target is not None and target.latency is not None:
        table = table_for(model, anatomy, target, limits, latency_table, batch_size, runtime)
    if target is None or allocation == "uniform":
        sizes = sizes_for(model, anatomy, target, ratios, limits, table=table)[0].sizes
    else:
        shared: dict[str, Any] = {"max_images": max_images, "token_fraction": token_fraction}
        stats = calibrate(model, loader, **shared, sensitivity="noise" if allocation == "error" else False)
        planned = plan(
            model,
            stats,
            method=method,
            target=target,
            **limits,
            allocation=allocation,
            loader=None if allocation == "error" else loader,
            latency_table=table,
            **chosen,
        )
        sizes = {**anatomy.sizes, **{name: kept.shape[1] for name, kept in planned.keep.items()}}
        del stats, planned

    if layout == "stock":
        family_of(model).stock_sizes(model, anatomy, sizes)

    cut = copy.deepcopy(model)
    keep: dict[str, Indices] = {}
    names: set[str] = set()
    eps: dict[str, float] = {}
    uncentred: tuple[str, ...] = ()
    for block, removed in _stages(anatomy, sizes):
        part = calibrate_block(cut, loader, block, max_images=max_images, token_fraction=token_fraction)
        step = plan(cut, part, method=method, ratios=removed, **chosen)
        prune(cut, step)
        keep |= step.keep
        names |= step.weights.keys()
        eps |= step.eps
        uncentred += step.uncentred
    weights = {name: cut.get_parameter(name).detach() for name in sorted(names)}
    added = sum(value.numel() for name, value in weights.items() if name not in anatomy.shapes)
    whole = Plan(
        method=method,
        options={**chosen, "sequential": True},
        fingerprint=Fingerprint.of(model, anatomy),
        keep=keep,
        params=(anatomy.params, anatomy.params_at(sizes) + added),
        macs=(anatomy.macs, anatomy.macs_at(sizes)),
        weights=weights,
        eps=eps,
        uncentred=uncentred,
    )
    return prune(model, whole, layout=layout)


def _stages(anatomy: Anatomy, sizes: Mapping[str, int]) -> Iterator[tuple[int | None, dict[str, float]]]:
    """Yield each block that is cut with the fraction removed of its groups; last None, for the width."""
    blocks: dict[int | None, dict[str, float]] = {}
    for group in sorted(anatomy.groups, key=lambda group: (group.block is None, group.block or 0)):
        if sizes[group.name] < group.size:
            blocks.setdefault(group.block, {})[group.name] = 1 - sizes[group.name] / group.size
    yield from blocks.items()
