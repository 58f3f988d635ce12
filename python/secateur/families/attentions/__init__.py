"""The attention table: what every known attention module can lose, and what it is after a cut, by exact class."""

from .base import Attention, Call, Described, attention_entry, register
from .forward import Resized, Sized
from .parts import Parts
from .unknown import attention_refused

__all__ = [
    "Attention",
    "Call",
    "Described",
    "Parts",
    "Resized",
    "Sized",
    "attention_entry",
    "attention_refused",
    "register",
]
