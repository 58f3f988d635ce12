"""What an engine offers to those who time models on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Runtime"]


class Runtime(Protocol):
    """An engine; a class registers itself with ``runtimes.registry.register``. One instance, no state.

    ``name`` is what arguments take and files hold.
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
