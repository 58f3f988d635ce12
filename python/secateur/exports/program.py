"""torch.export's program in one .pt2 file, which Python and C++ load without the model's code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import Error, Unsupported, first_line
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .locate import located_difference

__all__ = ["Program"]


@register
class Program(Exporter):
    """A program for batches of any size, on the CPU; it loads by ``torch.export.load`` and holds no images."""

    name = "torch"
    suffix = ".pt2"
    Options: ClassVar[type] = Checked

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the file.

        Args:
            model: in evaluation mode, on the CPU.
            path: the file.
            options: ``Checked``.

        Raises:
            Unsupported: torch cannot export the model for batches of any size.
            Error: the loaded program computes something else; the text names the first module where it does.
        """
        program = _exported(model)
        # torch keeps the example in the file.
        program.example_inputs = None
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            torch.export.save(program, written)
            engine = f"torch {torch.__version__}"
            run = torch.export.load(written).module()
            difference = located_difference(
                model, run, options.batch_sizes, engine, lambda watched, _: _exported(watched).module()
            )
            written.replace(path)
        version = f"{torch.__version__}, cpu"
        return ExportReport(self.name, (path,), path.stat().st_size, version, engine, options.batch_sizes, difference)


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
