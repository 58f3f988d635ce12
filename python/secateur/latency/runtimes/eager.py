"""torch as it is, operation by operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .registry import register


@register
class Eager:
    """The module itself."""

    name = "torch"
    version = torch.__version__

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Return the module."""
        del example
        return module
