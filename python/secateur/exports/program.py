"""torch.export's program in one .pt2 file, which Python and C++ load without the model's code."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import check
from ..errors import Error, Unsupported, first_line
from .base import Exporter, ExportReport, largest_difference, random_images, register

__all__ = ["Program"]


@dataclass(frozen=True)
class Options:
    """How the program is checked."""

    batch_sizes: tuple[int, ...] = field(
        default=(1, 2, 7), metadata={"help": "of the batches that both are compared on"}
    )


@register
class Program(Exporter):
    """A program for batches of any size, on the CPU; it loads by ``torch.export.load`` and holds no images.

    Name the file NAME.pt2: ``torch.export.load`` logs a warning at other endings.
    """

    name = "torch"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the file.

        Args:
            model: in evaluation mode, on the CPU.
            path: the file.
            options: ``Options``.

        Raises:
            InvalidArgument: a batch size that does not fit.
            Unsupported: torch cannot export the model for batches of any size.
            Error: the loaded program computes something else.
        """
        sizes = tuple(check.integer("batch_sizes", size) for size in options.batch_sizes)
        program = _exported(model)
        # torch keeps the example in the file.
        program.example_inputs = None
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            # torch warns of other endings.
            written = Path(folder) / "program.pt2"
            torch.export.save(program, written)
            engine = f"torch {torch.__version__}"
            difference = largest_difference(model, torch.export.load(written).module(), sizes, engine)
            written.replace(path)
        return ExportReport(
            self.name, (path,), path.stat().st_size, f"{torch.__version__}, cpu", engine, sizes, difference
        )


def _exported(model: nn.Module) -> torch.export.ExportedProgram:
    # A batch of 1 would be taken for a constant; Dim.AUTO and Dim.DYNAMIC promise no batch of 1.
    example, batch = random_images(model, 2), torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what the exporter says of itself
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        except Exception as error:  # torch raises what it likes
            reason = first_line(error)
            raise Unsupported(f"model: expected one that torch.export takes, got {reason}") from error
    if not program.range_constraints:
        raise Error("export: expected a program for batches of any size, got one for batches of 2")
    return program
