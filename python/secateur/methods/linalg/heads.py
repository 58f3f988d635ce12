"""Which heads of a layer to remove when the projection after them is refitted by least squares; float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .regression import RANK_TOLERANCE, inverse, ridged_cholesky

__all__ = ["eliminate_heads", "head_errors"]


def eliminate_heads(weight: Tensor, covariance: Tensor, heads: int, ridge: float) -> Tensor:
    """Order heads by greedy removal, at each step the one that costs least: (heads,), first removed first.

    The optimal brain surgeon for groups (OB²C, arXiv:2608.17657): with P the inverse covariance of the remaining heads,
    removing head h costs tr(W_h (P_hh)⁻¹ W_hᵀ), and the others are refitted at once.

    Args:
        weight: of the projection, (outputs, heads · d), in the metric in which errors are measured.
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
    """Return the share of the output's variance lost when the last 0 … heads of ``order`` stay: (heads + 1,).

    Args:
        weight: as for `eliminate_heads`.
        covariance: as for `eliminate_heads`.
        order: (heads,), first removed first.
    """
    size = len(covariance) // len(order)
    channels = (order.flip(0)[:, None] * size + torch.arange(size)).flatten()
    ordered, target = covariance[channels][:, channels], (weight @ covariance)[:, channels].mT
    total = (weight[:, channels].mT * target).sum()
    level = float(ordered.diagonal().mean())
    if not bool(total > 0) or level <= 0:  # values that do not vary, except by rounding
        return weight.new_zeros(len(order) + 1)
    # One factorisation serves every number of heads: its leading block is the factor of the leading channels.
    factor, _ = ridged_cholesky(ordered, RANK_TOLERANCE * level)
    explained = torch.linalg.solve_triangular(factor, target, upper=False).square().sum(1)
    held = torch.cat([explained.new_zeros(1), explained.unflatten(0, (len(order), size)).sum(1).cumsum(0)])
    lost: Tensor = (1 - held / total).clamp(0, 1)
    # Nothing is lost if nothing is removed, whatever rounding says.
    lost[-1] = 0
    return lost
