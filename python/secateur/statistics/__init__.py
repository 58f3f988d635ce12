"""Calibration statistics: sums over images that serve every method and budget."""

from .statistics import Statistics

__all__ = ["Statistics"]
