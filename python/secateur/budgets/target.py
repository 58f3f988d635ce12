"""A budget: the fractions of MACs, parameters and latency that a plan keeps."""

from __future__ import annotations

from dataclasses import dataclass

from .. import check
from ..errors import InvalidArgument


@dataclass(frozen=True)
class Target:
    """Fraction kept, in (0, 1], of the MACs, parameters and latency of the model that is to be pruned.

    All given limits hold together. Latency is the time of one batch; its size and the machine are arguments of
    ``plan``.

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
            # Stored as a plain number, whatever its type was, so that files can hold it.
            object.__setattr__(self, name, check.fraction(f"target.{name}", value, open_low=True))

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value:g}" for name, value in vars(self).items() if value is not None)
