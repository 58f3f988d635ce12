"""`secateur evaluate`."""

from dataclasses import asdict

import secateur as sc

from . import lazy
from .options import (
    BatchSize,
    Checkpoint,
    Classes,
    Data,
    Device,
    Json,
    Kwargs,
    MaxImages,
    Model,
    Pretrained,
    Seed,
    Split,
    Threads,
    Unreadable,
    UseEma,
    Workers,
)
from .output import collected

__all__ = ["evaluate"]


def evaluate(
    data: Data,
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
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy and loss."""
    with collected(as_json) as output:
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema)
        shuffle = max_images is not None and not data.startswith("hfids:")
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
        found = sc.evaluate(net, images, device=device)
        output.show(str(found), **asdict(found))
