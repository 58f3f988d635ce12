"""OpenVINO on the processor: the module is exported to ONNX by torch's exporter and converted from there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import check
from ...families.attention import plain_attention
from ...runtime.quiet import quiet
from .base import refuse_other_places
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
        engine = check.packages("runtime", "openvino", "onnx", "onnxscript", "openvino")
        refuse_other_places("openvino", example)
        # By default some processors compute in bfloat16, which is another model.
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, quiet("onnxscript"):
            path = Path(folder) / "module.onnx"
            with plain_attention(module):
                program = torch.onnx.export(module, (example,), dynamo=True, opset_version=_OPSET, verbose=False)
            assert program is not None
            program.save(path)
            # OpenVINO maps the files while it converts.
            compiled = engine.Core().compile_model(engine.convert_model(path), "CPU", settings)
        request = compiled.create_infer_request()

        def run(x: Tensor) -> object:
            return request.infer([x.numpy()], share_inputs=True)[0]

        return run
