"""A folder that transformers' ViTForImageClassification loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import check
from ..families.vision_transformer.as_transformers import (
    config_for_transformers,
    refuse_for_transformers,
    weights_for_transformers,
)
from ..runtime.quiet import quiet
from .alike import alike
from .base import Checked, Exporter, ExportReport, largest_difference, register, written_whole

__all__ = ["Transformers"]


@register
class Transformers(Exporter):
    """config.json and model.safetensors, for ``ViTForImageClassification.from_pretrained``."""

    name = "transformers"
    folder = True
    # What the folder holds.
    layout = "stock"
    Options: ClassVar[type] = Checked

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the folder.

        Args:
            model: in evaluation mode, on the CPU; its blocks are alike.
            path: the folder.
            options: ``Checked``.

        Raises:
            InvalidArgument: transformers is not installed.
            Unsupported: its class cannot hold the model; the text names the first module that it lacks.
            Error: it computes something else.
        """
        transformers = check.packages("format", "transformers", "transformers")
        plain, sizes = alike(model, self.name)
        refuse_for_transformers(plain)
        config = transformers.ViTConfig(**config_for_transformers(plain, sizes))
        twin = transformers.ViTForImageClassification(config).eval().to(next(plain.parameters()).dtype)
        twin.load_state_dict(weights_for_transformers(plain), strict=True)
        engine = f"transformers {transformers.__version__}"
        with written_whole(path) as folder:
            with quiet("transformers"), _without_bars(transformers):
                twin.save_pretrained(folder)
                loaded = transformers.ViTForImageClassification.from_pretrained(folder, local_files_only=True).eval()

            def run(images: Tensor) -> Any:
                return loaded(images).logits

            difference = largest_difference(model, run, options.batch_sizes, engine)
            names = sorted(file.name for file in folder.iterdir() if file.is_file())
            size = sum((folder / name).stat().st_size for name in names)
        files = tuple(path / name for name in names)
        details = {"head_dim": sizes.head_dim}
        return ExportReport(
            self.name, files, size, transformers.__version__, engine, options.batch_sizes, difference, details
        )


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
