"""The model families secateur knows: everything that is particular to timm's model code lives here."""

from __future__ import annotations

from torch import nn

from ..anatomy.anatomy import Anatomy
from ..errors import InvalidArgument, Unsupported
from .base import Family
from .vision_transformer import inspect as vision_transformer

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
