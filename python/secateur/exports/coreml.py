"""Core ML's packages, converted from torch's program, and compared with the model where Core ML is: on macOS."""

from __future__ import annotations

import gc
import io
import platform
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from math import isclose, sqrt
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import check
from ..data.model_input import input_dtype
from ..errors import Error, InvalidArgument, Unsupported, first_line
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .locate import Run, located_difference

__all__ = ["CoreMl"]

_INPUT, _OUTPUT = "images", "output"
# What every .mlpackage holds.
_MANIFEST = "Manifest.json"
# ExecuTorch's, beside what Core ML reads.
_MAPPING = "executorch_debug_handle_mapping.json"


@dataclass(frozen=True)
class Options(Checked):
    """What is written, and how it is checked."""

    max_batch: int = field(
        default=64, metadata={"help": "largest batch that the file takes; 1 fixes the input's shape"}
    )
    precision: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "of weights and computation; the Neural Engine has float16 alone"}
    )


@register
class CoreMl(Exporter):
    """An .mlpackage for macOS 15, iOS 18 and later, compared with the model in Core ML where that is."""

    name = "coreml"
    suffix = ".mlpackage"
    folder = True
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the package.

        Args:
            model: in evaluation mode, on the CPU.
            path: the package, a folder.
            options: ``Options``.

        Raises:
            InvalidArgument: a number that does not fit, or a package of Python's that is missing.
            Unsupported: torch or coremltools does not convert the model; or it is not float32.
            Error: the written package does not describe the model's input, or Core ML computes something else.
        """
        with _silent():
            check.packages("format", "coreml", "coremltools")
        import coremltools

        _check(model, options)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            _write(model, written, options)
            details = _looked_at(written, options.max_batch)
            sizes, engine, difference = (), "not run here: Core ML needs macOS", None
            if sys.platform == "darwin":
                sizes, engine = options.batch_sizes, f"Core ML of macOS {platform.mac_ver()[0]}"
                difference = located_difference(
                    model,
                    _running(written),
                    sizes,
                    engine,
                    lambda watched, place: _converted(watched, place / path.name, options),
                    batch=_example(options),
                    dtype=getattr(torch, options.precision),
                )
            written.replace(path)  # an empty folder gives way
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        version = f"iOS 18 {options.precision}, coremltools {coremltools.__version__}"
        return ExportReport(self.name, (path,), size, version, engine, sizes, difference, details)


def _check(model: nn.Module, options: Any) -> None:
    most = check.integer("max_batch", options.max_batch)
    if max(options.batch_sizes) > most:
        raise InvalidArgument(
            f"batch_sizes: expected at most max_batch ({most}), got {', '.join(map(str, options.batch_sizes))}"
        )
    if (dtype := input_dtype(model)) != torch.float32:
        found = str(dtype).removeprefix("torch.")
        raise Unsupported(f"dtype: expected float32 for coreml (precision='float16' writes halves), got {found}")


@contextmanager
def _silent() -> Iterator[None]:
    """Also without its bars, which go to stderr."""
    with quiet("coremltools"), redirect_stderr(io.StringIO()):
        yield


def _write(model: nn.Module, path: Path, options: Any) -> None:
    """Convert the model and write the package.

    Raises:
        Unsupported: torch cannot export the model, or coremltools cannot convert it.
        Error: there is no package afterwards.
    """
    import coremltools as ct

    some = options.max_batch > 1
    example, batch = random_images(model, _example(options)), torch.export.Dim("batch", min=1)
    with _silent(), torch.no_grad():
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},) if some else None)
        except Exception as error:  # torch raises what it likes
            raise Unsupported(f"model: expected one that torch.export takes, got {first_line(error)}") from error
        _fold_scales(program)
        sizes = ct.RangeDim(1, options.max_batch, default=1) if some else 1
        try:
            converted = ct.convert(
                program.run_decompositions({}),
                convert_to="mlprogram",
                inputs=[ct.TensorType(name=_INPUT, shape=(sizes, *example.shape[1:]), dtype=np.float32)],
                outputs=None if _returns_several(program) else [ct.TensorType(name=_OUTPUT, dtype=np.float32)],
                # The first with an operator for attention.
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision(options.precision),
                skip_model_load=True,
            )
            converted.save(str(path))
            (path / _MAPPING).unlink(missing_ok=True)
        except Exception as error:  # coremltools raises what it likes
            # Frees the temporary folder, about which it would warn later.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            raise Unsupported(f"model: expected one that coremltools converts, got {first_line(error)}") from error
        # coremltools keeps a copy of the package until Python ends, and one of the weights until garbage is collected.
        shutil.rmtree(converted.package_path, ignore_errors=True)
        del converted, program
        gc.collect()
    if not (path / _MANIFEST).is_file():
        raise Error(f"export: expected coremltools to write {path.name}, got no package")


def _example(options: Any) -> int:
    """A batch of 1 would be taken for a constant, unless there is no other."""
    return 2 if options.max_batch > 1 else 1


def _returns_several(program: torch.export.ExportedProgram) -> bool:
    return len(program.graph_signature.user_outputs) > 1


def _fold_scales(program: torch.export.ExportedProgram) -> None:
    """Let attention have torch's own softmax scale, by scaled queries: Core ML's operator has no other."""
    graph, attention = program.graph_module.graph, torch.ops.aten.scaled_dot_product_attention.default
    for node in graph.find_nodes(op="call_function", target=attention):
        scale = node.kwargs.get("scale")
        if scale is None:
            continue
        queries = node.args[0]
        factor = scale * sqrt(queries.meta["val"].shape[-1])
        if not isclose(factor, 1, rel_tol=1e-12):
            with graph.inserting_before(node):
                scaled = graph.call_function(torch.ops.aten.mul.Tensor, (queries, factor))
            scaled.meta = dict(queries.meta)
            node.args = (scaled, *node.args[1:])
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "scale"}
    program.graph_module.recompile()


def _loaded(path: Path, **how: Any) -> Any:
    import coremltools

    with _silent():
        return coremltools.models.MLModel(str(path), **how)


def _looked_at(path: Path, most: int) -> dict[str, Any]:
    """Read the package again, and see what it holds.

    Raises:
        Error: it cannot be read, or takes other batches than it should.
    """
    try:
        spec = _loaded(path, skip_model_load=True).get_spec()
        (taken,) = spec.description.input
        (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    except Exception as error:  # coremltools raises what it likes
        raise Error(f"export: expected a package that coremltools reads, got {first_line(error)}") from error
    shape, ranges = taken.type.multiArrayType.shape, taken.type.multiArrayType.shapeRange.sizeRanges
    found = (ranges[0].lowerBound, ranges[0].upperBound) if ranges else (shape[0], shape[0])
    if taken.name != _INPUT or found != (1, most):
        raise Error(
            f"export: expected {_INPUT} in batches of 1 to {most}, got {taken.name} of {found[0]} to {found[1]}"
        )
    kinds = Counter(operation.type for operation in block.operations)
    return {
        "attention_fused": kinds["scaled_dot_product_attention"],
        "attention_not_fused": kinds["softmax"],
        "operators": kinds.total() - kinds["const"],
        "max_batch": most,
    }


def _converted(model: nn.Module, path: Path, options: Any) -> Run:
    _write(model, path, options)
    return _running(path)


def _running(path: Path) -> Run:
    import coremltools as ct

    try:
        # The GPU sums float32 in lower precision than the processor.
        model = _loaded(path, compute_units=ct.ComputeUnit.CPU_ONLY)
    except Exception as error:  # coremltools raises what it likes
        raise Error(f"export: expected a package that Core ML loads, got {first_line(error)}") from error
    names = [output.name for output in model.get_spec().description.output]

    def run(images: Tensor) -> list[Any]:
        found = model.predict({_INPUT: images.numpy()})
        return [found[name] for name in names]

    return run
