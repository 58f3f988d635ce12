"""Exports a model to a file in another program's format, and checks the file there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .. import check
from ..runtime.devices import borrowed, place_for
from .base import ExportReport, exporters, path_for

__all__ = ["export"]


def export(model: nn.Module, path: str | Path, *, format: str = "onnx", **options: Any) -> ExportReport:  # noqa: A002
    """Write a model, pruned or dense, for another engine; load it there and compare the two before returning.

    The model's mode and device are restored afterwards.

    Args:
        model: the model; it maps images (B, C, H, W) to a tensor.
        path: the file, or a new or empty folder for "timm", "transformers", "hub" and "coreml"; it is written
            completely or not at all. Some formats want an ending: .xml, .pt2, .pte, .param, .tflite or .mlpackage.
        format: "onnx", "openvino", "executorch", "ncnn", "coreml", "litert", "torch" for the program of
            ``torch.export``, "timm" or "transformers" for folders that these build the model from without secateur,
            "hub" for a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads where secateur is
            imported, or "native" for secateur's own file, as written by ``save``; others can be registered.
        **options: options of the exporter. All take ``batch_sizes`` for the comparison. "onnx" also takes ``opset``
            (20), ``external_data`` (False: one file, of less than 2 GB) and ``int8`` (linear layers alone), with
            ``static``, ``loader`` and ``max_images``; "openvino" ``source``, ``int8``, ``int4``, ``group_size``,
            ``loader`` and ``max_images``; "executorch" ``max_batch`` (8), ``int8``, ``loader`` and ``max_images``;
            "coreml" ``max_batch`` (64) and ``precision`` ("float32"); "torch" ``compiled`` (False; True has AOTInductor
            compile it for processors like this one); "timm", "hub" and "native" ``factory``.

    Raises:
        InvalidArgument: no such format, an option that does not fit, a folder that cannot be written, or a package
            that is missing; the text names the command that installs it.
        Unsupported: the format cannot hold the model.
        Error: the engine does not compute the same as the model.
    """
    exporter = exporters.named(format)
    chosen: Any = check.options(exporter.Options, options)
    file = path_for(exporter, "path", path)
    place_for(model)
    with borrowed(model, "cpu"):
        return exporter.export(model, file, chosen)
