"""OpenVINO as the exporter and the runtimes share it: how models are compiled, and their linear layers of 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quiet import quiet

__all__ = ["WEIGHTED", "compiled", "in_int8"]

# Operators whose second input is their weights.
WEIGHTED = ("MatMul", "Convolution", "GroupConvolution")


def compiled(model: Any) -> Any:
    """Compile for the processor, in float32 and with torch's number of threads."""
    import openvino

    # By default some processors compute in bfloat16, and quantize what linear layers of few bits take.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def in_int8(model: Any, images: list[Tensor]) -> Any:
    """Return a copy whose linear layers and convolutions take and hold 8 bits, with ranges seen on the images.

    A model without such layers is returned as it is.
    """
    import nncf

    if not any(_has_weights(each) for each in model.get_ops()):
        return model
    # Of the residual sums a ViT's class token does not survive 8 bits: only what has weights is quantized.
    float_ = [
        each.get_friendly_name()
        for each in model.get_ops()
        if each.get_type_name() not in ("Constant", "Parameter", "Result") and not _has_weights(each)
    ]
    with quiet("nncf"):
        return nncf.quantize(
            model.clone(),
            nncf.Dataset([image.numpy() for image in images]),
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=float_),
        )


def _has_weights(operator: Any) -> bool:
    kind = operator.get_type_name()
    return kind in WEIGHTED and operator.input_value(1).get_node().get_type_name() == "Constant"
