"""What a model costs: multiply-accumulates (MACs) of its matrix products, exact for every cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


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
