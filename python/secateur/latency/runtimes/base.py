"""What an engine offers to those who time models on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ...errors import Unsupported

__all__ = ["INT8_TOLERANCE", "Runtime", "refuse_other_places"]

# What engines for the processor have all operations for.
_DTYPES = (torch.float32, torch.float16)
# Of linear layers with ranges of one input; what is compared with is another model's output, or none.
INT8_TOLERANCE = 0.5


class Runtime(Protocol):
    """An engine; a class registers itself with ``runtimes.registry.register``. One instance, no state.

    ``name`` is what arguments take and files hold. A class may have ``layout``, the one that suits the engine
    ("exact" if it has none); ``prune(layout="auto", engine=name)`` chooses it, unless an exporter has the same name.
    One that rounds more than the input's type does has ``tolerance``, the largest difference from the module's output
    relative to its largest value.
    """

    name: str

    @property
    def version(self) -> str:
        """The version of the engine: another may be faster.

        Raises:
            InvalidArgument: the engine is not installed; the text names the command that installs it.
        """

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Make ready what runs the module on inputs of the shape, type and device of ``example``.

        What takes long, such as compiling, is done here and not on the first call. The module, in evaluation mode, is
        not changed. The result takes such an input and returns the module's output, as a tensor or what
        ``torch.as_tensor`` takes; before it is timed, the first one is compared with the module's. Both are called
        within ``torch.inference_mode`` and with torch's number of threads, which the engine takes as its own.

        Raises:
            InvalidArgument: the engine is not installed.
            Unsupported: the engine does not run on this device or in this type.
        """


def refuse_other_places(engine: str, example: Tensor, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> None:
    """Refuse inputs that an engine for the processor does not take.

    Raises:
        Unsupported: the example is not on the processor, or of none of the types.
    """
    if example.device.type != "cpu":
        raise Unsupported(f"device: expected 'cpu' for {engine}, got {str(example.device)!r}")
    if example.dtype not in dtypes:
        names = [str(each).removeprefix("torch.") for each in (*dtypes, example.dtype)]
        raise Unsupported(f"dtype: expected {' or '.join(names[:-1])} for {engine}, got {names[-1]!r}")
