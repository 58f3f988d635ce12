"""OpenVINO on the processor: the module is exported to ONNX by torch's exporter and converted from there."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidArgument, Unsupported
from ...families.attention import plain_attention
from .registry import register

# As exports/openvino does, which prefers this way: OpenVINO fuses plain attention of ONNX best.
_OPSET = 20
_DTYPES = (torch.float32, torch.float16)


@register
class OpenVino:
    """OpenVINO's processor plugin, on as many threads as torch has, computing in float32."""

    name = "openvino"

    @property
    def version(self) -> str:
        """The version of OpenVINO, without its build."""
        return str(_installed("openvino").__version__).split("-")[0]

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, convert and compile it.

        Raises:
            InvalidArgument: onnx, onnxscript or openvino is not installed.
            Unsupported: the example is not on the processor, or neither float32 nor float16.
        """
        engine = [_installed(package) for package in ("onnx", "onnxscript", "openvino")][-1]
        if example.device.type != "cpu":
            raise Unsupported(f"device: expected 'cpu' for openvino, got {str(example.device)!r}")
        if example.dtype not in _DTYPES:
            found = str(example.dtype).removeprefix("torch.")
            raise Unsupported(f"dtype: expected float32 or float16 for openvino, got {found!r}")
        # By default some processors compute in bfloat16, which is another model.
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        # OpenVINO maps the files while it converts.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, plain_attention(module), _quiet():
            path = Path(folder) / "module.onnx"
            program = torch.onnx.export(module, (example,), dynamo=True, opset_version=_OPSET, verbose=False)
            assert program is not None
            program.save(path)
            compiled = engine.Core().compile_model(engine.convert_model(path), "CPU", settings)
        request = compiled.create_infer_request()

        def run(x: Tensor) -> object:
            return request.infer([x.numpy()], share_inputs=True)[0]

        return run


def _installed(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise InvalidArgument(
            f"runtime: expected {package} to be installed (pip install 'secateur[openvino]'), got none"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter has to say about itself."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
