"""Engines that the extra `test` does not bring."""

from __future__ import annotations

import importlib.util

# A module that a folder of the engine's name does not have.
_MODULES = {"executorch": "executorch.version"}


def installed(engine: str) -> bool:
    """Whether an exporter's or a runtime's engine is there; those of the extra are."""
    name = _MODULES.get(engine)
    if name is None:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
