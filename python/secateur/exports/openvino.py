"""OpenVINO's files, converted from ONNX or from torch's program, whichever the engine fuses more of."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import check
from ..data.model_input import input_dtype
from ..errors import InvalidArgument, Unsupported
from ..families.attention import plain_attention
from ..runtime.openvino import compiled, in_int8
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .bits import Bits, calibration_images, cost, difference_of_integers
from .locate import Run, located_difference
from .onnx import write
from .openvino_int4 import decompressed, in_int4, refuse_groups

__all__ = ["OpenVino"]

_INPUT, _OUTPUT = "images", "output"
_OPSET = 20
_DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Options(Checked):
    """What is written, and how it is checked."""

    source: Literal["auto", "onnx", "torch"] = field(
        default="auto", metadata={"help": "what is converted; auto tries both and takes what is fused more"}
    )
    int8: bool = field(default=False, metadata={"help": "linear layers in 8 bits, calibrated on the loader's images"})
    int4: bool = field(default=False, metadata={"help": "weights of linear layers in 4 bits"})
    group_size: int = field(default=32, metadata={"help": "inputs that share a scale in int4; 0 is all of a row"})
    loader: object = field(default=None, metadata={"help": "batches of images: for int8, and to measure what it costs"})
    max_images: int = field(default=300, metadata={"help": "of the loader's images that are read"})


@dataclass(frozen=True)
class _Converted:
    """A model of OpenVINO's, and what the engine makes of it."""

    source: str
    model: Any
    fused: int  # attentions that are one operator with their products
    unfused: int
    operators: int

    @property
    def counts(self) -> dict[str, int]:
        return {"attention_fused": self.fused, "attention_not_fused": self.unfused, "operators": self.operators}


