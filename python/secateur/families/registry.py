"""Finds the family of a model."""

from __future__ import annotations

from torch import nn

from ..anatomy import Anatomy
from ..errors import InvalidArgument, Unsupported
from ..registry import Registry
from .base import Family

__all__ = ["families", "family_named", "family_of", "inspect", "register"]

families: Registry[Family] = Registry("family", "secateur.families", "secateur.families", members=("models", "inspect"))
register = families.register


def inspect(model: nn.Module) -> Anatomy:
    """Describe what can be removed from a model; ``print`` the result for a table.

    Args:
        model: a timm model of a supported family, on any device, including the meta device. It is not changed.

    Raises:
        InvalidArgument: not an nn.Module.
        Unsupported: a class or module that secateur does not know; the text names it and the reason.
    """
    return family_of(model).inspect(model)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        InvalidArgument: not an nn.Module.
        Unsupported: no family accepts it; the text names its class and, for wrappers, what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"model: expected a timm model, got {type(model).__name__}")
    for family in families:
        if family.accepts(model):
            return family
    classes = sorted(cls.__name__ for family in families for cls in family.models)
    raise Unsupported(f"model: expected timm's {' or '.join(classes)}, by exact class, got {_describe(model)}")


def family_named(name: str) -> Family:
    """Return the family with this name.

    Raises:
        Unsupported: there is none, as for a file from a later version.
    """
    try:
        return families.named(name)
    except InvalidArgument as error:
        raise Unsupported(str(error)) from error


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
