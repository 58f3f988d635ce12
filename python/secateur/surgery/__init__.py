"""Cuts a model. Knows sizes and structure, but not plans."""
