"""The kinds of groups, and what a budget may do with each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["qk", "v", "ffn", "conv", "heads", "width", "layer"]
# What files and callers said before 0.2.
_FORMER = MappingProxyType({"block": "layer"})


@dataclass(frozen=True)
class Traits:
    """What is particular to a kind.

    ``multiple`` is the default multiple of kept counts under a target, a hardware-friendly size; ``in_target`` says
    whether a target cuts the kind unless told otherwise, ``least`` the fewest units that can stay. Kinds that are
    ``counted`` (heads, layers) are not channels: one number for ``round_to`` does not apply to them. A kind
    ``steps_with`` another so that both keep one size in a layer. A kind that is ``shared`` by many layers (the residual
    width) multiplies their costs, and is chosen before them; one that is ``whole`` is a layer, which can vanish.
    """

    multiple: int = 1
    in_target: bool = False
    least: int = 1
    counted: bool = False
    steps_with: Kind | None = None
    shared: bool = False
    whole: bool = False


KINDS: Mapping[str, Traits] = MappingProxyType(
    {
        "qk": Traits(multiple=8, in_target=True),
        "v": Traits(multiple=8, in_target=True, steps_with="qk"),
        "ffn": Traits(multiple=32, in_target=True),
        "conv": Traits(multiple=8, in_target=True),
        "heads": Traits(counted=True),
        "width": Traits(multiple=32, shared=True),
        "layer": Traits(least=0, counted=True, whole=True),
    }
)


def current(name: str) -> str:
    """A kind by its present name: "layer" for "block"; other names as they are."""
    return _FORMER.get(name, name)
