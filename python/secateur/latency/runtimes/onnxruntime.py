"""onnxruntime on the processor: the module is exported by torch's exporter and run from the file."""

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
from .registry import register

# As exports/onnx writes by default: the first opset with GELU as one operation.
_OPSET = 20
# What onnxruntime has all operations for, on the processor.
_DTYPES = (torch.float32, torch.float16)


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
        return str(_installed("onnxruntime").__version__)

    def prepare(self, module: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """Export the module for the example's shape, and load what was exported.

        Raises:
            InvalidArgument: onnx, onnxscript or onnxruntime is not installed.
            Unsupported: the example is not on the processor, or neither float32 nor float16.
        """
        engine = [_installed(package) for package in ("onnx", "onnxscript", "onnxruntime")][-1]
        if example.device.type != "cpu":
            raise Unsupported(f"device: expected 'cpu' for onnxruntime, got {str(example.device)!r}")
        if example.dtype not in _DTYPES:
            found = str(example.dtype).removeprefix("torch.")
            raise Unsupported(f"dtype: expected float32 or float16 for onnxruntime, got {found!r}")
        options = engine.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = str(Path(folder) / "module.onnx")
            with _quiet():
                program = torch.onnx.export(module, (example,), dynamo=True, opset_version=_OPSET, verbose=False)
                assert program is not None
                program.save(path)
            session = engine.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        name = given.name

        def run(x: Tensor) -> object:
            return session.run(None, {name: x.numpy()})[0]

        return run


def _installed(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise InvalidArgument(
            f"runtime: expected {package} to be installed (pip install 'secateur[onnx]'), got none"
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
