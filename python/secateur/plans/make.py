"""Makes a plan: chooses which units stay, from statistics and a target or ratios."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .. import check, core
from ..anatomy import Anatomy, Group
from ..anatomy.fingerprint import Fingerprint
from ..budgets.allocate import allocate, free_groups
from ..budgets.budget import Allocation
from ..budgets.limits import AUTO, check_rounding, limits_of, recorded
from ..budgets.ratios import counts_from_ratios
from ..budgets.target import Target
from ..calibration.cuts import measured_name
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..latency.runtimes.registry import RUNTIMES
from ..latency.table import LatencyTable
from ..methods.base import Bound, Prepared
from ..methods.registry import method_named, options_of
from ..statistics.statistics import Statistics
from ..statistics.sufficiency import GOOD, images_for
from .losses import Losses, Merging, losses_of, merging_of, removal_of, with_tokens
from .measured import Choice, Measured
from .on_the_clock import LatencyReport, loaded, sizes_on_the_clock, table_for, with_steps
from .plan import Plan

# What the warning begins with, as a regular expression.
FEW = "stats: [0-9,]+ images are few"
# A warning says that images are few when fits err this many times what is good enough.
_FEW = 2.5


@core.host_by_default()
def plan(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    method: str = "project",
    target: Target | None = None,
    ratios: Mapping[str, float] | str | Path | None = None,
    groups: Iterable[str] | None = None,
    freeze: Iterable[str] = (),
    min_keep: Mapping[str, int] | None = None,
    round_to: int | Literal["auto"] | Mapping[str, int] | None = None,
    allocation: str | None = None,
    loader: Iterable[Any] | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    batch_size: int | None = None,
    runtime: str | None = None,
    strict: bool = True,
    **options: Any,
) -> Plan:
    """Choose which units stay. The same inputs give the same plan, except for measured latencies.

    ``Target(latency=)`` is met by measurement. A table of layer times predicts a plan that takes that fraction of the
    model's time; a copy is pruned by it and timed against the model in paired runs; the table is corrected by the
    result and a new plan is made, until measured / target lies in [0.95, 1] or after three rounds. ``plan.latency``
    reports the predicted and the measured fraction. With a table of another machine, there is a warning and the plan is
    made by the table alone.

    With a method that changes weights, there is a warning if the statistics are of far fewer images than their two
    folds ask for; see ``Statistics.images_needed``.

    Args:
        model: the model that was calibrated; it is not changed.
        stats: what ``calibrate`` measured on it.
        method: the importance criterion; see ``methods()``.
        target: fraction kept of MACs, parameters or latency. It is never exceeded, and missed by less than the smallest
            remaining rounding step, where query/key and value of a layer step together. Give exactly one of ``target``
            and ``ratios``.
        ratios: fraction removed by kind or group, {"qk": .5, "v": .5, "ffn": .5, "width": .1}, or a per-block file: the
            name of a shipped one ("snp_deit_t", "snp_deit_s_1.3g") or a path. {"blocks.3.attn": 1} removes a layer,
            {"layer": .25} a quarter of all layers, those whose removal changes the output least.
        groups: kinds or names of groups that may be cut; with a target, the default is ("qk", "v", "ffn"), and "tokens"
            as well for MACs or latency of a classifier where losses were measured. "heads" removes whole heads, whose
            number may then differ between layers; "layer" removes whole attention and FFN layers, but the last of each
            stays; with a target, it requires another allocation than "uniform". "tokens" merges patch tokens block by
            block.
        freeze: kinds, names or patterns ("blocks.0.*") of groups that stay whole.
        min_keep: fewest units to keep, by kind or group.
        round_to: kept counts are multiples of this (per head for query/key and value), an int or a dict by kind or
            group; the default is 1 with ratios, and with a target 8 per head and 32 otherwise. A group may always stay
            whole. "auto" takes the steps of the latency table, for the kinds that it has; others keep the default.
        allocation: how a target is divided among the groups. "measured" chooses the counts with the least total loss,
            where a group's loss is what its cut by this method was measured to cost (``calibrate(sensitivity=True)``);
            "error" takes its error at that size times the sensitivity of the output to it instead
            (``sensitivity="noise"``); "uniform" removes the same fraction from all groups. The default is the first of
            these that statistics or ``loader`` allow.
        loader: calibration images as for ``calibrate``; 40 of the first 128 are run, weighted to stand for all of
            these. What the statistics do not hold is measured on them. Cuts that cost more together than alone are then
            found: around the chosen sizes each group is restored, or cut if it is whole, and the counts are chosen
            again, as long as the measured loss of the whole plan falls; ``Plan.measured`` reports that loss.
        latency_table: the result of ``measure_latency``, or its file; it holds batch size, type and engine. Without
            one, a target for latency measures one first, on the model's device and in its type, for the groups that may
            be cut. With ``round_to="auto"`` it also goes with another budget, for its steps alone.
        batch_size: images per batch for a target for latency; the default is the table's, or else 1. A table of another
            batch size is refused.
        runtime: the engine for a target for latency, as for ``bench``; the default is the table's, or else "torch". A
            table of another engine is refused.
        strict: refuse statistics of other weights; if false, the same dimensions are enough for a method that only
            selects.
        **options: options of the method. "snp" takes similarity="weights" (the paper's) or "activations"; "refit" takes
            selection="greedy", "snp" or "energy". These and "project" take head_score="neurons" (the mean of a head's
            neuron scores) or "michel" (Michel et al., 2019); "refit" and "project" also take "error", their default:
            the error of the refitted projection without the head.

    Raises:
        InvalidArgument: an argument that does not fit, an infeasible target, or statistics of another model.
        Unsupported: a kind of cut that this model does not allow.
    """
    criterion = method_named(method)
    if not isinstance(stats, Statistics) and (stats is not None or criterion.needs):
        raise InvalidArgument(f"stats: expected Statistics from calibrate, got {type(stats).__name__}")
    if "gradients" in criterion.needs and stats is not None and not stats.settings.gradients:
        raise InvalidArgument(
            f"stats: expected gradients for {method!r}, calibrate(gradients=True), got statistics without"
        )
    check_budget(target, ratios, allocation, latency_table, batch_size, runtime, round_to)
    chosen = options_of(criterion, options)
    anatomy = family_of(model).inspect(model)
    fingerprint = Fingerprint.of(model, anatomy)
    if stats is None:
        stats = Statistics.of_nothing(fingerprint)
    stats.settings.fingerprint.require(fingerprint, "model", strict=strict)
    if not strict and criterion.changes_weights:
        raise InvalidArgument(f"strict: expected True for {method!r}, which changes weights, got False")
    if criterion.changes_weights:
        warn_of_few(stats, method)
    table = loaded(latency_table)
    limits = with_steps(limits_of(groups, freeze, min_keep, round_to), table, anatomy)
    cut = measured_name(criterion, chosen)
    measures = target is not None and allocation in (None, "measured")
    if target is not None and measures and (loader is not None or (cut in stats.cuts and stats.merged)):
        limits = with_tokens(model, anatomy, target, limits, table)
    if target is not None and target.latency is not None:
        table = table_for(model, anatomy, target, limits, table, batch_size, runtime)
        limits = with_steps(limits, table)
    with core.torch_threads():
        prepared = criterion.prepare(Bound(model, anatomy, stats, chosen))
    free = anatomy.groups if target is None else free_groups(anatomy, limits)
    measure = None
    if loader is not None:
        measure = Measured(model, anatomy, free, loader)
        if measures:
            stats = measure.completed(stats, criterion, chosen)
    losses, merging = None, merging_of(anatomy, stats, free) if measures else []
    if target is not None:
        with core.torch_threads():
            losses = losses_of(anatomy, stats, prepared, cut, free, allocation)
    removal = removal_of(stats, prepared, cut)

    def choose(losses: Losses | None, merging: Merging) -> Choice:
        how = {"losses": losses, "merging": merging, "removal": removal, "table": table}
        return _choose(model, anatomy, target, ratios, limits, prepared, how)

    found = choose(losses, merging)
    measured = None
    if measure is not None:
        found, measured = measure.jointly(found, prepared, losses, merging, choose)
    sizes = found.allocation.sizes
    return Plan(
        method=method,
        options={
            **asdict(chosen),
            "target": None if target is None else vars(target),
            "round_to": recorded(limits["round_to"]),
            "gamma": stats.settings.gamma,
        },
        fingerprint=fingerprint,
        keep=found.decision.keep,
        params=(anatomy.params, found.params),
        macs=(anatomy.macs, anatomy.macs_at(sizes)),
        weights=found.decision.weights,
        eps=found.decision.eps,
        uncentred=found.decision.uncentred,
        latency=found.latency,
        loss=None if math.isnan(found.allocation.loss) else (found.allocation.loss, found.allocation.bound),
        measured=measured,
    )


def _choose(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target | None,
    ratios: Mapping[str, float] | str | Path | None,
    limits: Mapping[str, Any],
    prepared: Prepared,
    how: Mapping[str, Any],
) -> Choice:
    """Choose the sizes and what stays, so that the biases that the method adds fit in a target for parameters.

    ``how`` holds the other arguments of `sizes_for`.
    """
    wanted, added = target, 0
    while True:
        try:
            allocation, latency = sizes_for(model, anatomy, wanted, ratios, limits, **how)
        except InvalidArgument as error:
            if added == 0:
                raise
            raise _no_room(target, added) from error
        with core.torch_threads():
            decision = prepared.decide(allocation.sizes)
        found = sum(value.numel() for name, value in decision.weights.items() if name not in anatomy.shapes)
        params = anatomy.params_at(allocation.sizes) + found
        if target is None or target.params is None or params <= target.params * anatomy.params:
            return Choice(allocation, latency, decision, params)
        # Added biases count as parameters, and which layers get one is known only after the choice.
        assert wanted is not None
        added = max(found, added + 1)  # always grows: rounding may count one parameter too many
        left = target.params - added / anatomy.params
        if left <= 0:
            raise _no_room(target, added)
        wanted = replace(target, params=left)


def warn_of_few(stats: Statistics, method: str) -> None:
    """Warn if the folds of the statistics say that a method's fits need many more images."""
    excess = stats.excess
    if excess > _FEW * GOOD:
        warnings.warn(
            f"stats: {stats.images:,} images are few for {method!r}, whose fits err about {100 * excess:.0f} % more on "
            f"other images than the best would; about {images_for(stats.images, excess):,} suffice",
            stacklevel=4,
        )


def check_budget(
    target: Any,
    ratios: Any,
    allocation: Any,
    latency_table: Any = None,
    batch_size: Any = None,
    runtime: Any = None,
    round_to: Any = None,
) -> None:
    """Refuse anything but exactly one of target and ratios, and arguments that do not go with it.

    Raises:
        InvalidArgument: both or neither is given, or an argument does not fit.
    """
    if (target is None) == (ratios is None):
        raise InvalidArgument(f"target, ratios: expected exactly one, got {'neither' if target is None else 'both'}")
    if target is not None and not isinstance(target, Target):
        raise InvalidArgument(f"target: expected a Target, such as Target(macs=0.5), got {target!r}")
    if ratios is not None and not isinstance(ratios, (Mapping, str, Path)):
        raise InvalidArgument(f"ratios: expected a dict, a name or a path, got {ratios!r}")
    check_allocation(allocation)
    if allocation is not None and ratios is not None:
        raise InvalidArgument(f"allocation: expected none with ratios, got {allocation!r}")
    timed = target is not None and target.latency is not None
    check_rounding(round_to, latency_table, measured=timed)
    if not timed:
        if round_to != AUTO and latency_table is not None:
            raise InvalidArgument(
                f'latency_table: expected none without Target(latency=) or round_to="auto", got {latency_table!r}'
            )
        for name, value in (("batch_size", batch_size), ("runtime", runtime)):
            if value is not None:
                raise InvalidArgument(f"{name}: expected none without Target(latency=), got {value!r}")
    check_table(latency_table)
    check.integer("batch_size", batch_size, optional=True)
    if runtime is not None:
        RUNTIMES.named(runtime)


def check_table(latency_table: object) -> None:
    """Refuse anything but a latency table, its file and None.

    Raises:
        InvalidArgument: something else.
    """
    if not isinstance(latency_table, (LatencyTable, str, Path, type(None))):
        raise InvalidArgument(f"latency_table: expected a LatencyTable or its file, got {latency_table!r}")


def check_allocation(allocation: object, known: tuple[str, ...] = ("measured", "error", "uniform")) -> None:
    """Refuse anything but these names and None.

    Raises:
        InvalidArgument: another name.
    """
    if allocation is not None:
        check.choice("allocation", allocation, known)


def sizes_for(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target | None,
    ratios: Mapping[str, float] | str | Path | None,
    limits: Mapping[str, Any],
    *,
    losses: Losses | None = None,
    merging: Merging = (),
    removal: Callable[[Group], float] | None = None,
    table: LatencyTable | None = None,
) -> tuple[Allocation, LatencyReport | None]:
    """Choose how many units of each group stay; also report how a target for latency was met.

    Arguments are those of ``plan``, with ``ratios`` the fraction removed; ``limits`` holds groups, freeze, min_keep and
    round_to; ``table`` is needed for a target for latency.
    """
    if target is None:
        assert ratios is not None
        return Allocation(counts_from_ratios(anatomy, ratios, **limits, removal=removal)), None
    if target.latency is not None:
        assert table is not None
        return sizes_on_the_clock(model, anatomy, target, limits, losses, merging, table)
    with core.torch_threads():
        return allocate(anatomy, target, **limits, losses=losses, merging=merging), None


def _no_room(target: Target | None, added: int) -> InvalidArgument:
    return InvalidArgument(
        f"target: expected room for {added:,} biases that the method adds, besides the least these groups reach, "
        f"got {target}"
    )
