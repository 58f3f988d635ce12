"""Prunes block by block: each block is fitted to what the pruned blocks before it output."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from .. import check, core
from ..anatomy import Anatomy
from ..anatomy.fingerprint import Fingerprint
from ..budgets.allocate import free_groups
from ..budgets.limits import AUTO, limits_of
from ..budgets.target import Target
from ..calibration.calibrate import calibrate, calibrate_block
from ..data.loader import ImageLoader, in_batches
from ..data.model_input import images_in, refuse_iterator
from ..errors import InvalidArgument, Unsupported
from ..families.registry import family_of
from ..families.wrapped import refuse_live_wrapper
from ..files import container
from ..latency.table import LatencyTable
from ..methods.registry import method_named, options_of
from ..plans.losses import with_tokens
from ..plans.make import FEW, check_budget, plan, sizes_for
from ..plans.measured import Measured
from ..plans.on_the_clock import loaded, table_for, with_steps
from ..plans.plan import Plan
from ..plans.prune import prune
from ..plans.report import Report
from ..runtime.ranks import joined
from ..statistics.streams import Keep, calibrate_norms
from ..surgery.stock_layout import chosen_layout
from ..surgery.structure import check_last_block
from .sequential_file import Progress, SequentialFile
from .towards_dense import Course

__all__ = ["prune_sequential"]

# Images that the sizes are chosen by: more change them little, and fitting to the dense stream takes all.
_SIZED = 256

TargetStream = Literal["dense", "pruned"]


@torch.inference_mode(False)
@core.host_by_default()
def prune_sequential(
    model: nn.Module,
    loader: Iterable[Any],
    method: str = "project",
    target: Target | None = None,
    *,
    ratios: Mapping[str, float] | str | Path | None = None,
    sizes_of: Plan | None = None,
    target_stream: TargetStream = "dense",
    streams: Keep = "memory",
    resume: str | Path | None = None,
    groups: Iterable[str] | None = None,
    freeze: Iterable[str] = (),
    min_keep: Mapping[str, int] | None = None,
    round_to: int | Literal["auto"] | Mapping[str, int] | None = None,
    allocation: str | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    batch_size: int | None = None,
    runtime: str | None = None,
    max_images: int | None = 1024,
    token_fraction: float = 1.0,
    layout: str = "exact",
    engine: str | None = None,
    last_block: str | None = None,
    **options: Any,
) -> Report:
    """Prune a model in place, block by block, fitting each block on the outputs of the pruned ones before it.

    The sizes of all groups are fixed first, on the dense model; with a target, this needs a calibration of the whole
    model on the first 256 images (unless ``allocation="uniform"``). Then the layers are fitted and cut from the first
    to the last; the residual width comes last. Everything is done on a copy; the model is changed at the end, or not at
    all.

    With ``target_stream="dense"`` the dense model and the pruned copy run side by side over the same images, layer by
    layer, and every layer from the first cut on makes up for the errors of those before it (after GPTAQ,
    arXiv:2504.02692):

    - it reads its input x̂ as the dense layer's, as far as that can be predicted: A LN(x̂) + a ≈ LN(x) is folded into
      queries, keys and values, the gate, and the first linear layers of the FFN;
    - its last linear layer is fitted to what the dense stream has after the layer and the pruned one has not before it,
      first whole, then again after the method's choice of what stays. A LayerScale is folded into it.

    Both fits are shrunk towards the weights before, as far as two halves of the images ask. Tokens count by
    ``statistics.rows.RowWeights``. Biases are added where the model has none. Blocks that normalise what they add
    (post-norm) are fitted to their own output instead. Methods that only select have nothing to fit, and models whose
    layers do not run one at a time (Swin, CNNs) cannot be fitted this way: both are pruned as with "pruned".

    With ``target_stream="pruned"`` each block preserves its own output on the pruned blocks' stream: it is calibrated,
    planned and pruned as by the public functions.

    Under torchrun, ``target_stream="dense"`` divides the images among the ranks as ``calibrate`` does; every rank
    prunes its model in the same way.

    Args:
        model: a supported timm model.
        loader: as for ``calibrate``; it is read several times and must yield the same images each time.
        method: as for ``plan``.
        target: fraction kept, as for ``plan``.
        ratios: fraction removed by kind or group, or a per-block file, as for ``plan``.
        sizes_of: a plan for this model, of any method, whose sizes are used instead of ``target`` or ``ratios``.
        target_stream: "dense" or "pruned": what each block is fitted to.
        streams: for "dense": "memory" keeps the streams of both models for all images, 2 · tokens · width numbers of
            the model's type for each (303 kB for ViT-Tiny, 1.2 MB for ViT-B, in float32), on the model's device;
            "recompute" keeps none, and runs the layers before from the images on in each of up to four passes over a
            layer. The result is the same to the bit.
        resume: for "dense": a file that is written after every block. If it exists, the run goes on from there, with
            the same result to the bit, and sizes are taken from it.
        groups: as for ``plan``.
        freeze: as for ``plan``: groups that stay whole. With "dense" their layers are fitted all the same.
        min_keep: as for ``plan``.
        round_to: as for ``plan``.
        allocation: as for ``plan``.
        latency_table: as for ``plan``.
        batch_size: as for ``plan``.
        runtime: as for ``plan``.
        max_images: the largest number of images; None for all.
        token_fraction: as for ``calibrate``.
        layout: as for ``prune``.
        engine: as for ``prune``; ``runtime`` does not stand for it.
        last_block: as for ``prune``.
        **options: options of the method.

    Raises:
        InvalidArgument: an argument that does not fit; an iterator, which can be read only once; or a ``resume`` file
            of another model, other arguments or another number of images.
        Unsupported: the model is not of a supported family, or does not allow a cut or the layout; or, on several
            ranks, ``resume`` with a loader not made by `data.loader`.
        NumericalError: NaN or Inf in an image or a layer.
    """
    layout = chosen_layout(layout, engine)
    if last_block is not None:
        check_last_block(last_block)
    refuse_iterator(loader)
    max_images = check.integer("max_images", max_images, optional=True)
    token_fraction = check.fraction("token_fraction", token_fraction, open_low=True)
    _check(target, ratios, sizes_of, allocation, latency_table, batch_size, runtime, round_to)
    check.choice("target_stream", target_stream, get_args(TargetStream))
    check.choice("streams", streams, get_args(Keep))
    criterion = method_named(method)
    settings = options_of(criterion, options)
    chosen = asdict(settings)
    if chosen.get("head_score") == "michel":
        raise InvalidArgument("head_score: expected one that takes no gradients block by block, got 'michel'")
    if "gradients" in criterion.needs:
        raise InvalidArgument(f"method: expected one that takes no gradients block by block, got {method!r}")
    family = family_of(model)
    anatomy = family.inspect(model)
    refuse_live_wrapper(model)
    loader = in_batches(loader, model, labels=False)
    # Loaded here for its steps alone, and otherwise not before it is needed.
    steps = loaded(latency_table) if round_to == AUTO else None
    limits = with_steps(limits_of(groups, freeze, min_keep, round_to), steps, anatomy)
    towards = target_stream == "dense" and criterion.changes_weights and _runs_by_layer(model)
    if resume is not None and not towards:
        raise InvalidArgument("resume: expected none unless blocks are fitted to the dense stream, got a file")
    path = None if resume is None else check.writable("resume", resume)

    def sizes() -> dict[str, int]:
        if sizes_of is not None:
            sizes_of.fingerprint.require(Fingerprint.of(model, anatomy), "sizes_of", strict=False)
            return sizes_of.check(anatomy)
        table, wanted = loaded(latency_table), limits
        if target is not None and allocation in (None, "measured"):
            wanted = with_tokens(model, anatomy, target, limits, table)
        if target is not None and target.latency is not None:
            # Before hours of work, since it says what can be reached.
            table = table_for(model, anatomy, target, wanted, table, batch_size, runtime)
            wanted = with_steps(wanted, table)
        else:
            table = None
        if target is None or allocation == "uniform":
            return sizes_for(model, anatomy, target, ratios, wanted, table=table)[0].sizes
        stats = calibrate(
            model,
            loader,
            max_images=_SIZED if max_images is None else min(max_images, _SIZED),
            token_fraction=token_fraction,
            sensitivity="noise" if allocation == "error" else False,
        )
        if allocation != "error":
            # What cuts cost together is not measured, since the fit to come makes up for much of it.
            measured = Measured(model, anatomy, free_groups(anatomy, wanted), loader)
            stats = measured.completed(stats, criterion, settings)
        with warnings.catch_warnings():
            total = images_in(loader, max_images)
            if stats.images == _SIZED and (total is None or total > _SIZED):
                # The fit takes more images than these.
                warnings.filterwarnings("ignore", FEW)
            planned = plan(
                model,
                stats,
                method=method,
                target=target,
                **wanted,
                allocation=allocation,
                latency_table=table,
                **chosen,
            )
        return {**anatomy.sizes, **{name: kept.shape[1] for name, kept in planned.keep.items()}}

    def possible(found: dict[str, int]) -> dict[str, int]:
        if layout == "stock":
            family.stock_sizes(model, anatomy, found)
        return found

    how = {**chosen, "sequential": True}
    if not towards:
        progress = Progress(possible(sizes()))
        cut = copy.deepcopy(model)
        for block, removed in _stages(anatomy, progress.sizes):
            part = calibrate_block(cut, loader, block, max_images=max_images, token_fraction=token_fraction)
            _add(progress, cut, plan(cut, part, method=method, ratios=removed, **chosen))
        return prune(model, _whole(model, anatomy, method, how, progress), layout=layout, last_block=last_block)
    with joined() as ranks:
        file = None
        if path is not None:
            with ranks.together():
                if ranks.size > 1 and not isinstance(loader, ImageLoader):
                    raise Unsupported(
                        f"resume: expected a loader of data.loader on several ranks, got {type(loader).__name__}"
                    )
                asked = {
                    "model": Fingerprint.of(model, anatomy).to_dict(),
                    "method": method,
                    "options": chosen,
                    "target": None if target is None else vars(target),
                    "ratios": dict(ratios) if isinstance(ratios, Mapping) else None if ratios is None else str(ratios),
                    "sizes_of": None if sizes_of is None else sizes_of.check(anatomy),
                    **{name: repr(value) for name, value in limits.items()},
                    "allocation": allocation,
                    "max_images": max_images,
                    "token_fraction": token_fraction,
                }
                file = SequentialFile(path, asked)
        before = None
        with ranks.together():
            if file is not None and ranks.rank == 0:
                before = file.read()
                if before is not None:
                    with container.understood(f"{file.path.name}: expected the file of this run"):
                        _check_progress(before, anatomy, _whole(model, anatomy, method, how, before))
        before = ranks.gather(before)[0]
        progress = before or Progress(ranks.gather(possible(sizes()))[0])
        course = Course(
            model,
            anatomy,
            criterion,
            settings,
            progress,
            token_fraction=token_fraction,
            ranks=ranks,
            file=file,
        )
        course.run(loader, max_images, streams)
        wide = {width.name: progress.sizes[width.name] for width in anatomy.widths}
        removed = {name: 1 - size / anatomy.sizes[name] for name, size in wide.items() if size < anatomy.sizes[name]}
        if removed:
            part = calibrate_norms(course.pruned, loader, max_images, token_fraction, ranks)
            step = plan(course.pruned, part, method=method, ratios=removed, **chosen)
            _add(progress, course.pruned, ranks.gather(step)[0])
        whole = _whole(model, anatomy, method, {**how, "target_stream": "dense"}, progress)
        with ranks.together():
            report = prune(model, whole, layout=layout, last_block=last_block)
    return report


def _check(target: Any, ratios: Any, sizes_of: Any, allocation: Any, *others: Any) -> None:
    """Refuse anything but exactly one budget, and arguments that do not go with it."""
    if sizes_of is None:
        check_budget(target, ratios, allocation, *others)
        return
    if not isinstance(sizes_of, Plan):
        raise InvalidArgument(f"sizes_of: expected a Plan, got {type(sizes_of).__name__}")
    if target is not None or ratios is not None:
        raise InvalidArgument("target, ratios: expected neither with sizes_of, got one")
    check_budget(None, {}, allocation, *others)


def _check_progress(progress: Progress, anatomy: Anatomy, plan: Plan) -> None:
    """Refuse a file that says what no run can have written; the plan is what it has decided so far."""
    if progress.sizes.keys() != anatomy.sizes.keys() or not 0 < progress.done <= len(anatomy.layers):
        raise ValueError("sizes and layers of another model")
    so_far = plan.check(anatomy)
    for name, size in progress.sizes.items():
        if not anatomy.group(name).least <= size <= so_far[name]:
            raise ValueError(f"size {size} of {name}")
    for name in anatomy.layers:
        sums = progress.rows[f"{name}/rows"]
        counts = sums.shape == (6,) and bool(np.isfinite(sums).all()) and bool((sums >= 0).all())
        if not counts or not sums[2] > 0 or not sums[3] + sums[4] > 0:
            raise ValueError(f"weights of tokens of {name} that are no sums")


def _runs_by_layer(model: nn.Module) -> bool:
    family = family_of(model)
    try:
        return bool(family.blocks(model)) and bool(family.layers(model))
    except Unsupported:
        return False


def _add(progress: Progress, cut: nn.Module, step: Plan) -> None:
    """Prune the copy by one more plan."""
    prune(cut, step, last_block="whole")  # all its tokens are observed
    progress.keep |= step.keep
    progress.eps |= step.eps
    progress.uncentred += step.uncentred
    names = sorted({*progress.weights, *step.weights})
    progress.weights = {name: cut.get_parameter(name).detach() for name in names}


def _whole(model: nn.Module, anatomy: Anatomy, method: str, options: Mapping[str, Any], progress: Progress) -> Plan:
    """Return all steps as one plan for the dense model."""
    sizes = progress.sizes
    # Tokens merge last: layers are fitted on all of them.
    tokens = {group.name: sizes[group.name] for group in anatomy.groups if group.of_tokens}
    merged = {
        name: np.arange(size, dtype=np.int64)[None] for name, size in tokens.items() if size < anatomy.sizes[name]
    }
    added = sum(value.numel() for name, value in progress.weights.items() if name not in anatomy.shapes)
    return Plan(
        method=method,
        options=options,
        fingerprint=Fingerprint.of(model, anatomy),
        keep={**progress.keep, **merged},
        params=(anatomy.params, anatomy.params_at(sizes) + added),
        macs=(anatomy.macs, anatomy.macs_at(sizes)),
        weights=progress.weights,
        eps=progress.eps,
        uncentred=tuple(progress.uncentred),
    )


def _stages(anatomy: Anatomy, sizes: Mapping[str, int]) -> Iterator[tuple[int | None, dict[str, float]]]:
    """Yield each block that is cut with the fraction removed of its groups; last None, for the width."""
    blocks: dict[int | None, dict[str, float]] = {}
    for group in sorted(anatomy.groups, key=lambda group: (group.block is None, group.block or 0)):
        if sizes[group.name] < group.size and not group.of_tokens:
            blocks.setdefault(group.block, {})[group.name] = 1 - sizes[group.name] / group.size
    yield from blocks.items()
