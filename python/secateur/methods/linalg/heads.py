"""Which heads of a layer can go, when the projection behind them is refitted by least squares; float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .regression import RANK_TOLERANCE, inverse, ridged_cholesky

__all__ = ["eliminate_heads", "head_errors"]


def eliminate_heads(weight: Tensor, covariance: Tensor, heads: int, ridge: float) -> Tensor:
    """The order in which heads leave, at each step the one that costs least: (heads,), the first to leave first.

    The optimal brain surgeon for groups (OB²C, arXiv:2608.17657): with P the inverse covariance of what is left,
    removing head h costs tr(W_h (P_hh)⁻¹ W_hᵀ), and the others are refitted at once.

    Args:
        weight: the projection's, (outputs, heads · d), in the metric that errors are measured in.
        covariance: of its input, (heads · d, heads · d).
        heads: number of heads.
        ridge: share of the mean diagonal that is added to the covariance.
    """
    precision, left = inverse(covariance, ridge), weight.clone()
    parts = list(torch.arange(weight.shape[1]).chunk(heads))
    remaining, order = list(range(heads)), []
    while remaining:
        solved = {
            head: torch.linalg.solve(precision[parts[head]][:, parts[head]], left[:, parts[head]].mT)
            for head in remaining
        }
        head = min(remaining, key=lambda each: float((left[:, parts[each]].mT * solved[each]).sum()))
        order.append(head)
        remaining.remove(head)
        if remaining:
            part, others = parts[head], torch.cat([parts[each] for each in remaining])
            across = precision[others][:, part]
            left[:, others] -= (across @ solved[head]).mT
            own = precision[part][:, part]
            precision[others[:, None], others] -= across @ torch.linalg.solve(own, across.mT)
    return torch.tensor(order)


def head_errors(weight: Tensor, covariance: Tensor, order: Tensor) -> Tensor:
    """Share of the output's variance that is lost when the last 0 … heads of ``order`` stay: (heads + 1,).

    Args:
        weight: as for `eliminate_heads`.
        covariance: as for `eliminate_heads`.
        order: (heads,), the first to leave first.
    """
    size = len(covariance) // len(order)
    channels = (order.flip(0)[:, None] * size + torch.arange(size)).flatten()
    ordered, target = covariance[channels][:, channels], (weight @ covariance)[:, channels].mT
    total = (weight[:, channels].mT * target).sum()
    level = float(ordered.diagonal().mean())
    if not bool(total > 0) or level <= 0:  # values that do not vary, but for rounding
        return weight.new_zeros(len(order) + 1)
    # One factorisation serves every number of heads: its leading part is that of the leading channels.
    factor, _ = ridged_cholesky(ordered, RANK_TOLERANCE * level)
    explained = torch.linalg.solve_triangular(factor, target, upper=False).square().sum(1)
    held = torch.cat([explained.new_zeros(1), explained.unflatten(0, (len(order), size)).sum(1).cumsum(0)])
    lost: Tensor = (1 - held / total).clamp(0, 1)
    # Nothing is lost where nothing leaves, whatever rounding says.
    lost[-1] = 0
    return lost
