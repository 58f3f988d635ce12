"""Checkpoints as they are: what training programs, timm and its hub write, read into timm's models. Nothing is run."""
