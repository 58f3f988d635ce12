"""LiteRT's .tflite files, by litert-torch, checked in LiteRT."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import check
from ..data.model_input import input_dtype
from ..errors import Error, Unsupported, first_line
from ..families.attention import plain_attention
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .locate import Run, located_difference

__all__ = ["LiteRt"]


@dataclass(frozen=True)
class Options(Checked):
    """What is written, and how it is checked."""

    batch_sizes: tuple[int, ...] = field(
        default=(1,), metadata={"help": "of the batches that the file takes, and no others; all share the weights"}
    )


@register
class LiteRt(Exporter):
    """One .tflite file for batches of the sizes asked for, compared with the model in LiteRT on the processor.

    Each size is a signature: the first is "serving_default", and others are called "batch_7" or the like.
    """

    name = "litert"
    suffix = ".tflite"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the file.

        Args:
            model: in evaluation mode, on the CPU.
            path: the file.
            options: ``Options``.

        Raises:
            InvalidArgument: a package that is missing.
            Unsupported: litert-torch does not convert the model; or it is not float32.
            Error: there is no file afterwards, or LiteRT computes something else; the text names the first module where
                it does.
        """
        with _silent():
            check.packages("format", "litert", "litert_torch", "ai_edge_litert")
        if (dtype := input_dtype(model)) != torch.float32:
            found = str(dtype).removeprefix("torch.")
            raise Unsupported(f"dtype: expected float32 for litert, got {found}")
        sizes = tuple(dict.fromkeys(options.batch_sizes))
        engine = f"LiteRT {version('ai-edge-litert')}"
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            _write(model, written, sizes)
            difference = located_difference(
                model,
                _running(written, sizes),
                sizes,
                engine,
                lambda watched, place: _converted(watched, place / path.name, sizes[:1]),
                batch=sizes[0],
            )
            operators = _operators(written)
            written.replace(path)
        details = {
            "signatures": ", ".join(_signature(sizes, size) for size in sizes),
            "attention_not_fused": operators["SOFTMAX"],
            "operators": operators.total(),
        }
        made = f"litert-torch {version('litert-torch')}"
        return ExportReport(self.name, (path,), path.stat().st_size, made, engine, sizes, difference, details)


@contextmanager
def _silent() -> Iterator[None]:
    """Also without what C++ code writes to stdout and stderr."""
    kept: list[tuple[int, int]] = []
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or of a notebook
            stream.flush()
    try:
        with suppress(OSError), open(os.devnull, "w") as nowhere:  # noqa: PTH123
            for number in (1, 2):
                kept.append((number, os.dup(number)))
                os.dup2(nowhere.fileno(), number)
        with quiet("torch", "jax", "litert_torch"):
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        for number, saved in kept:
            os.dup2(saved, number)
            os.close(saved)


def _signature(sizes: tuple[int, ...], size: int) -> str:
    return "serving_default" if size == sizes[0] else f"batch_{size}"


def _write(model: nn.Module, path: Path, sizes: tuple[int, ...]) -> None:
    """Convert the model and write the file.

    Raises:
        Unsupported: litert-torch cannot convert the model.
        Error: it wrote no file.
    """
    # LiteRT has no operator for attention: without padding, and with scaled queries, fewer operators remain.
    with _silent(), plain_attention(model), torch.no_grad():
        import litert_torch

        try:
            wanted: Any = litert_torch
            for size in sizes:
                wanted = wanted.signature(_signature(sizes, size), model, (random_images(model, size),))
            wanted.convert().export(str(path))
        except Exception as error:  # torch, jax and litert-torch raise what they like
            raise Unsupported(f"model: expected one that litert-torch converts, got {first_line(error)}") from error
    if not path.is_file():
        raise Error(f"export: expected litert-torch to write {path.name}, got no file")


def _converted(model: nn.Module, path: Path, sizes: tuple[int, ...]) -> Run:
    _write(model, path, sizes)
    return _running(path, sizes)


def _running(path: Path, sizes: tuple[int, ...]) -> Run:
    """Load the file.

    Raises:
        Error: LiteRT does not take it.
    """
    from ai_edge_litert.interpreter import Interpreter

    with _silent():
        try:
            interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
        except Exception as error:  # LiteRT raises what it likes
            raise Error(f"export: expected a file that LiteRT loads, got {first_line(error)}") from error

    def run(images: Tensor) -> list[Any]:
        with _silent():
            runner = interpreter.get_signature_runner(_signature(sizes, len(images)))
            (name,) = runner.get_input_details()
            found = runner(**{name: images.numpy()})
        # output_0, output_1 and so on, in any order
        return [found[key] for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]

    return run


def _operators(path: Path) -> Counter[str]:
    """Count the operators of the first signature."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    graph = model.Subgraphs(model.SignatureDefs(0).SubgraphIndex())
    codes = (model.OperatorCodes(graph.Operators(index).OpcodeIndex()) for index in range(graph.OperatorsLength()))
    return Counter(names[code.BuiltinCode()] for code in codes)
