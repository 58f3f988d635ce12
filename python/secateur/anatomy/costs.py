"""Costs of a model: the interface of every cost, and multiply-accumulates (MACs), exact for every cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

# One size, or an array of sizes to evaluate at once.
Size: TypeAlias = Any
Sizes: TypeAlias = Sequence[int] | npt.NDArray[np.int64]


class Cost(Protocol):
    """A quantity that a budget limits, such as MACs. It never falls as a group grows; it need not be linear."""

    @property
    def name(self) -> str:
        """Its name in a target."""

    @property
    def dense(self) -> float:
        """The cost of the model that is to be pruned."""

    def total(self, sizes: Mapping[str, int]) -> float:
        """Return the cost of the whole model when each named group has the given size."""

    def along(self, base: Mapping[str, int], sizes: Mapping[str, Sizes]) -> npt.NDArray[np.float64]:
        """Return costs of the whole model, (n,): ``base``, with the groups of ``sizes`` at each of n sizes in turn."""


@dataclass(frozen=True)
class WeightProduct:
    """A linear layer or convolution whose weight is applied at ``positions`` places of one image."""

    module: str
    positions: int
    parameter: str = "weight"


@dataclass(frozen=True)
class AttentionProduct:
    """QKᵀ and its product with V: ``queries`` by ``keys`` tokens, ``heads`` heads of qk_dim and v_dim channels.

    ``heads``, ``qk`` and ``v`` are numbers, or the name of the group whose size is that number; ``layer`` is the group
    that says whether the layer is present, or 1.
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
    """A part of the model that is never cut (such as a convolutional stem), with its MACs for one image."""

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
        products: the products that the model computes.
        numel: maps (module, parameter) to its number of weights.
        size: maps a group name to its number of units (per head where the group is per head).
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
