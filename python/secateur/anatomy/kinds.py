"""The kinds of groups, and what a budget may do with each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from ..errors import InvalidArgument

Kind = Literal["qk", "v", "ffn", "conv", "heads", "width", "layer", "tokens"]
# Names that files and callers used before 0.2.
_FORMER = MappingProxyType({"block": "layer"})


@dataclass(frozen=True)
class Traits:
    """The properties of a kind.

    ``multiple`` is the default multiple of kept counts under a target, a hardware-friendly size; ``in_target`` says
    whether a target cuts the kind unless told otherwise, ``least`` the fewest units that can stay. Kinds that are
    ``counted`` (heads, layers) are not channels: a single number for ``round_to`` does not apply to them. A kind that
    ``steps_with`` another changes along with it, so that both keep the same size in a layer. A ``shared`` kind (the
    residual width, tokens) belongs to many layers and multiplies their costs, so it is chosen first; a ``whole`` kind
    is a layer, which can be removed entirely. Latency tables measure the kinds that are ``in_table``, unless
    told otherwise.
    """

    multiple: int = 1
    in_target: bool = False
    least: int = 1
    counted: bool = False
    steps_with: Kind | None = None
    shared: bool = False
    whole: bool = False
    in_table: bool = True


KINDS: Mapping[str, Traits] = MappingProxyType(
    {
        "qk": Traits(multiple=8, in_target=True),
        "v": Traits(multiple=8, in_target=True, steps_with="qk"),
        "ffn": Traits(multiple=32, in_target=True),
        "conv": Traits(multiple=8, in_target=True),
        "heads": Traits(counted=True),
        "width": Traits(multiple=32, shared=True),
        "layer": Traits(least=0, counted=True, whole=True),
        # Units are tokens that could still be merged in a block; they have no weights.
        "tokens": Traits(counted=True, shared=True, in_table=False),
    }
)


def renamed(argument: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the present names of kinds.

    Raises:
        InvalidArgument: a kind is named twice, by its present and its former name.
    """
    for name in values:
        if current(name) != name and current(name) in values:
            raise InvalidArgument(f"{argument}: expected {name!r} or {current(name)!r}, which are one kind, got both")
    return {current(name): value for name, value in values.items()}


def current(name: str) -> str:
    """Return the present name of a kind: "layer" for "block"; other names are unchanged."""
    return _FORMER.get(name, name)
