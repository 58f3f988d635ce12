"""Finds the family of a model."""

from __future__ import annotations

from torch import nn

from ..anatomy import Anatomy
from ..errors import InvalidArgument, Unsupported
from ..registry import Registry
from .base import Family
from .wrapped import described, not_a_module, refuse_foreign

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
        Unsupported: no family accepts it; the text names its class and, for wrappers, larger networks and models of
            other libraries, what to pass instead. Or another tool has put adapters, quantized or sharded weights into
            it.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"model: expected a timm model, got {not_a_module(model)}")
    family = _accepting(model)
    if family is None:
        models = [cls for each in families for cls in each.models]
        classes = " or ".join(
            [*sorted(cls.__name__ for cls in models), *(each.others for each in families if each.others)]
        )
        got = described(model, models, lambda module: _accepting(module) is not None, inspect)
        raise Unsupported(f"model: expected timm's {classes}, by exact class, got {got}")
    refuse_foreign(model)
    return family


def _accepting(model: nn.Module) -> Family | None:
    # A family that names the class goes before one that looks at what is inside.
    found = sorted(families, key=lambda family: type(model) not in family.models)
    return next((family for family in found if family.accepts(model)), None)


def family_named(name: str) -> Family:
    """Return the family with this name.

    Raises:
        Unsupported: there is none, as for a file from a later version.
    """
    try:
        return families.named(name)
    except InvalidArgument as error:
        raise Unsupported(str(error)) from error
