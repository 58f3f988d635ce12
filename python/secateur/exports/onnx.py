"""ONNX, by torch's exporter, checked in onnxruntime."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import check
from ..errors import Error, Unsupported, first_line
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, largest_difference, random_images, register

__all__ = ["Onnx", "write"]

_INPUT = "images"


@dataclass(frozen=True)
class Options(Checked):
    """What is written, and how it is checked."""

    opset: int = field(default=20, metadata={"help": "version of ONNX's operators"})
    external_data: bool = field(default=False, metadata={"help": "put the weights into a second file, NAME.data"})


@register
class Onnx(Exporter):
    """One .onnx file for batches of any size, compared with the model in onnxruntime."""

    name = "onnx"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the file.

        Args:
            model: in evaluation mode, on the CPU.
            path: the file.
            options: ``Options``.

        Raises:
            InvalidArgument: a number that does not fit, or a package that is missing.
            Unsupported: torch cannot export the model, or not in this opset.
            Error: onnxruntime computes something else.
        """
        check.packages("format", "onnx", "onnx", "onnxscript", "onnxruntime")
        opset = check.integer("opset", options.opset, 18)
        # Under its own name, in a folder beside it: a file with external data says what that is called.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            write(model, written, opset, options.external_data)
            found = _opset(written)
            if found != opset:
                raise Unsupported(f"opset: expected torch {torch.__version__} to write {opset}, got {found}")
            engine, run = _session(written)
            difference = largest_difference(model, run, options.batch_sizes, engine)
            # The weights first: a model without them is worse than weights without a model.
            parts = sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name)
            files = [part.replace(path.parent / part.name) for part in parts]
        files.reverse()
        size = sum(file.stat().st_size for file in files)
        return ExportReport(self.name, tuple(files), size, f"opset {opset}", engine, options.batch_sizes, difference)


def write(model: nn.Module, path: Path, opset: int, external_data: bool) -> None:
    """Write the model for batches of any size, by torch's exporter, and check nothing.

    Raises:
        Unsupported: torch cannot export it.
        Error: torch wrote no file.
    """
    # A batch of 1 would be taken for a constant.
    example = random_images(model, 2)
    # Where torch cannot write the opset, it logs a traceback and writes another.
    with quiet("onnxscript"), torch.no_grad():
        try:
            torch.onnx.export(
                model,
                (example,),
                str(path),
                input_names=[_INPUT],
                output_names=["output"],
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=external_data,
                verbose=False,
            )
        except Exception as error:  # torch, onnxscript and protobuf raise what they like
            reason = first_line(error)
            raise Unsupported(f"model: expected one that torch exports to ONNX, got {reason}") from error
    if not path.is_file():
        raise Error(f"export: expected torch to write {path.name}, got no file")


def _opset(path: Path) -> int:
    import onnx

    imported = onnx.load(path, load_external_data=False).opset_import
    return max((int(each.version) for each in imported if each.domain in ("", "ai.onnx")), default=0)


def _session(path: Path) -> tuple[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own
        reason = first_line(error)
        raise Unsupported(f"model: expected one that onnxruntime runs, got {reason}") from error

    def run(images: Tensor) -> Tensor:
        (output,) = session.run(None, {_INPUT: images.numpy()})
        return torch.from_numpy(output)

    return f"onnxruntime {onnxruntime.__version__}", run
