"""Trains a pruned model on unlabelled images until it computes what the dense one does."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from .. import check, core
from ..data.loader import in_batches
from ..data.model_input import input_dtype, refuse_iterator
from ..errors import InvalidArgument, Unsupported
from ..families.base import Family, current_arguments
from ..families.registry import family_of
from ..runtime.devices import place_for
from ..runtime.ranks import Ranks, joined
from ..statistics.passes import as_written, evaluating
from ..statistics.rows import RowWeights
from ..statistics.streams import Keep, Streams
from ..training.average import overwrite
from .best import Course
from .blocks import Blocks
from .images import HeldBack
from .outputs import Outputs

__all__ = ["Reconstruction", "reconstruct"]


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` reached, all on the ``held_back`` images among ``images``.

    ``loss_before`` and ``loss`` are KL(dense || pruned) in nats; without classes, the squared error of features as a
    share of their variance. ``blocks`` maps the last layer of the blocks that were trained together to the share of
    their error that is left; it is empty if they are as they were. ``passes`` holds the model's loss before the passes
    with output targets and after each.
    """

    loss_before: float
    loss: float
    images: int
    held_back: int
    blocks: Mapping[str, float]
    passes: tuple[float, ...]

    def __str__(self) -> str:
        change = f"loss {self.loss_before:.4f} -> {self.loss:.4f} on {self.held_back:,} images held back"
        return f"{change}, {self.images - self.held_back:,} images trained on"


@torch.inference_mode(False)
@core.host_by_default()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    loader: Iterable[Any],
    *,
    blocks: int = 1,
    epochs: int = 10,
    lr: float = 2e-4,
    output_epochs: int = 5,
    output_lr: float = 2e-5,
    batch_size: int = 32,
    held_back: float = 0.2,
    max_images: int | None = None,
    streams: Keep = "memory",
    seed: int = 0,
) -> Reconstruction:
    """Train a pruned model in place, without labels, until it computes what the dense model does.

    First block by block: each block gets what the trained blocks before it give, and learns to leave the dense model's
    residual stream (after BRECQ, arXiv:2102.05426). Tokens count by ``statistics.rows.RowWeights``; the squared error
    is minimised by AdamW with a cosine. Tokens are not merged meanwhile. Then the whole model is trained, as it is,
    towards the dense model's output and its residual stream, where norms read it.

    Every n-th image, n = round(1 / ``held_back``), is never trained on. Each block keeps its best values on these
    images, and so does the whole model, whose loss is KL(dense || pruned) or, without classes, the squared error of the
    features. The model is therefore never worse on them afterwards; if nothing helps, it is not changed. Everything is
    done on a copy.

    Blocks are left as they are if the residual width was cut, since their streams have other bases then.

    Args:
        model: the pruned model, in evaluation mode meanwhile. Parameters that do not require a gradient stay.
        dense: the model that it was cut from, on the same device; it is not changed.
        loader: batches of images, or of images and anything, as for ``calibrate``. It is read several times, twice for
            each pass of the whole model, and must yield the same images in the same order each time: not shuffled or
            augmented.
        blocks: how many blocks are trained together.
        epochs: the largest number of passes over the images for each block; 0 trains none. Training ends sooner if
            three passes have not helped.
        lr: the highest learning rate for blocks.
        output_epochs: the largest number of passes for the whole model; 0 leaves them out.
        output_lr: the highest learning rate for the whole model.
        batch_size: images in a step.
        held_back: the share of images that is held back, at most a half.
        max_images: the largest number of images; None for all.
        streams: as for ``prune_sequential``.
        seed: the seed of the order.

    Raises:
        InvalidArgument: an argument that does not fit, an iterator, images that change from pass to pass, or too few to
            hold one back.
        Unsupported: the model is not of a supported family, or its layers do not run one at a time; or several ranks.
        NumericalError: NaN or Inf in an image.
    """
    refuse_iterator(loader)
    together = check.integer("blocks", blocks)
    epochs = check.integer("epochs", epochs, 0)
    output_epochs = check.integer("output_epochs", output_epochs, 0)
    batch_size = check.integer("batch_size", batch_size)
    max_images = check.integer("max_images", max_images, optional=True)
    seed = check.integer("seed", seed, 0)
    lr = check.number("lr", lr, open_low=True)
    output_lr = check.number("output_lr", output_lr, open_low=True)
    held = HeldBack(check.number("held_back", held_back, open_low=True, high=0.5))
    check.choice("streams", streams, get_args(Keep))
    family = _family_of_both(model, dense)
    loader = in_batches(loader, dense, labels=False)
    with joined() as ranks:
        if ranks.size > 1:
            raise Unsupported(f"reconstruct: expected one process, got {ranks.size} ranks")
    anatomy, trained = family.inspect(dense), copy.deepcopy(model)
    prefix = family.prefix_tokens(dense)
    with core.torch_threads():
        outputs = Outputs(dense, trained, family, anatomy, loader, max_images, held, batch_size=batch_size, seed=seed)
        every = _every_token(trained, family)
        both = Streams(dense, every, family, list(family.layers(dense)), loader, max_images, streams, Ranks())
        courses: dict[str, Course] = {}
        with both.running(), evaluating(trained), as_written(trained):
            loss = before = outputs.loss()
            rows = RowWeights(dense, anatomy, prefix, both.measure(anatomy))
            if epochs > 0 and family.inspect(every).stream_widths == anatomy.stream_widths:
                both.start(diverged=not both.enter_alike())
                courses = Blocks(
                    dense,
                    every,
                    family,
                    anatomy,
                    both,
                    held,
                    together=together,
                    epochs=epochs,
                    lr=lr,
                    batch_size=batch_size,
                    seed=seed,
                ).run(rows)
            if courses:
                _put(every, trained)
                # Blocks that are closer to the dense ones do not always make a better model.
                loss = outputs.loss()
                if not loss <= before:
                    _put(model, trained)
                    courses, loss = {}, before
            course = outputs.train(output_epochs, output_lr, rows, loss)
            if course is not None:
                loss = course.best
    if loss < before:
        _put(trained, model)
    return Reconstruction(
        before,
        loss,
        outputs.images,
        held.count(outputs.images),
        {name: each.best for name, each in courses.items()},
        () if course is None else course.losses,
    )


