"""ExecuTorch's programs, whose operators XNNPACK runs where it can."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import check
from ..data.model_input import input_dtype
from ..errors import Error, InvalidArgument, Unsupported, first_line
from ..families.attention import plain_attention
from ..runtime.executorch import Engine, engine, in_int8, instructions, lowered
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .bits import Bits, calibration_images, cost, difference_of_integers
from .locate import Run, located_difference

__all__ = ["ExecuTorch"]

_DTYPES = (torch.float32, torch.float16)
# Where XNNPACK rounds to the other of two neighbouring integers, what follows differs by their distance.
_SLACK = 0.1


@dataclass(frozen=True)
class Options(Checked):
    """What is written, and how it is checked."""

    batch_sizes: tuple[int, ...] = field(
        default=(), metadata={"help": "of the batches that both are compared on; by default 1, 2, 7 and the largest"}
    )
    max_batch: int = field(default=8, metadata={"help": "the largest batch; 1 makes a faster file, for single images"})
    int8: bool = field(default=False, metadata={"help": "linear layers in 8 bits, calibrated on the loader's images"})
    loader: object = field(default=None, metadata={"help": "batches of images for int8"})
    max_images: int = field(default=300, metadata={"help": "of the loader's images that are read"})

    def __post_init__(self) -> None:
        largest = check.integer("max_batch", self.max_batch)
        if not self.batch_sizes:
            usual = tuple(sorted({each for each in (1, 2, 7, largest) if each <= largest}))
            object.__setattr__(self, "batch_sizes", usual)
        super().__post_init__()
        if max(self.batch_sizes) > largest:
            raise InvalidArgument(
                f"batch_sizes: expected batches of at most {largest} (max_batch), got {max(self.batch_sizes)}"
            )


@register
class ExecuTorch(Exporter):
    """A .pte file for batches of 1 to ``max_batch``, compared with the model in ExecuTorch's Python runtime."""

    name = "executorch"
    suffix = ".pte"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the file.

        Args:
            model: in evaluation mode, on the CPU.
            path: the file.
            options: ``Options``.

        Raises:
            InvalidArgument: a number that does not fit, or an ExecuTorch that is missing or of another torch.
            Unsupported: torch or ExecuTorch cannot export the model for such batches, or not in its type.
            Error: ExecuTorch computes something else; the text names the first module where it does.
        """
        found, sizes = engine("format"), options.batch_sizes
        if (dtype := input_dtype(model)) not in _DTYPES:
            got = str(dtype).removeprefix("torch.")
            raise Unsupported(f"dtype: expected float32 or float16 for executorch, got {got}")
        bits: Bits | None = "int8" if options.int8 else None
        images = calibration_images(model, options, bits, among="int8", calibrated=bits)
        name = f"ExecuTorch {found.version}"
        details: dict[str, Any] = {"batches": f"1 to {options.max_batch}" if options.max_batch > 1 else "1"}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            program = _exported(model, options.max_batch)
            exact = in_int8(program, images) if bits else None
            if exact is not None:
                program = _exported(exact, options.max_batch, random_images(model, _example(options.max_batch)))
            details |= _write(program, written)
            run = _load(found, written)
            if exact is not None:
                difference = difference_of_integers(exact, run, model, sizes, name, slack=_SLACK)
                details |= cost(model, run, images, "int8")
            else:
                difference = located_difference(model, run, sizes, name, lambda watched, _: _loaded(watched, found))
            version = _version(written)
            del run  # some systems do not move files that are open
            written.replace(path)
        return ExportReport(self.name, (path,), path.stat().st_size, version, name, sizes, difference, details)


def _example(largest: int) -> int:
    """A batch of 1 would be taken for a constant, unless there is no other."""
    return min(2, largest)


def _exported(model: nn.Module, largest: int, example: Tensor | None = None) -> torch.export.ExportedProgram:
    example = random_images(model, _example(largest)) if example is None else example
    shapes = ({0: torch.export.Dim("batch", min=1, max=largest)},) if largest > 1 else None
    # Of fused attention, eight small operators are left outside XNNPACK.
    with quiet(), torch.no_grad(), plain_attention(model):
        try:
            return torch.export.export(model, (example,), dynamic_shapes=shapes)
        except Exception as error:  # torch raises what it likes
            reason = first_line(error)
            raise Unsupported(f"model: expected one that torch.export takes, got {reason}") from error


def _write(program: torch.export.ExportedProgram, path: Path) -> dict[str, int]:
    """Write ExecuTorch's program, and return what is run by XNNPACK and what is not."""
    try:
        made = lowered(program)
        with path.open("wb") as file:
            made.write_to_file(file)
    except OSError:
        raise
    except Exception as error:  # ExecuTorch raises what it likes
        raise Unsupported(f"model: expected one that ExecuTorch converts, got {first_line(error)}") from error
    calls = instructions(made)
    return {"delegated": calls["delegate"], "operators_outside": calls.total() - calls["delegate"]}


def _load(found: Engine, path: Path) -> Run:
    try:
        return found.load(path)
    except Exception as error:  # as above
        raise Error(f"export: expected a file that ExecuTorch loads, got {first_line(error)}") from error


def _loaded(watched: nn.Module, found: Engine) -> Run:
    return found.load(lowered(_exported(watched, 2)).buffer)


def _version(path: Path) -> str:
    """The identifier of a flatbuffer, such as ET12."""
    with path.open("rb") as file:
        return file.read(8)[4:].decode("ascii", "replace")
