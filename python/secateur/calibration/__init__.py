"""Calibration: the sums over images that every method needs, and what a method's own cuts really cost."""
