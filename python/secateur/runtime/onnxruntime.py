"""ONNX files whose linear layers hold 8 bits, by onnxruntime's quantizer; exporter and runtime share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import Unsupported, first_line
from .quiet import quiet

__all__ = ["in_int8", "linear_layers"]


def in_int8(source: Path, path: Path, name: str, images: list[Tensor] | None, external_data: bool = False) -> int:
    """Write a copy of a file whose linear layers take and hold 8 bits, and return how many they are.

    Products of two activations, and the sums that layers are added to, stay float32: of the residual sums a ViT's class
    token does not survive 8 bits.

    Args:
        source: the file.
        path: the copy.
        name: the input's name.
        images: what the ranges of activations are taken from; None to take them anew from every batch.
        external_data: put the weights into a second file.

    Raises:
        Unsupported: there are no linear layers, or onnxruntime fails.
    """
    from onnxruntime import quantization

    linear = linear_layers(source)
    if not linear:
        raise Unsupported("int8: expected a model with linear layers, got none in its file")
    common: dict[str, Any] = {
        # Named operators alone: onnxruntime takes opset 23's Attention for one of its own.
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "per_channel": True,
        # Of signed ones, processors without VNNI saturate sums of two products.
        "weight_type": quantization.QuantType.QUInt8,
        "use_external_data_format": external_data,
    }
    with quiet("root"):
        try:
            if images is None:
                quantization.quantize_dynamic(source, path, **common)
            else:
                quantization.quantize_static(
                    source,
                    path,
                    _Images(name, images),
                    # MatMulConstBOnly, which the other keeps to, does not reach QuantizeLinear and DequantizeLinear.
                    nodes_to_quantize=linear,
                    activation_type=quantization.QuantType.QUInt8,
                    extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
                    **common,
                )
        except Exception as error:  # onnxruntime raises what it likes
            reason = first_line(error)
            raise Unsupported(f"model: expected one that onnxruntime quantizes, got {reason}") from error
    return _matrices(path)


def linear_layers(path: Path) -> list[str]:
    """Return the names of a file's products with constant weights."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {each.name for each in graph.initializer}
    return [each.name for each in graph.node if each.op_type in ("MatMul", "Gemm") and each.input[1] in constants]


def _matrices(path: Path) -> int:
    """Return how many matrices of 8 bits a file holds."""
    import onnx

    held = onnx.load(path, load_external_data=False).graph.initializer
    return sum(each.data_type == onnx.TensorProto.UINT8 and len(each.dims) == 2 for each in held)


class _Images:
    """What onnxruntime calls a CalibrationDataReader."""

    def __init__(self, name: str, images: list[Tensor]) -> None:
        self._name, self._images = name, images
        self._left: Iterator[Tensor] = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._left, None)
        return None if image is None else {self._name: image.numpy()}

    def rewind(self) -> None:
        self._left = iter(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._images[start_index:end_index])
