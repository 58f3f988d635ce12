"""Write a model to a file of another program's format, and check it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .. import check
from ..runtime.devices import borrowed, place_for
from .base import ExportReport, exporters

__all__ = ["export"]


def export(model: nn.Module, path: str | Path, *, format: str = "onnx", **options: Any) -> ExportReport:  # noqa: A002
    """Write a model, pruned or dense, for another engine; read it again there and compare the two before returning.

    The model's mode and device are afterwards what they were.

    Args:
        model: maps images (B, C, H, W) to a tensor.
        path: the file; it appears whole or not at all.
        format: "onnx", or "native" for secateur's own file, which ``save`` writes too; others may be registered.
        **options: the exporter's own. "onnx" takes ``opset`` (20), ``batch_sizes`` to compare on ((1, 2, 7)) and
            ``external_data`` (False: one file, of less than 2 GB); "native" takes ``batch_sizes`` and ``factory``.

    Raises:
        InvalidArgument: no such format, an option that does not fit, a folder that cannot be written, or a package
            that is missing (``pip install "secateur[onnx]"``).
        Unsupported: the format cannot hold the model.
        Error: the engine computes something else than the model.
    """
    exporter = exporters.named(format)
    chosen: Any = check.options(exporter.Options, options)
    file = check.writable("path", path)
    place_for(model)
    with borrowed(model, "cpu"):
        return exporter.export(model, file, chosen)
