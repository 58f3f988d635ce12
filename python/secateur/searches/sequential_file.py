"""The file of a run over layers: what has been decided, so that a run that was stopped goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Indices
from ..errors import InvalidArgument
from ..files import container
from ..statistics.settings import Float

__all__ = ["Progress", "SequentialFile"]

_KIND = "sequential"


@dataclass
class Progress:
    """What has been decided for the first ``done`` layers of the dense model.

    ``sizes`` are those of all groups afterwards. ``keep``, ``weights``, ``eps`` and ``uncentred`` are as in a plan.
    ``rows`` are the sums that weights of tokens are made from, ``images`` is how many images there are.
    """

    sizes: dict[str, int]
    done: int = 0
    images: int = 0
    keep: dict[str, Indices] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    eps: dict[str, float] = field(default_factory=dict)
    uncentred: list[str] = field(default_factory=list)
    rows: dict[str, Float] = field(default_factory=dict)


@dataclass(frozen=True)
class SequentialFile:
    """A file for one model and one set of arguments: ``settings``, JSON values."""

    path: Path
    settings: Mapping[str, Any]

    def write(self, progress: Progress) -> None:
        """Write what has been decided, completely or not at all."""
        header = {
            "settings": self.settings,
            "sizes": progress.sizes,
            "done": progress.done,
            "images": progress.images,
            "eps": progress.eps,
            "uncentred": progress.uncentred,
        }
        tensors = {f"weights/{name}": value for name, value in progress.weights.items()}
        tensors |= {f"keep/{name}": torch.from_numpy(value) for name, value in progress.keep.items()}
        tensors |= {f"rows/{name}": torch.from_numpy(value) for name, value in progress.rows.items()}
        container.write(self.path, _KIND, header, tensors)

    def read(self) -> Progress | None:
        """Return what the file holds; None if there is no file.

        Raises:
            InvalidArgument: the file is damaged, or belongs to another model or other arguments.
        """
        if not self.path.is_file():
            return None
        header, tensors = container.read(self.path, _KIND)
        with container.understood(f"{self.path.name}: expected a secateur {_KIND} file"):
            mine = json.loads(json.dumps(self.settings))
            for name, value in mine.items():
                found = header["settings"].get(name)
                if found != value:
                    what = "another model" if name == "model" else f"{name} = {found!r} where it is {value!r} now"
                    raise InvalidArgument(f"resume: expected the file of this run, got one with {what}")
            return Progress(
                sizes={str(name): int(size) for name, size in header["sizes"].items()},
                done=int(header["done"]),
                images=int(header["images"]),
                keep={name: value.numpy() for name, value in _under("keep/", tensors)},
                weights=dict(_under("weights/", tensors)),
                eps={str(name): float(eps) for name, eps in header["eps"].items()},
                uncentred=[str(name) for name in header["uncentred"]],
                rows={name: value.numpy() for name, value in _under("rows/", tensors)},
            )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix(prefix), value) for name, value in tensors.items() if name.startswith(prefix)]
