"""What torch.compile makes of a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .registry import register

# torch compiles one piece of code for eight modules, and then quietly runs what comes as it is written.
_NO_LIMIT = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}


@register
class Compiled:
    """torch.compile for the example's shape."""

    name = "torch.compile"
    version = torch.__version__

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Compile the module."""
        run: Callable[[Tensor], object] = torch.compile(module, dynamic=False)
        with torch._dynamo.config.patch(_NO_LIMIT):
            run(example)
        return run
