"""Cuts a model. Knows sizes and structure, and no plan."""
