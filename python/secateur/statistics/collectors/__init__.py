"""Collectors: what calibration observes of each layer and how it is summed, one module each."""

from .base import Accumulator, Collector, Position, State, collectors, register

__all__ = ["Accumulator", "Collector", "Position", "State", "collectors", "register"]
