"""Ridge regression from second moments against the rows themselves, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import torch
from secateur.methods.linalg import regression
from secateur.methods.linalg.regression import RIDGES, Moment, cholesky, choose_ridge, inverse, solve, square_root


def rows(count, size, outputs, noise, seed, rank=None):
    """Correlated rows x, and y that depends on a few of them."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, rank or size)) @ generator.normal(size=(rank or size, size))
    y = x[:, :3] @ np.random.default_rng(99).normal(size=(3, outputs))
    return x, y + noise * generator.normal(size=y.shape)


def moment(x, y):
    return Moment(torch.from_numpy(x.T @ x / len(x)), torch.from_numpy(x.T @ y / len(x)))


def literal_ridge(x, y, ridge):
    """Least squares over rows to which √(N · ridge · mean diagonal) · I is added."""
    extra = np.sqrt(ridge * np.mean(np.sum(x * x, axis=0))) * np.eye(x.shape[1])
    target = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
    return np.linalg.lstsq(np.concatenate([x, extra]), target, rcond=None)[0]


@pytest.mark.parametrize(("count", "size", "noise"), [(23, 17, 3.0), (11, 19, 1.0), (301, 7, 0.1), (40, 33, 30.0)])
def test_the_ridge_is_the_one_that_predicts_the_other_fold(count, size, noise):
    folds = [rows(count, size, 5, noise, seed) for seed in (1, 2)]
    errors = []
    for ridge in RIDGES:
        each = []
        for (x, y), (x_other, y_other) in (folds, folds[::-1]):
            missed = y_other - x_other @ literal_ridge(x, y, ridge)
            cross = x_other.T @ y_other / len(x_other)
            # Without the part that no weights change, in shares of what there is to predict.
            each.append((np.sum(missed**2) - np.sum(y_other**2)) / len(x_other) / np.sum(cross**2))
        errors.append(sum(each))
    found = choose_ridge([moment(*fold) for fold in folds])
    assert errors[RIDGES.index(found)] <= min(errors) + 1e-5 * abs(min(errors))
    if noise >= 1:
        assert found > RIDGES[0]


@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0, 300.0])
def test_of_many_regressors_the_search_finds_the_best_ridge_of_all(noise):
    """From any ridge to begin with, the least of all errors; on the way, each slope is that of the error."""
    folds = [moment(*rows(400, 280, 5, noise, seed, rank=200)) for seed in (1, 2)]

    def error(ridge):
        return sum(regression._error(*pair, ridge)[0] for pair in (folds, folds[::-1]))

    errors = [error(ridge) for ridge in RIDGES]
    for near in (RIDGES[0], RIDGES[5], RIDGES[-1]):
        found = errors[RIDGES.index(choose_ridge(folds, near))]
        assert found <= min(errors) + 1e-5 * abs(min(errors))
    for ridge in RIDGES[4:]:
        slope = sum(regression._error(*pair, ridge)[1] for pair in (folds, folds[::-1]))
        step = (error(ridge * 1.001) - error(ridge / 1.001)) / (2 * np.log(1.001))
        assert slope == pytest.approx(step, rel=1e-3, abs=1e-7)


def test_a_ridge_lost_in_rounding_is_left_for_a_larger_one():
    """Moments of float32 sums: eigenvalues below zero that no small ridge makes up for."""
    folds = [moment(*rows(400, 280, 5, 1.0, seed, rank=200)) for seed in (1, 2)]
    rough = [Moment(f.xx - 1e-5 * f.xx.diagonal().mean() * torch.eye(280), f.xy) for f in folds]
    assert RIDGES[5] < choose_ridge(rough, RIDGES[0]) < RIDGES[-1]


def test_many_outputs_are_sampled():
    """With 400 outputs, of which the errors are estimated, the ridge costs at most 2 % more than the best."""
    folds = [rows(30, 21, 400, 5.0, seed) for seed in (1, 2)]
    found = choose_ridge([moment(*fold) for fold in folds])
    errors = [
        sum(np.sum((b[1] - b[0] @ literal_ridge(*a, ridge)) ** 2) for a, b in (folds, folds[::-1])) for ridge in RIDGES
    ]
    assert errors[RIDGES.index(found)] <= 1.02 * min(errors) < 0.9 * errors[0]


def test_without_two_folds_the_least_ridge():
    x, y = rows(9, 5, 2, 0.1, 0)
    assert choose_ridge([]) == RIDGES[0]
    assert choose_ridge([moment(x, y), moment(np.zeros_like(x), y)]) == RIDGES[0]


