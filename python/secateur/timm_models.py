"""Offers timm the architectures of pruned models, so that timm.create_model builds what folders and hubs hold.

This module imports neither timm nor torch: the entry points are registered as soon as both packages are imported, in
whatever order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["DESCRIBING", "ENTRY_POINTS", "offer", "secateur_cnn", "secateur_swin", "secateur_vit"]

# timm's names of architectures, and whose models they build.
ENTRY_POINTS = {"secateur_vit": "vision_transformer", "secateur_swin": "swin", "secateur_cnn": "traced"}
# Their arguments; all others are those of timm.create_model and of the dense model.
DESCRIBING = (
    *("dense", "arguments", "handmade", "sizes", "layouts", "softmax_scales", "eps", "uncentred", "biases"),
    *("last_block", "changes", "precision"),
)
_TIMM = "timm.models"


def secateur_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    """Build a pruned VisionTransformer from ``dense``, a timm name, ``arguments``, and the ``sizes`` of its groups."""
    return _created("secateur_vit", pretrained, kwargs)


def secateur_swin(pretrained: bool = False, **kwargs: Any) -> Any:
    """Build a pruned SwinTransformer, as ``secateur_vit`` does."""
    return _created("secateur_swin", pretrained, kwargs)


def secateur_cnn(pretrained: bool = False, **kwargs: Any) -> Any:
    """Build a pruned convolutional network, as ``secateur_vit`` does."""
    return _created("secateur_cnn", pretrained, kwargs)


def offer() -> None:
    """Register the entry points: now where timm is imported, else when it will be."""
    if not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
    if _TIMM in sys.modules:
        _register(sys.modules[_TIMM])


def _created(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return import_module("secateur.exports.timm_entry").created(name, pretrained, kwargs)


def _register(timm_models: ModuleType) -> None:
    # A second registration would be warned of.
    for entry in (secateur_vit, secateur_swin, secateur_cnn):
        if not timm_models.is_model(entry.__name__):
            timm_models.register_model(entry)


class _AfterTimm:
    """A finder that finds nothing itself: it lets timm be imported as ever, and registers the entry points then."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TIMM:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = _then(loader.exec_module)
        return spec


def _then(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register(module)

    return execute_and_register
