"""Greedy backward elimination next to the same loop in torch.

make bench, or pytest --benchmark-enable benchmarks/python/bench_eliminate.py
"""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import torch

INPUTS, OUTPUTS, REMOVED = 1536, 384, 768


def problem():
    """An FFN of DeiT-Small: a covariance with a decaying spectrum over a diagonal, and as correlated weights."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(INPUTS, 512, generator=generator, dtype=torch.float64)
    spectrum = torch.arange(1, 513, dtype=torch.float64).pow(-0.75)
    scale = torch.randn(INPUTS, generator=generator, dtype=torch.float64).mul_(0.5).exp_()
    covariance = (mixing * spectrum) @ mixing.T
    covariance += torch.diag(0.05 + torch.rand(INPUTS, generator=generator, dtype=torch.float64))
    covariance *= scale[:, None] * scale
    covariance += 1e-4 * covariance.diagonal().mean() * torch.eye(INPUTS)
    weights = torch.randn(INPUTS, OUTPUTS, generator=generator, dtype=torch.float64) / scale[:, None]
    return torch.linalg.inv(covariance), weights


def by_outer_products(inverse, weights, column, j):
    """Downdates as the formulas say them."""
    weights -= torch.outer(column, weights[j])
    inverse -= torch.outer(column, inverse[j])


def in_place(inverse, weights, column, j):
    """The same by BLAS's rank-one update, which needs no matrix besides."""
    weights.addr_(column, weights[j].clone(), alpha=-1)
    inverse.addr_(column, inverse[j].clone(), alpha=-1)


def in_torch(inverse, weights, count, downdate):
    """The loop: always the input that costs least, then ``downdate``."""
    inverse, weights = inverse.clone(), weights.clone()
    alive = torch.ones(len(inverse), dtype=torch.bool)
    order, costs = [], []
    for _ in range(count):
        cost = weights.square().sum(1) / inverse.diagonal()
        j = int(torch.where(alive, cost, torch.inf).argmin())
        order.append(j)
        costs.append(float(cost[j]))
        alive[j] = False
        downdate(inverse, weights, inverse[:, j] / inverse[j, j], j)
        inverse[j, j] = 1
    return order, costs


@pytest.mark.parametrize(
    ("name", "downdate", "runs"),
    [("outer products", by_outer_products, 3), ("addr_ in place", in_place, 15)],
)
def test_eliminate_against_torch(paired, name, downdate, runs):
    inverse, weights = problem()
    order, costs = sc.core.eliminate(inverse, weights, REMOVED)
    expected, expected_costs = in_torch(inverse, weights, REMOVED, downdate)
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_allclose(costs, expected_costs, rtol=1e-9)
    paired(
        f"eliminate {REMOVED} of {INPUTS}, {OUTPUTS} outputs ÷ the loop in torch, {name}",
        lambda: sc.core.eliminate(inverse, weights, REMOVED),
        lambda: in_torch(inverse, weights, REMOVED, downdate),
        runs=runs,
    )
