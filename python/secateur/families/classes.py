"""Classes of torch and timm that a model's arguments and its file may name; no others are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm.layers
from timm.models import vision_transformer
from torch import nn

from ..errors import InvalidArgument
from .base import NORMS

__all__ = ["ACTIVATIONS", "decoded", "encoded", "is_plain", "named", "public_name"]

_ACTIVATIONS_OF_TORCH = (
    "CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU Mish ReLU ReLU6 SELU SiLU Sigmoid Softplus Tanh"
)
_ACTIVATIONS_OF_TIMM = "GELU GELUTanh HardMish HardSigmoid HardSwish Mish QuickGELU Sigmoid Swish Tanh"
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(getattr(nn, name) for name in _ACTIVATIONS_OF_TORCH.split()),
    *(getattr(timm.layers, name) for name in _ACTIVATIONS_OF_TIMM.split()),
)
_OTHERS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm2d,
    timm.layers.Attention,
    timm.layers.GluMlp,
    timm.layers.HybridEmbed,
    timm.layers.Mlp,
    timm.layers.PatchEmbed,
    timm.layers.SwiGLU,
    vision_transformer.Block,
    vision_transformer.ResPostBlock,
)
_PLACES = {"torch.nn": nn, "timm.layers": timm.layers, "timm.models.vision_transformer": vision_transformer}


def public_name(cls: type) -> str:
    """Return the name by which users import a class of torch or timm, else where it is defined."""
    for place, module in _PLACES.items():
        if getattr(module, cls.__name__, None) is cls:
            return f"{place}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


_KNOWN = {public_name(cls): cls for cls in (*NORMS, *ACTIVATIONS, *_OTHERS)}


def named(name: object) -> type[nn.Module]:
    """Return the class of this public name.

    Raises:
        InvalidArgument: it is none of the classes that files may name.
    """
    if not isinstance(name, str) or name not in _KNOWN:
        raise InvalidArgument(f"class: expected one of torch or timm that a file may name, got {name!r}")
    return _KNOWN[name]


def encoded(value: Any) -> Any:
    """Return an argument as JSON: known classes by name, and ``functools.partial`` of them with their arguments.

    Raises:
        ValueError: JSON cannot hold it; the text is the value.
    """
    name = public_name(value) if isinstance(value, type) else ""
    if name in _KNOWN and _KNOWN[name] is value:
        return {"class": name}
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        arguments = {name: encoded(item) for name, item in value.keywords.items()}
        return {**encoded(value.func), "arguments": arguments}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and "class" not in value:
        return {key: encoded(item) for key, item in value.items()}
    if is_plain(value):
        return value
    raise ValueError(repr(value))


def is_plain(value: object) -> bool:
    """Return whether a value is a number, a text or None that JSON keeps as it is."""
    if isinstance(value, float):
        return value - value == 0
    return value is None or type(value) in (bool, int, str)


def decoded(value: Any) -> Any:
    """Return an argument from its JSON; lists become tuples, as timm's arguments have them.

    Raises:
        InvalidArgument: it names a class that files may not name.
    """
    if isinstance(value, Mapping) and "class" in value:
        cls = named(value["class"])
        arguments = value.get("arguments")
        return cls if arguments is None else partial(cls, **{name: decoded(item) for name, item in arguments.items()})
    if isinstance(value, Mapping):
        return {key: decoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(decoded(item) for item in value)
    return value
