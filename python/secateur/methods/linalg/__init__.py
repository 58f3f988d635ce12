"""Closed forms over second moments, in float64 on the CPU."""
