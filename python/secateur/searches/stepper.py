"""How a search varies its one scalar: grow, roll back and halve, return. Knows nothing about models."""

from __future__ import annotations

from typing import Literal

__all__ = ["MISSES", "Move", "Stepper"]

Move = Literal["grow", "halve", "return", "end"]
MISSES = 3


class Stepper:
    """AAP's adaptive rule (arXiv:2303.08595, as in the authors' released code) for the threshold T and its step λ.

    ``threshold`` and ``step`` are for the next round, ``base`` is the round whose model it cuts. Round 0 is the dense
    model at T = 0, which has no base. With b the last round that was kept, after each round `tell` moves as follows:

    - kept: T ← T + λ, and the next round cuts this one's model;
    - missed once or twice since b: λ ← λ_b / 2 or λ_b / 4, T ← T_b + λ, and the next round cuts b's model;
    - missed three times: λ ← λ / 2, T ← T_b, the next round starts from b's model, and b is forgotten: if that round
      misses too, the one kept before b takes its place;
    - missed with no kept round left: the search is over, and ``base`` and ``threshold`` have no meaning.
    """

    def __init__(self, step: float) -> None:
        self.threshold = 0.0
        self.step = step
        self.base: int | None = None
        self.over = False
        self._rounds: list[tuple[float, float]] = []
        self._kept: list[int] = []
        self._misses = 0

    @property
    def reachable(self) -> set[int]:
        """Return the rounds whose models may still be cut."""
        return {*self._kept, *(() if self.base is None else (self.base,))}

    def tell(self, further: bool) -> Move:
        """Record the outcome of the round, and choose the next.

        Args:
            further: whether the round is kept, and cut further.
        """
        self._rounds.append((self.threshold, self.step))
        if further:
            self.base = len(self._rounds) - 1
            self._kept.append(self.base)
            self._misses = 0
            self.threshold += self.step
            return "grow"
        if not self._kept:
            self.base, self.over = None, True
            return "end"
        self.base = self._kept[-1]
        threshold, step = self._rounds[self.base]
        self._misses += 1
        if self._misses == MISSES:
            self._kept.pop()
            self._misses = 0
            self.step /= 2
            self.threshold = threshold
            return "return"
        self.step = step / 2**self._misses
        self.threshold = threshold + self.step
        return "halve"
