"""Runs calibration images through a model and collects what every method needs, without changing the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .. import check
from ..anatomy.fingerprint import Fingerprint
from ..data.loader import ImageLoader, in_batches
from ..data.model_input import data_config
from ..errors import InvalidArgument, Unsupported
from ..families.base import Family
from ..families.registry import family_of
from ..methods.registry import method_named, options_of
from ..runtime.ranks import Ranks, joined
from ..statistics.measurements import Measurement, measurements
from ..statistics.objective import Loss, Objective
from ..statistics.observer import Observer
from ..statistics.passes import run
from ..statistics.settings import Collect, Settings
from ..statistics.statistics import Statistics
from .cuts import Cuts
from .merging import MergingSchedules
from .sample import Sampler

__all__ = ["calibrate", "calibrate_block"]


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_images: int | None = 1024,
    collect: Collect = "all",
    gamma: int = 8,
    token_fraction: float = 1.0,
    row_weights: bool | None = None,
    sensitivity: bool | Literal["noise"] = False,
    methods: Iterable[str] | None = None,
    head_gradients: bool = False,
    gradients: bool = False,
    loss: Loss = None,
    amp: str | None = None,
    resume: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> Statistics:
    """Collect statistics of a model over images. It needs no labels and does not change the model.

    Gradients are computed only with ``head_gradients`` and ``gradients``. Query/key importance is SNP's (Shim et al.,
    SNP, ECCV 2024, arXiv:2404.11630): per image, how much each neuron's rank-one map agrees with the leading ``gamma``
    singular directions of the head's attention scores.

    Under torchrun, or in any initialised process group, all ranks must call this with the same arguments and the same
    weights, each on its own device. Each rank runs its share of the images, and all return the sums over all images,
    equal to those of one process with the same loader up to the order of addition (1e-12). The ranks proceed together,
    batch by batch. An error on one rank ends the run on all; so does a rank that dies, or does not answer for an hour
    (or the seconds in SECATEUR_RANK_TIMEOUT). Only the first rank reads and writes ``resume`` and shows progress.

    Args:
        model: a supported timm model, on any device. On a CUDA device the statistics are computed there: by the core if
            it was built with CUDA (``core.runtime.has_cuda()``), else by torch in float64, which is slower.
        loader: batches of images (B, C, H, W), normalised as in the model's data configuration, or sequences with them
            as the first item. It is read once, from start to end. On several ranks, a loader made by `data.loader` is
            divided among them batch by batch; any other loader must yield different images on each rank, and images are
            numbered as if the ranks took turns, batch by batch.
        max_images: stop after exactly this many images; None for all.
        collect: "scores" for query/key importance only, "all" for the second moments of queries, keys, values,
            projection inputs, FFN hidden units and the residual stream as well.
        gamma: number of leading singular directions that count.
        token_fraction: fraction of the tokens used for the moments: every k-th token, with k = round(1 /
            token_fraction), starting at another one in each image. Importance uses all tokens.
        row_weights: whether tokens have weights in the moments that fits use, so that neither a few massive tokens of a
            large model nor tokens that the output hardly depends on rule them; see ``statistics.rows.RowWeights``. The
            first 128 images pass through the model once more before the others, forward and backward. By default they
            have weights with sensitivity=True, where the model has one stream of tokens and collect is "all".
        sensitivity: if true, also measure what the cuts of ``methods`` really cost: each group alone is cut to a few
            sizes, and the outputs for 40 of the first 128 images are compared, weighted to stand for all of these; see
            ``Statistics.losses``. Plans divide a target by it. "noise" measures, on at most the first 128 images, how
            much the output changes when a group's part of the model is disturbed, or a layer is removed; see
            ``Statistics.sensitivity``.
        methods: the methods whose cuts are measured, with their default options; by default "project", or "snp" with
            collect="scores".
        head_gradients: also score heads by gradients, on the same images; see ``Statistics.head_importance``.
        gradients: also gather gradients of all images, one forward and one backward pass each, for the methods that
            need them; see ``statistics.gradients.Gradients``. Gradients of weights are neither needed nor changed.
        loss: what ``gradients`` are of: a function of the model's outputs and the loader's batch, tensors on the
            model's device, that returns the plain mean of the images' losses; "labels" for the cross-entropy with the
            loader's targets; by default the cross-entropy with the model's own answers, or half the squared features
            without a classifier. Batches are passed in parts of at most 16 images, and the loss is tried on one image
            before any work.
        amp: "bfloat16" runs the forward passes of ``gradients`` under torch.autocast; weights in float32 only.
        resume: a statistics file. If it exists, its images are skipped in the loader, which must yield the same images
            in the same order, and its sums are continued. The result is written to it; so are the sums so far when the
            loader fails, an image holds NaN or Inf, or the run is interrupted between two batches. On several ranks the
            loader must be made by `data.loader`, and their number may change; the sums so far are written unless a rank
            died or is interrupted.
        checkpoint_every: also write ``resume`` each time after this many batches (of each rank).

    Returns:
        The sums, in two folds: even and odd images.

    Raises:
        InvalidArgument: an argument out of range, an unknown method or one that needs what is not collected, batches
            that are not images of the model's size, or a ``resume`` file of another model, of other settings, or with
            more images than asked for.
        Unsupported: the model is not of a supported family; its tokens merge or have no common stream, with
            ``row_weights``; or, on several ranks, a stream, or ``resume`` with a loader
            not made by `data.loader`.
        NumericalError: NaN or Inf in an image or a layer; the text names the layer and the position.
        Error: another rank raised an error that is not secateur's, died or hangs.
        OSError: ``resume`` cannot be written.
    """
    with joined() as ranks:
        with ranks.together():
            family = family_of(model)
            anatomy = family.inspect(model)
            max_images = check.integer("max_images", max_images, optional=True)
            gamma = check.integer("gamma", gamma)
            checkpoint_every = check.integer("checkpoint_every", checkpoint_every, optional=True)
            token_fraction = check.fraction("token_fraction", token_fraction, open_low=True)
            loader = in_batches(loader, model, labels=loss is not None)
            _check(loader, collect, resume, checkpoint_every)
            objective = _objective(model, loader, gradients, loss, amp)
            if row_weights is None:
                row_weights = sensitivity is True and collect == "all" and _has_stream(model, family)
            elif row_weights:
                _check_weights(model, family, collect)
            names = _names(methods)
            further = _further(sensitivity, names, collect, head_gradients, gradients)
            path = None if resume is None else check.writable("resume", resume)
            settings = Settings(
                fingerprint=Fingerprint.of(model, anatomy),
                gamma=gamma,
                collect=collect,
                token_fraction=token_fraction,
                dtype="",
                data=_data_configuration(model),
                row_weights=bool(row_weights),
                gradients="" if objective is None else objective.name,
            )
            observer = Observer(anatomy, settings, objective=objective)
            if ranks.size > 1 and path is not None and not isinstance(loader, ImageLoader):
                # Such a loader does not tell which images the other ranks would have had.
                raise Unsupported(
                    f"resume: expected a loader of data.loader on several ranks, got {type(loader).__name__}"
                )
        _agree(ranks, settings)
        ranks.agree(
            max_images=max_images,
            resume=path is not None,
            checkpoint_every=checkpoint_every,
            sensitivity=sensitivity,
            methods=names,
            head_gradients=head_gradients,
            row_weights=row_weights,
        )
        return run(
            model,
            loader,
            observer,
            max_images=max_images,
            anatomy=anatomy,
            family=family,
            further=further,
            path=path,
            every=checkpoint_every,
            ranks=ranks,
            labels=loss is not None,
        )


def _check(
    loader: object,
    collect: str,
    resume: object,
    checkpoint_every: int | None,
) -> None:
    if collect not in ("scores", "all"):
        raise InvalidArgument(f"collect: expected 'scores' or 'all', got {collect!r}")
    if checkpoint_every is not None and resume is None:
        raise InvalidArgument("checkpoint_every: expected resume= to name the file to write, got none")
    if not isinstance(loader, Iterable):
        raise InvalidArgument(f"loader: expected batches of images, got {type(loader).__name__}")


def _objective(
    model: nn.Module, loader: Iterable[Any], gradients: bool, loss: Loss, amp: str | None
) -> Objective | None:
    """Return what gradients are taken of, None if they are not asked for."""
    if not gradients:
        for name, value in (("loss", loss), ("amp", amp)):
            if value is not None:
                raise InvalidArgument(f"{name}: expected None without gradients=True, got {value!r}")
        return None
    objective = Objective(loss, amp)
    objective.check(model, loader)
    return objective


def _check_weights(model: nn.Module, family: Family, collect: str) -> None:
    if collect != "all":
        raise InvalidArgument(f"row_weights: expected collect='all' with weights, got collect={collect!r}")
    if not _has_stream(model, family):
        raise Unsupported(
            f"row_weights: expected a model with one stream of tokens of which none merge, got {type(model).__name__}"
        )


def _has_stream(model: nn.Module, family: Family) -> bool:
    try:
        family.layers(model)
    except Unsupported:
        return False
    return True


def _names(methods: Iterable[str] | None) -> list[str] | None:
    if isinstance(methods, str) or not isinstance(methods, Iterable | None):
        raise InvalidArgument(f"methods: expected a sequence of names, got {methods!r}")
    return None if methods is None else list(methods)


def _further(
    sensitivity: object, methods: list[str] | None, collect: str, head_gradients: bool, gradients: bool
) -> list[Measurement]:
    """Return the measurements that are asked for."""
    if sensitivity not in (True, False, "noise"):
        raise InvalidArgument(f"sensitivity: expected True, False or 'noise', got {sensitivity!r}")
    if methods is not None and sensitivity is not True:
        raise InvalidArgument(f"methods: expected none without sensitivity=True, got {methods!r}")
    found: list[Measurement] = []
    if sensitivity is True:
        sampler = Sampler()
        for name in ("project" if collect == "all" else "snp",) if methods is None else methods:
            method = method_named(name)
            if "moments" in method.needs and collect != "all":
                raise InvalidArgument(f"methods: expected some that need scores only, got {name!r}; use collect='all'")
            if "gradients" in method.needs and not gradients:
                raise InvalidArgument(
                    f"methods: expected some that need no gradients, got {name!r}; use gradients=True"
                )
            found.append(Cuts(method, options_of(method, {}), sampler=sampler))
        found.append(MergingSchedules(sampler))
    found += [measurements.named("divergence")] if sensitivity == "noise" else []
    # With all gradients, those of heads are among them.
    return found + ([measurements.named("gradient")] if head_gradients and not gradients else [])


def _agree(ranks: Ranks, settings: Settings) -> None:
    """Refuse ranks that calibrate different models, or with different settings."""
    first, *others = (Settings.from_dict(fields) for fields in ranks.gather(settings.to_dict()))
    for rank, other in enumerate(others, 1):
        first.fingerprint.require(other.fingerprint, f"rank {rank}: model", strict=True)
    # Row weights may follow from other arguments, which are to be named first: the caller compares them.
    later = ("fingerprint", "row_weights")
    ranks.agree(**{name: value for name, value in vars(settings).items() if name not in later})


def calibrate_block(
    model: nn.Module, loader: Iterable[Any], block: int | None, *, max_images: int | None, token_fraction: float
) -> Statistics:
    """Collect statistics of one block's groups only, in passes that end after it; of all norms if it is None.

    The arguments are those of ``calibrate``, already checked.
    """
    anatomy = family_of(model).inspect(model)
    settings = Settings(Fingerprint.of(model, anatomy), 8, "all", token_fraction, "", _data_configuration(model))
    return run(model, loader, Observer(anatomy, settings, only=block, norms=block is None), max_images=max_images)


def _data_configuration(model: nn.Module) -> dict[str, Any]:
    """Return the model's own data configuration as JSON values; empty if timm's factory did not make it."""
    if not getattr(model, "pretrained_cfg", None):
        return {}
    config = data_config(model)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(config.items())}
