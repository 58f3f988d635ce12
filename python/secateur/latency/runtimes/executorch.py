"""ExecuTorch on the processor: the module is exported by torch and lowered to XNNPACK."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...families.attention import plain_attention
from ...runtime.executorch import engine, lowered
from ...runtime.quiet import quiet
from .base import refuse_other_places
from .registry import register


@register
class ExecuTorch:
    """ExecuTorch with its XNNPACK delegate, on as many threads as torch has."""

    name = "executorch"

    @property
    def version(self) -> str:
        """The version of ExecuTorch, without its build."""
        return engine("runtime").version

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, lower and load it.

        Raises:
            InvalidArgument: executorch is not installed, or was built for another torch.
            Unsupported: the example is not on the processor, or neither float32 nor float16; or other programs of
                ExecuTorch are loaded in this process, and its number of threads is not torch's.
        """
        found = engine("runtime")
        refuse_other_places("executorch", example)
        found.use_torchs_threads()
        # Of fused attention, eight small operators are left outside XNNPACK.
        with quiet(), torch.no_grad(), plain_attention(module):
            program = torch.export.export(module, (example,))
        return found.load(lowered(program).buffer)