@register
class OpenVino(Exporter):
    """An .xml and a .bin file for batches of any size, compared with the model in OpenVINO on the processor."""

    name = "openvino"
    suffix = ".xml"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write both files.

        Args:
            model: in evaluation mode, on the CPU.
            path: the .xml file; the .bin file is beside it.
            options: ``Options``.

        Raises:
            InvalidArgument: a number that does not fit, or a package that is missing.
            Unsupported: OpenVINO converts the model neither from ONNX nor from torch's program, or not in its type.
            Error: OpenVINO computes something else; the text names the first module where it does.
        """
        openvino = check.packages("format", "openvino", "onnx", "onnxscript", "openvino")
        sizes = options.batch_sizes
        if (dtype := input_dtype(model)) not in _DTYPES:
            found = str(dtype).removeprefix("torch.")
            raise Unsupported(f"dtype: expected float32 or float16 for openvino, got {found}")
        bits = _bits(options)
        calibrated = "int8" if options.int8 else None
        images = calibration_images(model, options, bits, among="int8 or int4", calibrated=calibrated)
        if options.int4:
            refuse_groups(model, options.group_size)
        engine = f"OpenVINO {openvino.__version__.split('-')[0]}"
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            chosen = _best(model, Path(folder), options.source)
            _save(chosen.model, written)
            convert = _WAYS[chosen.source]
            difference = located_difference(
                model, _load(written), sizes, engine, lambda *given: _running(compiled(convert(*given)))
            )
            details: dict[str, Any] = {"converted_from": chosen.source} | chosen.counts
            if bits is not None:
                smaller = in_int8(chosen.model, images) if options.int8 else in_int4(chosen.model, options.group_size)
                # Beside the other, whose weights are mapped.
                written = Path(folder) / "bits" / path.name
                written.parent.mkdir()
                _save(smaller, written)
                exact = _running(compiled(smaller if options.int8 else decompressed(smaller)))
                difference = difference_of_integers(exact, _load(written), model, sizes, engine)
                details |= _looked_at(chosen.source, smaller).counts | cost(model, _load(written), images, bits)
                details |= {"group_size": options.group_size} if options.int4 else {}
            version = _version(written)
            # The weights first: a model without them is worse than weights without a model.
            parts = (written.with_suffix(".bin"), written)
            files = tuple(part.replace(path.parent / part.name) for part in parts)[::-1]
        size = sum(file.stat().st_size for file in files)
        return ExportReport(self.name, files, size, version, engine, sizes, difference, details)


def _bits(options: Options) -> Bits | None:
    if options.int8 and options.int4:
        raise InvalidArgument("int8, int4: expected one of them, got both")
    if not (options.int8 or options.int4):
        return None
    check.packages("format", "openvino", "nncf")
    return "int8" if options.int8 else "int4"


def _best(model: nn.Module, folder: Path, source: str) -> _Converted:
    """Convert by every way that is asked for, and return what has most attention fused, then fewest operators."""
    found, reasons = [], []
    for way in _WAYS if source == "auto" else (source,):
        try:
            found.append(_looked_at(way, _WAYS[way](model, folder)))
        except Exception as error:  # OpenVINO and torch raise what they like
            reasons.append(f"{way}: {_reason(error)}")
    if not found:
        raise Unsupported(f"model: expected one that OpenVINO converts, got {'; '.join(reasons)}")
    return min(found, key=lambda each: (each.unfused, each.operators))


def _from_onnx(model: nn.Module, folder: Path) -> Any:
    import openvino

    path = folder / "onnx" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    # OpenVINO fuses the two products and the softmax, also of queries and values of other sizes: no padding remains.
    with plain_attention(model):
        write(model, path, _OPSET, external_data=True)
    with quiet():
        return openvino.convert_model(path)


def _from_torch(model: nn.Module, folder: Path) -> Any:
    import openvino

    del folder
    # A batch of 1 would be taken for a constant. Of plain attention in torch's program, OpenVINO fuses nothing.
    example, batch = random_images(model, 2), torch.export.Dim("batch", min=1)
    with quiet(), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        # OpenVINO would take height and width to be of any size.
        return openvino.convert_model(program, input=[-1, *example.shape[1:]])


_WAYS: dict[str, Callable[[nn.Module, Path], Any]] = {"onnx": _from_onnx, "torch": _from_torch}


def _looked_at(source: str, model: Any) -> _Converted:
    """Compile, and see what became of attention."""
    fused = unfused = operators = 0
    for each in compiled(model).get_runtime_model().get_ops():
        told = {key: str(each.get_rt_info()[key].astype(str)) for key in ("layerType", "originalLayersNames")}
        kind, names = told["layerType"], told["originalLayersNames"].lower()
        products = "matmul" in names or "scaled_dot_product_attention" in names
        fused += kind == "ScaledDotProductAttention" or (kind != "Softmax" and "softmax" in names and products)
        unfused += kind == "Softmax"
        operators += kind not in ("Const", "Input", "Output")
    return _Converted(source, model, fused, unfused, operators)


def _running(engine: Any) -> Run:
    def run(images: Tensor) -> Any:
        outputs = list(engine(images.numpy(), share_outputs=False).values())
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _save(model: Any, path: Path) -> None:
    import openvino

    for ports, name in ((model.inputs, _INPUT), (model.outputs, _OUTPUT)):
        for port in ports:
            port.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=False)  # True is OpenVINO's default


def _load(path: Path) -> Run:
    import openvino

    try:
        return _running(compiled(openvino.Core().read_model(path)))
    except Exception as error:  # OpenVINO has exceptions of its own
        raise Unsupported(f"model: expected one that OpenVINO runs, got {_reason(error)}") from error


def _version(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        found = re.search(r'<net [^>]*version="(\d+)"', file.read(4096))
    return f"IR {found[1] if found else 'unknown'}"


def _reason(error: Exception) -> str:
    """The line of OpenVINO's many that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check ", "["))]
    return (told or lines or [type(error).__name__])[0]
