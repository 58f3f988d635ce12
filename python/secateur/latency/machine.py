"""The machine that times were measured on; times are not valid on another."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """Processor, torch's number of threads, the device that computes ("cpu" or the GPU's name), and torch's version."""

    processor: str
    threads: int
    device: str
    pytorch: str

    @classmethod
    def here(cls, place: torch.device) -> Machine:
        """Describe this machine with its present settings, and the hardware of the device ``place``."""
        device = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
        return cls(_processor(), torch.get_num_threads(), device, torch.__version__)

    def difference(self, other: Machine) -> str | None:
        """Return the first difference of ``other``, as "threads 4 where it was 2"; None if there is none."""
        for field in fields(self):
            mine, found = getattr(self, field.name), getattr(other, field.name)
            if mine != found:
                return f"{field.name} {found!r} where it was {mine!r}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the machine as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Machine:
        """Build a machine from its JSON values."""
        return cls(str(values["processor"]), int(values["threads"]), str(values["device"]), str(values["pytorch"]))

    def __str__(self) -> str:
        device = "" if self.device == "cpu" else f"{self.device}, "
        return f"{device}{self.processor}, {self.threads} threads, torch {self.pytorch}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
