"""The command line: each command is the function of its name, from files to files."""

from .app import main

__all__ = ["main"]
