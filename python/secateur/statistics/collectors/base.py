"""The interface of collectors, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy.typing as npt
from torch import Tensor

from ...anatomy import Part, Tap
from ...errors import NumericalError
from ...registry import Registry
from ..settings import FOLDS, Settings

__all__ = [
    "Accumulator",
    "Collector",
    "Folds",
    "Position",
    "State",
    "collectors",
    "in_turn",
    "register",
    "wait_for_all",
]

# Arrays by "fold/observation/what", as in statistics and their files.
State = dict[str, npt.NDArray[Any]]
T = TypeVar("T")


@dataclass
class Position:
    """Where calibration is: the number of the batch's first image. All accumulators share one.

    ``wait`` says whether to wait for the device after each layer. ``dtype`` is the type of the queries and keys seen so
    far, "" before the first. ``weights`` (B, N) are those of the tokens of the layer that is being added, if tokens
    have weights.
    """

    images: int = 0
    wait: bool = False
    dtype: str = ""
    weights: Tensor | None = None


class Accumulator(Protocol):
    """The sums of one observation, on one rank."""

    @property
    def taps(self) -> Sequence[Tap]:
        """The taps it observes, in the order of a forward pass."""

    def update(self, position: Position, seen: Sequence[Tensor]) -> None:
        """Add what the ``taps`` read in a forward pass of one batch."""

    def wait(self) -> None:
        """Wait for the work that was started on a device.

        Raises:
            NumericalError: a value that was not finite.
        """

    def state(self, position: Position) -> State:
        """Return its arrays by full name; those of all ranks are added up."""

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from the arrays of a file, given with their full names."""


class Collector(ABC):
    """One way of summing up what is observed of a layer, or of a norm of the residual stream."""

    name: ClassVar[str]

    @abstractmethod
    def open(
        self, taps: Mapping[Part, Tap], settings: Settings, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterable[Accumulator]:
        """Return accumulators for the parts that it collects; none if the layer lacks them.

        Args:
            taps: the taps of one layer, or of a norm of the residual stream (the part "stream").
            settings: the settings of the calibration.
            shapes: maps an observation to (heads, size of each), for queries and keys.
        """

    def merge(self, name: str, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
        """Merge one array of several calibrations over different images; return None for arrays to be added up."""
        del name, arrays
        return None


collectors: Registry[Collector] = Registry(
    "collector", "secateur.statistics.collectors", "secateur.collectors", members=("open", "merge")
)
register = collectors.register


def in_turn(pair: Sequence[T], position: Position) -> list[T]:
    """Return the pair in the order in which the batch's images, from its first, are added to the folds."""
    first = position.images % 2
    return [pair[first], pair[1 - first]]


class Waiting(Protocol):
    """Anything that a device may still be working for."""

    def wait(self) -> None: ...


def wait_for_all(parts: Iterable[Waiting]) -> None:
    """Wait for all work that was started on a device; an error left in one part would be taken for the next batch's.

    Raises:
        NumericalError: the first value that was not finite.
    """
    first: NumericalError | None = None
    for part in parts:
        try:
            part.wait()
        except NumericalError as error:
            first = first or error
    if first is not None:
        raise first


class Summing(Protocol):
    """The common interface of the core's accumulators."""

    def wait(self) -> None: ...

    def state(self) -> dict[str, npt.NDArray[Any]]: ...

    def load_state(self, state: Any) -> None: ...


class Folds:
    """One of the core's accumulators for each fold, under the name of the observation."""

    def __init__(self, name: str, pair: Sequence[Summing]) -> None:
        self._name, self._pair = name, pair

    def wait(self) -> None:
        """Wait for the work that was started on a device.

        Raises:
            NumericalError: a value that was not finite.
        """
        wait_for_all(self._pair)

    def state(self, position: Position) -> State:
        """Return the sums of both folds."""
        del position
        return {
            f"{fold}/{self._name}/{what}": array
            for fold, accumulator in zip(FOLDS, self._pair, strict=True)
            for what, array in accumulator.state().items()
        }

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from these sums."""
        for fold, accumulator in zip(FOLDS, self._pair, strict=True):
            prefix = f"{fold}/{self._name}/"
            accumulator.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
