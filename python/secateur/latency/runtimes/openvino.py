"""OpenVINO on the processor: the module is exported to ONNX by torch's exporter and converted from there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import check
from ...families.attention import plain_attention
from ...runtime.openvino import compiled, in_int8
from ...runtime.quiet import quiet
from .base import INT8_TOLERANCE, refuse_other_places
from .registry import register

# As exports/openvino does, which prefers this way: OpenVINO fuses plain attention of ONNX best.
_OPSET = 20


@register
class OpenVino:
    """OpenVINO's processor plugin, on as many threads as torch has, computing in float32."""

    name = "openvino"

    @property
    def version(self) -> str:
        """The version of OpenVINO, without its build."""
        return str(check.packages("runtime", "openvino", "openvino").__version__).split("-")[0]

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, convert and compile it.

        Raises:
            InvalidArgument: onnx, onnxscript or openvino is not installed.
            Unsupported: the example is not on the processor, or neither float32 nor float16.
        """
        refuse_other_places(self.name, example)
        return self._prepared(module, example, lambda model: model)

    @staticmethod
    def _prepared(module: nn.Module, example: Tensor, changed: Callable[[Any], Any]) -> Callable[[Tensor], object]:
        engine = check.packages("runtime", "openvino", "onnx", "onnxscript", "openvino")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, quiet("onnxscript"):
            path = Path(folder) / "module.onnx"
            with plain_attention(module):
                program = torch.onnx.export(module, (example,), dynamo=True, opset_version=_OPSET, verbose=False)
            assert program is not None
            program.save(path)
            # OpenVINO maps the files while it converts.
            request = compiled(changed(engine.convert_model(path))).create_infer_request()

        def run(x: Tensor) -> object:
            return request.infer([x.numpy()], share_inputs=True)[0]

        return run


@register
class OpenVinoInt8(OpenVino):
    """The same with linear layers and convolutions in 8 bits, as the exporter's ``int8`` has them.

    Their ranges are those of the example: enough for the time.
    """

    name = "openvino-int8"
    tolerance = INT8_TOLERANCE

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, convert, quantize and compile it.

        Raises:
            InvalidArgument: onnx, onnxscript, openvino or nncf is not installed.
            Unsupported: the example is not on the processor, or not float32.
        """
        check.packages("runtime", "openvino", "nncf")
        refuse_other_places(self.name, example, (torch.float32,))
        return self._prepared(module, example, lambda model: in_int8(model, [example]))
