"""What is seen of each layer in calibration, and how it adds up: one module a collector."""

from .base import Accumulator, Collector, Position, State, collectors, register

__all__ = ["Accumulator", "Collector", "Position", "State", "collectors", "register"]