@pytest.mark.parametrize("size", [1, 7, 127, 128, 129, 300])
def test_cholesky_by_panels(size):
    """L Lᵀ is the matrix with the ridge; a matrix that is not positive, be it in its last row, has no factor."""
    x = np.random.default_rng(size).normal(size=(size + 5, size))
    matrix = torch.from_numpy(x.T @ x)
    room = torch.zeros_like(matrix)
    dented = matrix.clone()
    dented[-1, -1] = -1
    assert cholesky(dented, 0.25, room) is None
    assert cholesky(matrix, 0.25, room) is room
    # It reads one triangle alone.
    for factor in (room, cholesky(matrix.tril(), 0.25)):
        np.testing.assert_array_equal(factor.numpy(), np.tril(factor.numpy()))
        wanted = x.T @ x + 0.25 * np.eye(size)
        np.testing.assert_allclose((factor @ factor.mT).numpy(), wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())
    np.testing.assert_array_equal(matrix.numpy(), x.T @ x)


@pytest.mark.parametrize("ridge", [RIDGES[0], 1e-3, 1.0])
@pytest.mark.parametrize("size", [1, 7, 31])
def test_solve_is_least_squares(size, ridge):
    x, y = rows(50, size, 3, 0.2, 3) if size >= 3 else (np.arange(50.0)[:, None], np.ones((50, 3)))
    np.testing.assert_allclose(solve(moment(x, y), ridge).numpy(), literal_ridge(x, y, ridge), rtol=1e-6, atol=1e-8)


def test_dead_and_repeated_inputs():
    x, y = rows(40, 9, 2, 0.1, 5)
    x[:, 2] = 0
    x[:, 4] = x[:, 3]
    found = solve(moment(x, y), RIDGES[0]).numpy()
    assert np.isfinite(found).all()
    assert (found[2] == 0).all()
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.sum((y - x @ found) ** 2) <= 1.0001 * np.sum((y - x @ best) ** 2)


def test_inverse_of_singular_matrices_is_positive_definite():
    x, _ = rows(40, 13, 1, 0.0, 7, rank=6)
    gram = torch.from_numpy(x.T @ x)
    found = inverse(gram, 1e-30)
    assert bool((torch.linalg.eigvalsh(found) > 0).all())
    assert bool((found == found.mT).all())
    regular = gram + torch.eye(13, dtype=torch.float64)
    np.testing.assert_allclose(inverse(regular, 0.0).numpy(), np.linalg.inv(regular.numpy()), rtol=1e-9, atol=1e-12)
    assert bool((inverse(torch.zeros(3, 3, dtype=torch.float64), 1e-3) == torch.eye(3)).all())


@pytest.mark.parametrize("rank", [13, 6])
def test_square_root(rank):
    x, _ = rows(40, 13, 1, 0.0, 8, rank=rank)
    gram = torch.from_numpy(x.T @ x)
    root = square_root(gram)
    np.testing.assert_allclose((root.mT @ root).numpy(), gram.numpy(), rtol=0, atol=1e-9 * float(gram.max()))


@pytest.mark.parametrize("method", ["project", "refit"])
@pytest.mark.parametrize("kind", ["v", "ffn"])
def test_a_refitted_layer_of_a_trained_model_is_least_squares_over_the_rows(digits_model, digits_images, method, kind):
    """On the very inputs of calibration, no other weights and bias behind the same cut do better by more than 5 %.

    The ridge, chosen for images that are not seen, costs that much here.
    """
    model = digits_model.double()
    x = digits_images.double()
    layer = "blocks.1.mlp.fc2" if kind == "ffn" else "blocks.1.attn.proj"
    seen = {}
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _, args, output: seen.update(input=args[0].flatten(0, 1).numpy(), output=output.flatten(0, 1).numpy())
    )
    with torch.no_grad():
        stats = sc.calibrate(model, [x[:31], x[31:]])
        model(x)
        wanted = seen["output"]
        sc.prune(model, sc.plan(model, stats, method=method, ratios={f"blocks.1.{kind}": 0.6}))
        model(x)
    handle.remove()
    hidden, found = seen["input"], seen["output"]
    design = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
    best = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    lost, least = (np.sum((wanted - each) ** 2) for each in (found, best))
    assert 0 < least <= lost <= 1.05 * least
