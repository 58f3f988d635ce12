"""Compares the outputs of an engine with the module's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["difference", "largest"]


def difference(found: Any, expected: Tensor) -> float:
    """Return the largest |found − expected|; infinite if shapes differ, or only one of two values is finite.

    Args:
        found: a tensor on any device, or anything that ``torch.as_tensor`` takes.
        expected: a tensor on any device.
    """
    found = torch.as_tensor(found).detach().to("cpu", torch.float64)
    expected = expected.detach().to("cpu", torch.float64)
    if found.shape != expected.shape:
        return float("inf")
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = (found - expected).abs().where(~same, 0.0)
    return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0


def largest(expected: Tensor) -> float:
    """Return the largest finite absolute value; 0 if there is none."""
    return float(expected.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if expected.numel() else 0.0
