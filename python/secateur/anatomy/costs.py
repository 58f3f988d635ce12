"""Costs of a model: the interface of every cost, and multiply-accumulates (MACs), exact for every cut."""

from __future__ import annotations

import math
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
class Merge:
    """A block that merges tokens: those of ``group``'s ``units`` that are gone, unless ``layer`` is removed."""

    group: str
    units: int
    layer: str


@dataclass(frozen=True)
class Tokens:
    """The number of tokens at one place: ``prefix`` and ``patches``, less what the ``merges`` before it merge.

    A block merges at most half of the patch tokens that it gets.
    """

    prefix: int
    patches: int
    merges: tuple[Merge, ...] = ()

    def left(self, size: Callable[[str], Size]) -> Size:
        """Return the number of patch tokens, given the size of each group."""
        left: Size = self.patches
        for merge in self.merges:
            merged = (merge.units - size(merge.group)) * size(merge.layer)
            half = left // 2
            arrays = isinstance(merged, np.ndarray) or isinstance(half, np.ndarray)
            left = left - (np.minimum(merged, half) if arrays else min(merged, half))
        return left

    def at(self, size: Callable[[str], Size]) -> Size:
        """Return the number of all tokens, given the size of each group."""
        return self.prefix + self.left(size)


Count: TypeAlias = int | Tokens


@dataclass(frozen=True)
class WeightProduct:
    """A linear layer or convolution whose weight is applied at ``positions`` places of one image."""

    module: str
    positions: Count
    parameter: str = "weight"


@dataclass(frozen=True)
class PartProduct:
    """Some rows of a linear layer, at ``positions`` places: the product of ``factors``, numbers or names of groups."""

    module: str
    positions: Count
    factors: tuple[int | str, ...]


@dataclass(frozen=True)
class AttentionProduct:
    """QKᵀ and its product with V: ``queries`` by ``keys`` tokens, ``heads`` heads of qk_dim and v_dim channels.

    ``heads``, ``qk`` and ``v`` are numbers, or the name of the group whose size is that number; ``layer`` is the group
    that says whether the layer is present, or 1.
    """

    module: str
    queries: Count
    keys: Count
    heads: str | int
    qk: str | int
    v: str | int
    layer: str | int = 1


@dataclass(frozen=True)
class MatchingProduct:
    """The similarities of even and odd patch ``tokens``, of ``channels`` each, in a block that merges some of them."""

    module: str
    tokens: Tokens
    merge: Merge
    channels: str | int


@dataclass(frozen=True)
class FixedProduct:
    """A part of the model that is never cut (such as a convolutional stem), with its MACs for one image."""

    module: str
    macs: int


Product: TypeAlias = WeightProduct | PartProduct | AttentionProduct | MatchingProduct | FixedProduct


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

    def of(number: str | Count) -> Size:
        if isinstance(number, Tokens):
            return number.at(size)
        return size(number) if isinstance(number, str) else number

    total: Size = 0
    for product in products:
        if isinstance(product, WeightProduct):
            total = total + of(product.positions) * numel(product.module, product.parameter)
        elif isinstance(product, PartProduct):
            total = total + math.prod(map(of, product.factors), start=of(product.positions))
        elif isinstance(product, AttentionProduct):
            channels = of(product.heads) * (of(product.qk) + of(product.v)) * of(product.layer)
            total = total + of(product.queries) * of(product.keys) * channels
        elif isinstance(product, MatchingProduct):
            merge, left = product.merge, product.tokens.left(size)
            present = (of(merge.group) < merge.units) * of(merge.layer)
            total = total + ((left + 1) // 2) * (left // 2) * of(product.channels) * present
        else:
            total += product.macs
    return total
