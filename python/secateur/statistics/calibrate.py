"""Run calibration images through a model and collect what every method needs, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .. import check
from ..anatomy.fingerprint import Fingerprint
from ..data.loader import ImageLoader
from ..data.model_input import data_config
from ..errors import InvalidArgument, Unsupported
from ..families.registry import family_of
from ..runtime.ranks import Ranks, joined
from .measurements import measurements
from .observer import Observer
from .passes import run
from .settings import Collect, Settings
from .statistics import Statistics

__all__ = ["calibrate", "calibrate_block"]


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_images: int | None = 1024,
    collect: Collect = "all",
    gamma: int = 8,
    token_fraction: float = 1.0,
    sensitivity: bool = False,
    head_gradients: bool = False,
    resume: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> Statistics:
    """Collect the statistics of a model over images: no labels, no gradients but by request, the model left as it was.

    Query/key importance is SNP's (Shim et al., SNP, ECCV 2024, arXiv:2404.11630): per image, how much each neuron's
    rank-one map agrees with the leading ``gamma`` singular directions of the head's attention scores.

    Under torchrun, or in any initialised process group, all ranks must call this with the same arguments and the same
    weights, each on a device of its own. Each runs its share of the images; all return the sums over all of them, up to
    the order of addition (1e-12) those of one process with the same loader. The ranks go on batch by batch together.
    What is raised on one ends the run on all; so does a rank that dies, or says nothing for an hour (for the seconds
    in SECATEUR_RANK_TIMEOUT). The first rank alone reads and writes ``resume``, and shows progress.

    Args:
        model: a supported timm model, on any device. On a CUDA device the statistics are computed there: by the core
            where it was built with CUDA (``core.runtime.has_cuda()``), or by torch in float64, which is slower.
        loader: batches of images (B, C, H, W), normalised as the model's data configuration says, or sequences whose
            first item they are. It is read once, front to back. On several ranks one of `data.loader` is shared out
            among them batch by batch; any other must give each rank images of its own, and counts as if the ranks' next
            batches always followed one another.
        max_images: stop after exactly this many images; None for all.
        collect: "scores" for query/key importance only, "all" for the second moments of queries, keys, values,
            projection inputs, FFN hidden units and the residual stream as well.
        gamma: leading singular directions that count.
        token_fraction: share of the tokens that feed the moments, rotating from image to image: every k-th token, with
            k = round(1 / token_fraction). Importance uses all tokens.
        sensitivity: more passes over the first 128 images or fewer: how much the output moves when one group's part
            of the model is disturbed, or a layer is missing; see ``Statistics.sensitivity``. Plans weigh errors by it.
        head_gradients: score heads by gradients as well, on the same images; see ``Statistics.head_importance``.
        resume: a statistics file. If it exists, its images are skipped in the loader, which must give the same images
            in the same order, and the sums go on from there. The result is written to it; so is what was collected
            when the loader fails, an image holds NaN or Inf, or the run is interrupted between two batches.
            On several ranks the loader must be of `data.loader`, then their number may change; what was collected is
            written unless a rank died or is interrupted.
        checkpoint_every: also write ``resume`` after every so many batches (of each rank).

    Returns:
        Sums in two folds, even and odd images.

    Raises:
        InvalidArgument: an argument out of range, batches that are no images of the model's size, a ``resume`` file
            of another model or settings, or one of more images than are asked for.
        Unsupported: the model is of no supported family; on several ranks a stream, or ``resume`` with a loader that
            is not of `data.loader`.
        NumericalError: NaN or Inf in an image or a layer; the text names layer and place.
        Error: another rank raised something that is not of secateur, died or hangs.
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
            _check(loader, collect, resume, checkpoint_every)
            path = None if resume is None else check.writable("resume", resume)
            settings = Settings(
                fingerprint=Fingerprint.of(model, anatomy),
                gamma=gamma,
                collect=collect,
                token_fraction=token_fraction,
                dtype="",
                data=_data_configuration(model),
            )
            observer = Observer(anatomy, settings)
            if ranks.size > 1 and path is not None and not isinstance(loader, ImageLoader):
                # Which images the others would have had cannot be told from it.
                raise Unsupported(
                    f"resume: expected a loader of data.loader on several ranks, got {type(loader).__name__}"
                )
        _agree(ranks, settings)
        ranks.agree(
            max_images=max_images,
            resume=path is not None,
            checkpoint_every=checkpoint_every,
            sensitivity=sensitivity,
            head_gradients=head_gradients,
        )
        asked = (("divergence", sensitivity), ("gradient", head_gradients))
        return run(
            model,
            loader,
            observer,
            max_images=max_images,
            anatomy=anatomy,
            family=family,
            further=[measurements.named(name) for name, wanted in asked if wanted],
            path=path,
            every=checkpoint_every,
            ranks=ranks,
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


def _agree(ranks: Ranks, settings: Settings) -> None:
    """Refuse ranks that calibrate different models, or in different ways."""
    first, *others = (Settings.from_dict(fields) for fields in ranks.gather(settings.to_dict()))
    for rank, other in enumerate(others, 1):
        first.fingerprint.require(other.fingerprint, f"rank {rank}: model", strict=True)
    ranks.agree(**{name: value for name, value in settings.to_dict().items() if name != "fingerprint"})


def calibrate_block(
    model: nn.Module, loader: Iterable[Any], block: int | None, *, max_images: int | None, token_fraction: float
) -> Statistics:
    """Statistics of one block's groups alone, from forward passes that end behind it; of all norms where None.

    The arguments are those of ``calibrate`` and have been checked.
    """
    anatomy = family_of(model).inspect(model)
    settings = Settings(Fingerprint.of(model, anatomy), 8, "all", token_fraction, "", _data_configuration(model))
    return run(model, loader, Observer(anatomy, settings, only=block, norms=block is None), max_images=max_images)


def _data_configuration(model: nn.Module) -> dict[str, Any]:
    """The model's own data configuration, as JSON values; empty for a model that timm's factory did not make."""
    if not getattr(model, "pretrained_cfg", None):
        return {}
    config = data_config(model)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(config.items())}
