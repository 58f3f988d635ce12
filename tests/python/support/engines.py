"""Engines that the extra `test` does not bring."""

from __future__ import annotations

import importlib.util

# Modules that a folder of the engine's name does not have.
_MODULES = {
    "coreml": ("coremltools",),
    "executorch": ("executorch.version",),
    "litert": ("litert_torch", "ai_edge_litert"),
    "ncnn": ("pnnx", "ncnn"),
    "openvino": ("openvino", "nncf"),
    "transformers": ("transformers",),
}


def installed(engine: str) -> bool:
    """Whether an exporter's or a runtime's engine is there; those of the extra are."""
    try:
        return all(
            importlib.util.find_spec(name) is not None for name in _MODULES.get(engine.removesuffix("-int8"), ())
        )
    except ImportError:
        return False
