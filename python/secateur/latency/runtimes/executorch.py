"""ExecuTorch on the processor: the module is exported by torch and lowered to XNNPACK."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...families.attention import plain_attention
from ...runtime.executorch import engine, in_int8, lowered
from ...runtime.quiet import quiet
from .base import INT8_TOLERANCE, refuse_other_places
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
        refuse_other_places(self.name, example)
        found.use_torchs_threads()
        return found.load(lowered(_exported(module, example)).buffer)


@register
class ExecuTorchInt8(ExecuTorch):
    """The same with linear layers in 8 bits, as the exporter's ``int8`` has them.

    Their ranges are those of the example: enough for the time.
    """

    name = "executorch-int8"
    tolerance = INT8_TOLERANCE

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, quantize, lower and load it.

        Raises:
            InvalidArgument: executorch is not installed, or was built for another torch.
            Unsupported: the example is not on the processor, or not float32; or other programs of ExecuTorch are loaded
                in this process, and its number of threads is not torch's.
        """
        found = engine("runtime")
        refuse_other_places(self.name, example, (torch.float32,))
        found.use_torchs_threads()
        quantized = in_int8(_exported(module, example), [example])
        return found.load(lowered(_exported(quantized, example)).buffer)


def _exported(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    # Of fused attention, eight small operators are left outside XNNPACK.
    with quiet(), torch.no_grad(), plain_attention(module):
        return torch.export.export(module, (example,))
