"""`secateur inspect`."""

import secateur as sc

from . import lazy
from .options import Checkpoint, Classes, Json, Kwargs, Model, Pretrained, UseEma
from .output import collected

__all__ = ["inspect"]


def inspect(
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    as_json: Json = False,
) -> None:
    """Show what can be cut out of a model, and what it costs."""
    with collected(as_json) as output:
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema, weights=False)
        anatomy = sc.inspect(net)
        output.show(str(anatomy), **anatomy.to_dict())
