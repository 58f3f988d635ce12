"""A budget: the fractions of MACs, parameters and latency that a plan keeps."""

from __future__ import annotations

from dataclasses import dataclass

from .. import check
from ..errors import InvalidArgument


@dataclass(frozen=True)
class Target:
    """A budget: fractions, in (0, 1], of the MACs, parameters and latency of the model that is planned for.

    Several hold together. Latency is the time of one batch; ``plan`` says of what size and on which machine.

    Raises:
        InvalidArgument: no fraction given, or one outside (0, 1].
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise InvalidArgument("target: expected macs=, params= or latency=, got none")
        for name, value in given.items():
            # A plain number, which files can hold, whatever it came as.
            object.__setattr__(self, name, check.fraction(f"target.{name}", value, open_low=True))

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value:g}" for name, value in vars(self).items() if value is not None)
