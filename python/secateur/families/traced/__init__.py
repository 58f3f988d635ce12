"""Models whose parts are found by running them without values, whatever their class."""

from .family import Traced

__all__ = ["Traced"]
