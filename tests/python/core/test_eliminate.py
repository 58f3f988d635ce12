"""Greedy backward elimination against the same in torch, and against least squares, on trained features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from secateur import core, errors


def by_downdates(inverse, weights, count):
    """The formula as it stands: C⁻¹ and the weights downdated whole after each removal."""
    inverse, weights = inverse.clone(), weights.clone()
    order, costs = [], []
    for _ in range(count):
        cost = weights.square().sum(1) / inverse.diagonal()
        cost[order] = torch.inf
        j = int(cost.argmin())
        order.append(j)
        costs.append(float(cost[j]))
        column = inverse[:, j] / inverse[j, j]
        weights -= torch.outer(column, weights[j])
        inverse -= torch.outer(column, inverse[j])
        inverse[j, j] = 1
    return np.array(order), np.array(costs)


def least_squares_error(covariance, weights, kept):
    """tr((W − Ŵ)ᵀ C (W − Ŵ)) with Ŵ solved on the kept inputs."""
    apart = weights.clone()
    apart[kept] -= torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ weights)
    return float((apart * (covariance @ apart)).sum())


@pytest.fixture(scope="module")
def ffn(make_digits_model, digits_images):
    """Covariance (372, 372) of a trained block's hidden units over 4,160 tokens, and the weights (372, 93) on them."""
    model = make_digits_model().double()
    seen = []
    layer = model.blocks[1].mlp.fc2
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(digits_images.double())
    rows = seen[0].flatten(0, 1).clone()
    return torch.cov(rows.T, correction=0), layer.weight.detach().T


@pytest.mark.parametrize("ridge", [1e-2, 1e-5, 1e-8])
def test_eliminate_on_trained_features(ffn, ridge):
    """Down to a ridge at which the covariance of fewer directions than inputs is singular but for it."""
    covariance, weights = ffn
    covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(372)
    inverse = torch.linalg.inv(covariance)
    order, costs = core.eliminate(inverse, weights, 280)
    assert (order.dtype, order.shape) == (np.int64, (280,))
    assert (costs.dtype, costs.shape) == (np.float64, (280,))
    expected_order, expected_costs = by_downdates(inverse, weights, 280)
    np.testing.assert_array_equal(order, expected_order)
    np.testing.assert_allclose(costs, expected_costs, rtol=1e-6)

    for removed in (1, 64, 65, 140, 280):
        kept = np.setdiff1d(np.arange(372), order[:removed])
        error = least_squares_error(covariance, weights, torch.from_numpy(kept))
        np.testing.assert_allclose(costs[:removed].sum(), error, rtol=1e-6)


def test_eliminate_beats_the_one_shot_choice(ffn):
    covariance, weights = ffn
    covariance = covariance + 1e-4 * covariance.diagonal().mean() * torch.eye(372)
    _, costs = core.eliminate(torch.linalg.inv(covariance), weights, 186)
    one_shot = (covariance.diagonal() * weights.square().sum(1)).argsort()
    assert costs.sum() < 0.9 * least_squares_error(covariance, weights, one_shot[186:].sort().values)


def test_eliminate_selects_query_key_neurons_by_their_score_gram():
    """With weights of 1 the costs add up to the error of the best rescaling of the kept rank-one maps."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(31, 40, dtype=torch.float64, generator=generator) + 0.5
    gram = maps @ maps.T + 1e-6 * torch.eye(31)
    order, costs = core.eliminate(torch.linalg.inv(gram), torch.ones(31, 1), 20)
    kept = torch.from_numpy(np.setdiff1d(np.arange(31), order))
    beta = torch.linalg.solve(gram[kept][:, kept], gram[kept].sum(1))
    np.testing.assert_allclose(costs.sum(), gram.sum() - beta @ gram[kept].sum(1), rtol=1e-9)


def test_eliminate_takes_any_array_and_writes_none():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 50, dtype=torch.float64, generator=generator)
    inverse = torch.linalg.inv(rows.T @ rows / 200 + 0.1 * torch.eye(50))
    weights = torch.nn.Linear(50, 7, dtype=torch.float64).weight
    expected = by_downdates(inverse, weights.detach().T, 50)
    array = inverse.numpy()
    for matrix in (array, array.copy(), array[::-1, ::-1].copy()[::-1, ::-1], array.repeat(2, 1)[:, ::2]):
        before, weights_before = matrix.copy(), weights.detach().clone()
        order, costs = core.eliminate(matrix, weights.T, count=50)
        np.testing.assert_array_equal(order, expected[0])
        np.testing.assert_allclose(costs, expected[1], rtol=1e-9)
        np.testing.assert_array_equal(matrix, before)
        assert torch.equal(weights, weights_before)
    order, costs = core.eliminate(inverse, weights.T, 0)
    assert (order.shape, costs.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([[1.0]], np.ones((1, 1)), 1), errors.InvalidArgument, "inverse: expected an array or tensor .*, got list"),
        ((np.eye(3), None, 1), errors.InvalidArgument, "weights: expected an array or tensor .*, got NoneType"),
        ((np.eye(3)[:2], np.ones((3, 1)), 1), errors.InvalidArgument, r"inverse: expected shape \(n, n\), n >= 1, got"),
        ((np.eye(3), np.ones(3), 1), errors.InvalidArgument, r"weights: expected shape \(3, outputs\), .*, got \(3,\)"),
        ((np.eye(3), np.ones((3, 1)), 4), errors.InvalidArgument, "count: expected 0 to 3, got 4"),
        ((np.tri(3), np.ones((3, 1)), 1), errors.InvalidArgument, "inverse: expected a symmetric matrix, got 0 at"),
        ((-np.eye(3), np.ones((3, 1)), 1), errors.InvalidArgument, "inverse: expected a diagonal above 0, got -1 at"),
        ((np.eye(3), np.full((3, 1), np.nan), 1), errors.NumericalError, "weights: expected finite values, got nan at"),
        (
            (np.ones((3, 3)), np.ones((3, 1)), 2),
            errors.NumericalError,
            "inverse: expected a matrix that stays positive definite, got a diagonal lost to rounding at input 1",
        ),
    ],
)
def test_eliminate_refuses(arguments, error, text):
    with pytest.raises(error, match=f"^{text}"):
        core.eliminate(*arguments)
