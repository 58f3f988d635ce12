"""ONNX, by torch's exporter, checked in onnxruntime."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import check
from ..errors import Error, InvalidArgument, Unsupported, first_line
from ..runtime.onnxruntime import in_int8
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .bits import Bits, calibration_images, cost, difference_of_integers
from .locate import Run, located_difference

__all__ = ["Onnx", "write"]

_INPUT = "images"
# By how much integer kernels may differ from the integers in float32: a last bit of an input can change its integer.
_SLACK = 0.5
# From here on, torch writes fused attention as one operator.
_OPSET_OF_ATTENTION = 23


@dataclass(frozen=True)
class Options(Checked):
    """What is written, and how it is checked."""

    opset: int = field(default=20, metadata={"help": "version of ONNX's operators"})
    external_data: bool = field(default=False, metadata={"help": "put the weights into a second file, NAME.data"})
    int8: bool = field(default=False, metadata={"help": "linear layers in 8 bits"})
    static: bool = field(
        default=False,
        metadata={"help": "ranges of int8 from the loader's images; without it each batch is measured as it comes"},
    )
    loader: object = field(
        default=None, metadata={"help": "batches of images: for static, and to measure what int8 costs"}
    )
    max_images: int = field(default=300, metadata={"help": "of the loader's images that are read"})


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
            InvalidArgument: a number that does not fit, options that contradict each other, or a package that is
                missing.
            Unsupported: torch cannot export the model, or not in this opset.
            Error: onnxruntime computes something else; the text names the first module where it does.
        """
        check.packages("format", "onnx", "onnx", "onnxscript", "onnxruntime")
        opset, sizes = check.integer("opset", options.opset, 18), options.batch_sizes
        if options.static and not options.int8:
            raise InvalidArgument("static: expected False without int8, got True")
        bits: Bits | None = "int8" if options.int8 else None
        calibrated = "int8" if options.static else None
        images = calibration_images(model, options, bits, among="int8", calibrated=calibrated)
        # Under its own name, in a folder beside it: a file with external data says what that is called.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            # What is still to be quantized may be too large for one file.
            write(model, written, opset, options.external_data or bits is not None)
            found = _opset(written)
            if found != opset:
                raise Unsupported(f"opset: expected torch {torch.__version__} to write {opset}, got {found}")
            engine, run = _session(written)
            difference = located_difference(
                model, run, sizes, engine, lambda watched, place: _converted(watched, place / path.name, opset)
            )
            details: dict[str, Any] = {}
            if bits is not None:
                source, written = written, Path(folder) / bits / path.name
                written.parent.mkdir()
                ranges = images if options.static else None
                layers = in_int8(source, written, _INPUT, ranges, options.external_data)
                engine, run = _session(written)
                # Without optimisation, each operator runs as the file has it. What 8 bits cost is a check of its own.
                exact = _session(written, optimized=False)[1]
                difference = difference_of_integers(exact, run, model, sizes, engine, _SLACK)
                details = cost(model, run, images, bits) | {"linear_layers": layers}
            # The weights first: a model without them is worse than weights without a model.
            parts = sorted(
                (part for part in written.parent.iterdir() if part.is_file()), key=lambda part: part.name == path.name
            )
            files = [part.replace(path.parent / part.name) for part in parts]
        files.reverse()
        if opset >= _OPSET_OF_ATTENTION and (count := _operators(files[0]).count("Attention")):
            warnings.warn(
                f"opset: expected less than {_OPSET_OF_ATTENTION} for onnxruntime's quantizer and optimizer, TVM, IREE "
                f"and MNN, which do not know the operator Attention, got {opset} with {count} of them",
                stacklevel=3,
            )
        size = sum(file.stat().st_size for file in files)
        return ExportReport(self.name, tuple(files), size, f"opset {opset}", engine, sizes, difference, details)


def write(model: nn.Module, path: Path, opset: int, external_data: bool) -> None:
    """Write the model for batches of any size, by torch's exporter, and check nothing.

    Raises:
        Unsupported: torch cannot export it, or not its masks in this opset.
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
    _refuse_masks(path, opset)


def _refuse_masks(path: Path, opset: int) -> None:
    """Refuse masks of yes and no that are computed.

    torch attends to nothing where a row masks everything, and so does ``Attention``. What torch writes in earlier
    opsets attends to everything. A comparison on random images shows that only where the mask is a constant.
    """
    graph = _read(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        scores = made_by.get(node.input[0]) if node.op_type == "IsNaN" else None
        total = made_by.get(scores.input[0]) if scores is not None and scores.op_type == "Softmax" else None
        if total is not None and total.op_type == "Add" and total.input[1] in made_by:
            raise Unsupported(
                f"opset: expected at least {_OPSET_OF_ATTENTION} for attention with a boolean mask that is computed, "
                f"got {opset}, where a row that masks everything would attend to everything"
            )


def _read(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False)


def _operators(path: Path) -> list[str]:
    return [node.op_type for node in _read(path).graph.node]


def _opset(path: Path) -> int:
    imported = _read(path).opset_import
    return max((int(each.version) for each in imported if each.domain in ("", "ai.onnx")), default=0)


def _converted(model: nn.Module, path: Path, opset: int) -> Run:
    write(model, path, opset, external_data=True)
    return _session(path)[1]


def _session(path: Path, optimized: bool = True) -> tuple[str, Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own
        reason = first_line(error)
        raise Unsupported(f"model: expected one that onnxruntime runs, got {reason}") from error

    def run(images: Tensor) -> Any:
        outputs = [torch.from_numpy(output) for output in session.run(None, {_INPUT: images.numpy()})]
        return outputs[0] if len(outputs) == 1 else outputs

    return f"onnxruntime {onnxruntime.__version__}", run
