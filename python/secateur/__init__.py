"""Structured pruning of vision transformers that people can rely on."""
