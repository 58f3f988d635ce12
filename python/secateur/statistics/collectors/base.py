"""What a collector offers, and where it is found by name."""

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

__all__ = ["Accumulator", "Collector", "Folds", "Position", "State", "collectors", "in_turn", "register"]

# Arrays by "fold/observation/what", as statistics and their files have them.
State = dict[str, npt.NDArray[Any]]
T = TypeVar("T")


@dataclass
class Position:
    """Where calibration is: the number of the first image of the batch; all accumulators share one.

    ``wait`` says whether to wait for the device, layer after layer. ``dtype`` is the type of the queries and keys that
    were seen, "" before the first.
    """

    images: int = 0
    wait: bool = False
    dtype: str = ""


class Accumulator(Protocol):
    """The sums of one observation, on one rank."""

    @property
    def taps(self) -> Sequence[Tap]:
        """What it sees, in the order in which a forward pass comes by."""

    def update(self, position: Position, seen: Sequence[Tensor]) -> None:
        """Add what the ``taps`` read in a forward pass of one batch."""

    def wait(self) -> None:
        """Wait for what a device has been given to do.

        Raises:
            NumericalError: a value that was not finite.
        """

    def state(self, position: Position) -> State:
        """The arrays by their full names; those of all ranks are added up."""

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from the arrays of a file, of all names."""


class Collector(ABC):
    """One way of summing up what is seen of a layer, or of a norm of the residual stream."""

    name: ClassVar[str]

    @abstractmethod
    def open(
        self, taps: Mapping[Part, Tap], settings: Settings, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterable[Accumulator]:
        """Accumulators for the parts it is about; none where the layer lacks them.

        Args:
            taps: of one layer, or of a norm of the residual stream (the part "stream").
            settings: of the calibration.
            shapes: observation to (heads, size of each), for queries and keys.
        """

    def merge(self, name: str, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
        """One array of several calibrations' over different images; None for those that are added up."""
        del name, arrays
        return None


collectors: Registry[Collector] = Registry(
    "collector", "secateur.statistics.collectors", "secateur.collectors", members=("open", "merge")
)
register = collectors.register


def in_turn(pair: Sequence[T], position: Position) -> list[T]:
    """What the next image is added to, then what the one after it is."""
    first = position.images % 2
    return [pair[first], pair[1 - first]]


class Summing(Protocol):
    """What the core's accumulators have in common."""

    def wait(self) -> None: ...

    def state(self) -> dict[str, npt.NDArray[Any]]: ...

    def load_state(self, state: Any) -> None: ...


class Folds:
    """One of the core's accumulators a fold, under the name of what is observed."""

    def __init__(self, name: str, pair: Sequence[Summing]) -> None:
        self._name, self._pair = name, pair

    def wait(self) -> None:
        """Wait for what a device has been given to do.

        Raises:
            NumericalError: a value that was not finite.
        """
        first: NumericalError | None = None
        for accumulator in self._pair:
            # All of them: what one is left with would be taken for the next batch's.
            try:
                accumulator.wait()
            except NumericalError as error:
                first = first or error
        if first is not None:
            raise first

    def state(self, position: Position) -> State:
        """The sums of both folds."""
        del position
        return {
            f"{fold}/{self._name}/{what}": array
            for fold, accumulator in zip(FOLDS, self._pair, strict=True)
            for what, array in accumulator.state().items()
        }

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from these sums."""
        for fold, accumulator in zip(FOLDS, self._pair, strict=True):
            prefix = f"{fold}/{self._name}/"
            accumulator.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
