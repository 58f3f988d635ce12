"""Losses at every size from losses measured at a few."""

from __future__ import annotations

import numpy as np
import pytest
from secateur.budgets.measured import losses_between


def test_measured_losses_are_kept_and_nothing_is_lost_when_all_stay():
    measured = {3: 0.9, 7: 0.2, 11: 0.01}
    for errors in (None, np.linspace(1, 0, 14) ** 2):
        found = losses_between(measured, 13, errors)
        assert found.shape == (14,)
        assert [found[size] for size in measured] == pytest.approx(list(measured.values()))
        assert found[13] == 0
        assert (np.diff(found) <= 0).all()
        assert found[0] > found[3]


def test_in_between_the_logarithm_is_linear():
    found = losses_between({2: 1.0, 6: 0.0001}, 8)
    assert found[4] == pytest.approx(0.01)
    assert found[0] == pytest.approx(100.0)
    # One of the two that are missing at the largest measured size: a quarter of the loss.
    assert found[7] == pytest.approx(0.0001 / 4)


def test_errors_of_the_right_shape_need_no_correction():
    """Then two measurements tell all sizes."""
    errors = np.array([1, 0.7, 0.69, 0.3, 0.2, 0.02, 0.0])
    np.testing.assert_allclose(losses_between({1: 3 * 0.7, 4: 3 * 0.2}, 6, errors), 3 * errors)


def test_a_larger_size_never_costs_more():
    """Few images can make the larger size look worse."""
    found = losses_between({2: 0.1, 4: 0.3, 6: 0.001}, 8)
    assert (np.diff(found) <= 0).all()
    assert found[2] == pytest.approx(0.1)


def test_units_without_error_cost_nothing():
    errors = np.array([1.0, 0.5, 0.25, 0.0, 0.0])
    found = losses_between({1: 0.2}, 4, errors)
    assert found[3] == 0
    assert found[1] == pytest.approx(0.2)
    np.testing.assert_array_equal(losses_between({0: 0.4}, 1), [0.4, 0.0])


def test_a_divergence_below_rounding_counts_as_rounding():
    assert 0 < losses_between({1: -1e-15, 2: 0.0}, 3)[1] < 1e-8
