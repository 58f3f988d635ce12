"""`secateur demo`; the job itself is in `digits`."""

from pathlib import Path
from typing import Annotated

import typer

from . import lazy
from .options import Json, Threads
from .output import collected

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the pruned model.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Run a few steps only, to see that it works.")] = False,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train, prune to half the MACs, fine-tune, measure, save and reload, on scikit-learn's handwritten digits."""
    with collected(as_json) as output:
        few = {"steps": 60, "finetune_steps": 6, "max_images": 192, "repeats": 3}
        found = lazy.demo(out, **(few if quick else {}))
        output.show(found.table(), **found.to_dict())
