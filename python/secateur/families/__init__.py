"""The model families secateur knows: everything that is particular to timm's model code lives here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..anatomy import Anatomy
from ..errors import InvalidArgument, Unsupported
from . import vision_transformer


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


_FAMILIES: tuple[Family, ...] = (vision_transformer,)


def inspect(model: nn.Module) -> Anatomy:
    """Describe what can be cut out of a model; ``print`` it for a table.

    Args:
        model: a timm model of a supported family, on any device, the meta device too. Not changed.

    Raises:
        InvalidArgument: not an nn.Module.
        Unsupported: a class or module that secateur does not know exactly; the text names it and the reason.
    """
    return family_of(model).inspect(model)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        InvalidArgument: not an nn.Module.
        Unsupported: no family accepts it; the text names its class, and what to pass instead for wrappers.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"model: expected a timm model, got {type(model).__name__}")
    for family in _FAMILIES:
        if family.accepts(model):
            return family
    raise Unsupported(f"model: expected {_supported()}, got {_describe(model)}")


def family_named(name: str) -> Family:
    """The family with this name.

    Raises:
        Unsupported: there is none (a file from a later version).
    """
    for family in _FAMILIES:
        if name == family.NAME:
            return family
    raise Unsupported(f"family: expected one of {', '.join(f.NAME for f in _FAMILIES)}, got {name!r}")


def _supported() -> str:
    return "timm's VisionTransformer or VisionTransformerDistilled, by exact class"


def _describe(model: nn.Module) -> str:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    for attribute, wrapper in (
        ("_orig_mod", "a compiled model; pass the model itself and compile after pruning"),
        ("base_model", "a peft model; merge and unload the adapters first"),
        ("module", "a parallel wrapper; pass its .module and wrap again after pruning"),
        ("model", "a wrapper; pass its .model"),
    ):
        if isinstance(getattr(model, attribute, None), nn.Module):
            return f"{name} ({wrapper})"
    return name
