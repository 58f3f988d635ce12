"""The model families that secateur knows. All knowledge of timm's model code is here."""

from .base import Family
from .registry import inspect, register

__all__ = ["Family", "inspect", "register"]
