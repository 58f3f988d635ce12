"""Copies of vision transformers in the library's own classes, for formats that know no others."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..errors import Unsupported
from ..families.registry import family_of
from ..families.vision_transformer.alike import Sizes, sizes_of_all_blocks
from ..plans.prune import prune

__all__ = ["alike"]

_FAMILY = "vision_transformer"


def alike(model: nn.Module, name: str) -> tuple[Any, Sizes]:
    """Return a copy in timm's own classes, with all tokens in the last block, and the sizes of its blocks.

    Args:
        model: the model; it is not changed.
        name: the format, for error texts.

    Raises:
        Unsupported: it is no plain vision transformer, merges tokens, or has blocks that differ; the text names the
            first module that does.
    """
    if family_of(model).name != _FAMILY:
        raise Unsupported(f"model: expected a VisionTransformer for {name}, got {type(model).__name__}")
    plain: Any = copy.deepcopy(model)
    sizes = sizes_of_all_blocks(plain, name)
    prune(plain, layout="stock", last_block="whole")
    return plain, sizes
