"""torch.export's program in one .pt2 file, as it is or compiled, which is loaded without the model's code."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import Error, InvalidArgument, Unsupported, first_line
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .locate import Run, located_difference

__all__ = ["Program"]

# What torch says while it compiles: of CUDA's tools, and of what it tries.
_LOGGERS = ("torch.utils.cpp_extension", "torch._inductor", "torch._dynamo", "torch.export")
# Otherwise torch writes its present number of threads into the code, unless it is the machine's.
_SETTINGS = {"cpp.dynamic_threads": True}


@dataclass(frozen=True)
class Options(Checked):
    """What is written, and how it is checked."""

    compiled: bool = field(
        default=False, metadata={"help": "compiled by AOTInductor, for processors like this one; needs a C++ compiler"}
    )


@register
class Program(Exporter):
    """A program for batches of any size, on the CPU, which holds no images.

    ``torch.export.load`` opens it, or, if it is compiled, ``torch._inductor.aoti_load_package``.
    """

    name = "torch"
    suffix = ".pt2"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the file.

        Args:
            model: in evaluation mode, on the CPU.
            path: the file.
            options: ``Options``.

        Raises:
            InvalidArgument: torch finds no C++ compiler for ``compiled``.
            Unsupported: torch cannot export the model for batches of any size, or cannot compile it.
            Error: the loaded program computes something else; the text names the first module where it does.
        """
        write = _compile if options.compiled else _save
        if options.compiled:
            _require_compiler()
        engine = f"torch {torch.__version__}"
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            run, place = write(model, written)
            difference = located_difference(
                model, run, options.batch_sizes, engine, lambda watched, where: write(watched, where / path.name)[0]
            )
            del run  # some systems do not move files that are open
            written.replace(path)
        version = f"{torch.__version__}, {place}"
        return ExportReport(self.name, (path,), path.stat().st_size, version, engine, options.batch_sizes, difference)


def _save(model: nn.Module, path: Path) -> tuple[Run, str]:
    """Write torch's program; return what runs the file, and where that runs."""
    program = _exported(model)
    # torch keeps the example in the file.
    program.example_inputs = None
    torch.export.save(program, path)
    return torch.export.load(path).module(), "cpu"


def _compile(model: nn.Module, path: Path) -> tuple[Run, str]:
    """Write what AOTInductor makes of the program; return as ``_save`` does."""
    program = _exported(model)
    with quiet(*_LOGGERS), torch.no_grad():
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs={**_SETTINGS})
        except Exception as error:  # torch raises what it likes
            raise Unsupported(f"model: expected one that AOTInductor compiles, got {first_line(error)}") from error
        try:
            loaded = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # as above
            raise Error(f"export: expected a package that torch loads, got {first_line(error)}") from error
    # torch tells the instructions that the code uses, such as AVX512.
    instructions = loaded.get_metadata().get("AOTI_CPU_ISA", "")
    return loaded, f"compiled for cpu {instructions}".rstrip()


def _require_compiler() -> None:
    """Refuse to begin what only a compiler can end.

    Raises:
        InvalidArgument: torch finds none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InvalidArgument(
            f"compiled: expected a C++ compiler, g++ or the one that CXX names, got none ({first_line(error)})"
        ) from error


def _exported(model: nn.Module) -> torch.export.ExportedProgram:
    # A batch of 1 would be taken for a constant; Dim.AUTO and Dim.DYNAMIC promise no batch of 1.
    example, batch = random_images(model, 2), torch.export.Dim("batch", min=1)
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        except Exception as error:  # torch raises what it likes
            reason = first_line(error)
            raise Unsupported(f"model: expected one that torch.export takes, got {reason}") from error
    if not program.range_constraints:
        raise Error("export: expected a program for batches of any size, got one for batches of 2")
    return program
