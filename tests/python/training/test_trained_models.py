"""The trained models of the other tests are trained, and by the code beside them."""

from __future__ import annotations

import digits
import pytest


@pytest.mark.parametrize("name", digits.MODELS)
def test_the_kept_weights_are_trained(name: str) -> None:
    assert digits.accuracy(digits.maker(name)()) >= 0.85


@pytest.mark.faults
@pytest.mark.parametrize("name", digits.MODELS)
def test_training_finds_such_weights_anew(name: str) -> None:
    """Others on another processor, as good on any."""
    assert digits.accuracy(digits.trained(name)) >= 0.85
