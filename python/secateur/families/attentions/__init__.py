"""The attention table: what every known attention module can lose, and what it is after a cut, by exact class."""

from .base import Attention, Call, Described, attention_entry, register
from .parts import Parts

__all__ = ["Attention", "Call", "Described", "Parts", "attention_entry", "register"]
