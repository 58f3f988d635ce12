"""What a model costs: what every cost can tell, and multiply-accumulates (MACs), exact for every cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt


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

    def along(self, base: Mapping[str, int], names: Sequence[str], sizes: Sequence[int]) -> npt.NDArray[np.float64]:
        """The cost of the whole model at ``base`` but with all groups of ``names`` at each of ``sizes`` in turn."""


@dataclass(frozen=True)
class WeightProduct:
    """A linear layer or convolution: its weight is applied at ``positions`` places of one image."""

    module: str
    positions: int
    parameter: str = "weight"


@dataclass(frozen=True)
class AttentionProduct:
    """QKᵀ and its product with V: ``queries`` by ``keys`` tokens, ``heads`` heads of qk_dim and v_dim channels.

    ``qk`` and ``v`` are either the name of the group that holds the size per head or the size itself.
    """

    module: str
    queries: int
    keys: int
    heads: int
    qk: str | int
    v: str | int


@dataclass(frozen=True)
class FixedProduct:
    """A part of the model that is never cut (a convolutional stem), with its MACs for one image."""

    module: str
    macs: int


Product: TypeAlias = WeightProduct | AttentionProduct | FixedProduct


def macs(
    products: tuple[Product, ...],
    numel: Callable[[str, str], int],
    size: Callable[[str], int],
) -> int:
    """Count the MACs of one image.

    Args:
        products: what the model multiplies.
        numel: (module, parameter) to the number of weights.
        size: group name to its units (per head where the group is per head).
    """
    total = 0
    for product in products:
        if isinstance(product, WeightProduct):
            total += product.positions * numel(product.module, product.parameter)
        elif isinstance(product, AttentionProduct):
            qk = size(product.qk) if isinstance(product.qk, str) else product.qk
            v = size(product.v) if isinstance(product.v, str) else product.v
            total += product.queries * product.keys * product.heads * (qk + v)
        else:
            total += product.macs
    return total
