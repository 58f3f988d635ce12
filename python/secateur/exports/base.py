"""The interface of exporters, their report and their registry."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import check
from ..anatomy import Layout
from ..data.model_input import data_config, input_dtype
from ..engines import EXPORTERS
from ..errors import Error, InvalidArgument, first_line

__all__ = [
    "Checked",
    "ExportReport",
    "Exporter",
    "exporters",
    "largest_difference",
    "path_for",
    "random_images",
    "register",
    "tolerance",
    "written_whole",
]

# Tolerances relative to the largest output, for another order of sums.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was checked.

    ``difference`` is the largest absolute difference between the outputs of ``engine`` and of the model, over random
    images in batches of ``batch_sizes``; it is None where the engine does not exist on this system, and no batch was
    compared. ``version`` is the version of the format, such as ONNX's opset. ``details`` holds what else a format
    tells, as JSON values: what the engine fused, what fewer bits cost. A file may be a folder, as Core ML's packages.
    """

    format: str
    files: tuple[Path, ...]
    size: int
    version: str
    engine: str
    batch_sizes: tuple[int, ...]
    difference: float | None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "files": [str(file) for file in self.files], "batch_sizes": list(self.batch_sizes)}

    def __str__(self) -> str:
        names = ", ".join(file.name for file in self.files)
        line = f"{self.format} {self.version}: {names}, {self.size / 1e6:,.2f} MB; {self.engine}"
        if self.difference is not None:
            batches = ", ".join(map(str, self.batch_sizes))
            line += f" differs from the model by at most {self.difference:.2g} (batches of {batches})"
        details = (f"{key.replace('_', ' ')} {_short(value)}" for key, value in self.details.items())
        return "; ".join([line, *details])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Checked:
    """Options that all exporters have."""

    batch_sizes: tuple[int, ...] = field(
        default=(1, 2, 7), metadata={"help": "of the batches that both are compared on"}
    )

    def __post_init__(self) -> None:
        for size in self.batch_sizes:
            check.integer("batch_sizes", size)


class Exporter(ABC):
    """An exporter for one file format; a subclass registers itself with ``exports.register``. It has no state.

    ``Options`` is a frozen dataclass of its options, derived from ``Checked``. ``suffix`` is the ending that the engine
    wants of a file's name, if it wants one. With ``folder``, what it writes is a folder, new or empty before.
    ``layout`` is the one that suits the engine; ``prune(layout="auto", engine=name)`` chooses it.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    suffix: ClassVar[str] = ""
    folder: ClassVar[bool] = False
    layout: ClassVar[Layout] = "exact"

    @abstractmethod
    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the model to ``path``, completely or not at all, load it in its engine, and compare the two.

        The model is in evaluation mode; the folder that holds ``path`` exists and is writable. If the exporter writes
        a folder, there is none at ``path``, or an empty one; ``written_whole`` writes it completely or not at all.

        Raises:
            InvalidArgument: an option that does not fit, or a package that is missing; the text names the command that
                installs it.
            Unsupported: the format cannot hold the model.
            Error: the loaded file computes something else.
        """


def path_for(exporter: Exporter, argument: str, path: object) -> Path:
    """Return where an exporter is to write: a file, or a new or empty folder.

    Raises:
        InvalidArgument: it cannot be written, or has not the ending that the engine wants.
    """
    place = check.new_folder if getattr(exporter, "folder", False) else check.writable
    found, suffix = place(argument, path), getattr(exporter, "suffix", "")
    if not found.name.endswith(suffix):
        raise InvalidArgument(
            f"{argument}: expected a name that ends in {suffix} for {exporter.name}, got {found.name}"
        )
    return found


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a new folder to write to, which is named ``path`` if the block succeeds, and removed if it fails."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as place:
        made = Path(place) / path.name
        made.mkdir()
        yield made
        # An empty folder gives way.
        made.replace(path)


exporters = EXPORTERS
register = exporters.register


def random_images(model: nn.Module, batch: int) -> Tensor:
    """Return a batch of random images as the model takes them, on the CPU; always the same for a batch size."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, *data_config(model)["input_size"])
    return torch.randn(shape, generator=generator, device="cpu").to(input_dtype(model))


def tolerance(wanted: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return by how much an engine's output may differ from the model's: as much as another order of sums makes.

    Args:
        wanted: the model's output.
        dtype: in which the engine computes, where it is not the output's.
    """
    return _TOLERANCES.get(dtype or wanted.dtype, 1e-4) * max(1.0, float(wanted.abs().max()))


@torch.inference_mode()
def largest_difference(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    batch_sizes: Sequence[int],
    engine: str,
    dtype: torch.dtype | None = None,
) -> float:
    """Return the largest absolute difference between an engine's and the model's outputs on random images.

    ``dtype`` is the one in which the engine computes, where it is not the model's.

    Raises:
        Error: the difference is more than rounding, or the engine fails on a batch or returns another shape.
    """
    worst = 0.0
    for batch in batch_sizes:
        images = random_images(model, batch)
        wanted = model(images)
        if not isinstance(wanted, Tensor):
            raise InvalidArgument(f"model: expected one that returns a tensor, got {type(wanted).__name__}")
        try:
            found = torch.as_tensor(run(images))
        except Exception as error:  # engines can raise anything
            reason = first_line(error)
            raise Error(f"export: expected {engine} to take a batch of {batch}, got {reason}") from error
        if found.shape != wanted.shape:
            raise Error(
                f"export: expected outputs of shape {tuple(wanted.shape)} of {engine}, got {tuple(found.shape)}"
            )
        difference = float((found.double() - wanted.double()).abs().max())
        bar = tolerance(wanted, dtype)
        if not difference <= bar:
            raise Error(
                f"export: expected {engine} to compute what the model does, got a difference of {difference:.3g} in a "
                f"batch of {batch} (more than {bar:.3g})"
            )
        worst = max(worst, difference)
    return worst
