"""onnxruntime on the processor: the module is exported by torch's exporter and run from the file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import check
from ...runtime.onnxruntime import in_int8, linear_layers
from ...runtime.quiet import quiet
from .base import INT8_TOLERANCE, refuse_other_places
from .registry import register

# As exports/onnx writes by default: the first opset with GELU as one operation.
_OPSET = 20


@register
class OnnxRuntime:
    """onnxruntime's processor provider, on as many threads as torch has.

    Threads do not spin while they wait for work: those of two models that are timed in turn would take the processor
    from each other.
    """

    name = "onnxruntime"

    @property
    def version(self) -> str:
        """The version of onnxruntime."""
        return str(check.packages("runtime", "onnx", "onnxruntime").__version__)

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, and load what was exported.

        Raises:
            InvalidArgument: onnx, onnxscript or onnxruntime is not installed.
            Unsupported: the example is not on the processor, or neither float32 nor float16.
        """
        refuse_other_places(self.name, example)
        return self._prepared(module, example, lambda path: path)

    @staticmethod
    def _prepared(module: nn.Module, example: Tensor, changed: Callable[[Path], Path]) -> Callable[[Tensor], object]:
        engine = check.packages("runtime", "onnx", "onnx", "onnxscript", "onnxruntime")
        options = engine.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "module.onnx"
            with quiet("onnxscript"):
                program = torch.onnx.export(module, (example,), dynamo=True, opset_version=_OPSET, verbose=False)
                assert program is not None
                program.save(path)
            session = engine.InferenceSession(str(changed(path)), options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        name = given.name

        def run(x: Tensor) -> object:
            return session.run(None, {name: x.numpy()})[0]

        return run


@register
class OnnxRuntimeInt8(OnnxRuntime):
    """The same with linear layers in 8 bits, as the exporter's ``int8`` has them: ranges are taken from every batch."""

    name = "onnxruntime-int8"
    tolerance = INT8_TOLERANCE

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, quantize it, and load what came of it.

        Raises:
            InvalidArgument: onnx, onnxscript or onnxruntime is not installed.
            Unsupported: the example is not on the processor, or not float32.
        """
        refuse_other_places(self.name, example, (torch.float32,))
        return self._prepared(module, example, _quantized)


def _quantized(path: Path) -> Path:
    if not linear_layers(path):
        return path
    copy = path.with_name("int8.onnx")
    in_int8(path, copy, "", None)
    return copy
