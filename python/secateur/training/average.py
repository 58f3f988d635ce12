"""A moving average of the trained weights, which the model holds while it is evaluated and at the end."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .checkpoint import state

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Average", "overwrite"]


class Average:
    """The moving average of a module's weights and buffers, by timm.

    Args:
        module: the module that is trained.
        decay: in [0, 1). Step n decays by no more than 1 - n**(-2/3).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        # In half precision, a step of the average would be lost by rounding.
        half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in module.parameters())
        self._trained = module
        self._average = ModelEmaV3(module, decay=decay, use_warmup=True, dtype=torch.float32 if half else None)

    def update(self, step: int) -> None:
        """Update the average with the weights after this step."""
        self._average.update(self._trained, step=step)

    def take_over(self) -> None:
        """Overwrite the weights by their average, in their own types."""
        overwrite(self._trained.state_dict(), self._average.module.state_dict())

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the module hold the average while the block runs."""
        mine = self._trained.state_dict()
        trained = {name: tensor.clone() for name, tensor in mine.items()}
        self.take_over()
        try:
            yield
        finally:
            overwrite(mine, trained)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by name, including buffers that state_dict omits."""
        return state(self._average.module)


@torch.no_grad()
def overwrite(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors with the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