def _family_of_both(model: nn.Module, dense: nn.Module) -> Family:
    """Return the family of a model and of the one that it was cut from, and refuse what cannot be compared."""
    places = place_for(model), place_for(dense, argument="dense")
    if model is dense:
        raise InvalidArgument("dense: expected another model than the one to train, got the same")
    if places[0] != places[1]:
        raise InvalidArgument(f"dense: expected a model on {places[0]}, got one on {places[1]}")
    family = family_of(dense)
    mine, theirs = family_of(model).inspect(model), family.inspect(dense)
    for what, found, wanted in (
        ("type", *(str(input_dtype(each)).removeprefix("torch.") for each in (dense, model))),
        ("input size", theirs.input_size, mine.input_size),
        ("number of classes", *(current_arguments(each).get("num_classes") for each in (dense, model))),
    ):
        if found != wanted:
            raise InvalidArgument(f"dense: expected the model's {what}, {wanted}, got {found}")
    larger = [name for name, size in mine.fixed_sizes.items() if size > theirs.sizes.get(name, 0)]
    if type(family_of(model)) is not type(family) or larger:
        where = f", which is smaller in {larger[0]}" if larger else ""
        raise InvalidArgument(
            f"dense: expected the model that was pruned, got a {type(dense).__name__} for a {type(model).__name__}"
            f"{where}"
        )
    try:
        family.layers(dense)
    except Unsupported as error:
        raise Unsupported(
            f"reconstruct: expected a dense model whose layers run one at a time, got {type(dense).__name__} "
            "(finetune with a teacher trains any model)"
        ) from error
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise InvalidArgument(
                f"model: expected weights in float32 or float64, whose small steps are not lost by rounding, "
                f"got {name} in {parameter.dtype}"
            )
    return family


def _every_token(model: nn.Module, family: Family) -> nn.Module:
    """Return a copy of a model that merges no tokens."""
    found = copy.deepcopy(model)
    anatomy = family.inspect(found)
    whole = {name: tokens.merges[-1].units for name, tokens in anatomy.tokens.items()}
    if whole:
        family.adapt(found, anatomy, {**anatomy.sizes, **whole})
    return found


def _put(source: nn.Module, target: nn.Module) -> None:
    """Copy the values of all parameters."""
    overwrite(dict(target.named_parameters()), dict(source.named_parameters()))
