"""What a family of models offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..anatomy.anatomy import Anatomy


class Family(Protocol):
    """What a module of this package offers."""

    NAME: str

    def accepts(self, model: nn.Module) -> bool:
        """Is the model of this family's classes?"""

    def inspect(self, model: nn.Module) -> Anatomy:
        """Describe the model, or raise Unsupported naming the module and the reason."""

    def adapt(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
        """Make modules and attributes fit parameters that were just cut from ``anatomy`` to ``sizes``."""

    def stock_sizes(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, int]:
        """What a cut to ``sizes`` leaves in the stock layout, or raise Unsupported naming the module and the reason."""

    def make_stock(self, model: nn.Module, head_dims: Mapping[str, int]) -> None:
        """Make attention modules the library's own; their parameters already have the given size per head."""

    def alone(self, model: nn.Module, block: int | None) -> nn.Module:
        """A copy of the model with that block alone, or without any."""

    def layers(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Attention and FFN layers by name, each with norm and residual sum: (B, N, width) to the same. No copies."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks, first to last."""

    def from_block(self, model: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of the model, given what enters a block: (B, N, width)."""

    def build(self, architecture: str, arguments: Mapping[str, Any], device: torch.device) -> nn.Module:
        """Build a dense model with arbitrary weights."""
