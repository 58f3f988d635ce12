"""What a model costs: what every cost can tell, and multiply-accumulates (MACs), exact for every cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

# One size, or an array of sizes that are asked about at once.
Size: TypeAlias = Any
Sizes: TypeAlias = Sequence[int] | npt.NDArray[np.int64]


class Cost(Protocol):
    """What a budget limits, such as MACs. It does not fall as a group grows, and need not be linear in its size."""

    @property
    def name(self) -> str:
        """The word for it in a target."""

    @property
    def dense(self) -> float:
        """The cost of the model that is planned for."""

    def total(self, sizes: Mapping[str, int]) -> float:
        """The cost of the whole model when each named group has the given size."""

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> npt.NDArray[np.float64]:
        """The cost of the whole model at ``base`` but with the groups of ``sizes`` at each of these in turn: (n,)."""


@dataclass(frozen=True)
class WeightProduct:
    """A linear layer or convolution: its weight is applied at ``positions`` places of one image."""

    module: str
    positions: int
    parameter: str = "weight"


@dataclass(frozen=True)
class AttentionProduct:
    """QKᵀ and its product with V: ``queries`` by ``keys`` tokens, ``heads`` heads of qk_dim and v_dim channels.

    ``heads``, ``qk`` and ``v`` are either the name of the group that holds the number or size per head, or that itself;
    ``layer`` the group that says whether all of it is there.
    """

    module: str
    queries: int
    keys: int
    heads: str | int
    qk: str | int
    v: str | int
    layer: str | int = 1


@dataclass(frozen=True)
class FixedProduct:
    """A part of the model that is never cut (a convolutional stem), with its MACs for one image."""

    module: str
    macs: int


Product: TypeAlias = WeightProduct | AttentionProduct | FixedProduct


def macs(
    products: tuple[Product, ...],
    numel: Callable[[str, str], Size],
    size: Callable[[str], Size],
) -> Size:
    """Count the MACs of one image.

    Args:
        products: what the model multiplies.
        numel: (module, parameter) to the number of weights.
        size: group name to its units (per head where the group is per head).
    """

    def of(number: str | int) -> Size:
        return size(number) if isinstance(number, str) else number

    total: Size = 0
    for product in products:
        if isinstance(product, WeightProduct):
            total = total + product.positions * numel(product.module, product.parameter)
        elif isinstance(product, AttentionProduct):
            channels = of(product.heads) * (of(product.qk) + of(product.v)) * of(product.layer)
            total = total + product.queries * product.keys * channels
        else:
            total += product.macs
    return total
