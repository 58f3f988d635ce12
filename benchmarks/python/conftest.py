"""Ratios measured side by side: both sides in turn in one process, the median of the paired ratios, one table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import secateur as sc
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from rich.table import Table

THREADS = 2


@dataclass(frozen=True)
class Row:
    """One line of the table: ``ratio`` is the median of first / second, with its quartiles."""

    what: str
    ratio: float
    quartiles: tuple[float, float]
    first: float
    second: float
    unit: str
    runs: int


_ROWS: list[Row] = []


class Paired:
    """Time two functions in turn: pytest-benchmark times the first, the second runs before each of its rounds."""

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self.benchmark = benchmark

    def __call__(
        self,
        what: str,
        first: Callable[..., object],
        second: Callable[..., object],
        runs: int = 15,
        fresh: Callable[[], object] | None = None,
    ) -> Row:
        """Run each two times to warm up and ``runs`` times measured, and keep the row for the table.

        ``fresh`` makes the argument of every single run, outside the clock.
        """
        others: list[float] = []

        def argument() -> tuple[object, ...]:
            return () if fresh is None else (fresh(),)

        def time_second() -> tuple[tuple[object, ...], dict[str, object]]:
            given = argument()
            start = time.perf_counter()
            second(*given)
            others.append(time.perf_counter() - start)
            del given
            return argument(), {}

        self.benchmark.pedantic(first, setup=time_second, rounds=runs, warmup_rounds=2)
        times = self.benchmark.stats.stats.data
        return self.record(what, [1e3 * t for t in times], [1e3 * t for t in others[-runs:]], "ms")

    def record(self, what: str, firsts: Sequence[float], seconds: Sequence[float], unit: str) -> Row:
        """Keep the row of pairs that were measured in some other way."""
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(firsts, seconds, strict=True)], n=4)
        self.benchmark.extra_info["ratio"] = ratio
        row = Row(what, ratio, (low, high), statistics.median(firsts), statistics.median(seconds), unit, len(firsts))
        _ROWS.append(row)
        return row


@pytest.fixture
def paired(benchmark: BenchmarkFixture) -> Generator[Paired, None, None]:
    """Paired timing with the agreed number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with sc.core.torch_threads():
        yield Paired(benchmark)
    torch.set_num_threads(before)


def processor() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def pytest_terminal_summary() -> None:
    """Print what was measured, and on what."""
    if not _ROWS:
        return
    table = Table(
        title=f"{processor()}, {THREADS} threads, {sc.core.runtime.isa()}, "
        f"torch {torch.__version__}, timm {timm.__version__}"
    )
    for column in ("what", "median ratio", "quartiles", "first", "second", "unit", "runs"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in _ROWS:
        low, high = row.quartiles
        table.add_row(
            row.what,
            f"{row.ratio:.3f}",
            f"{low:.3f} … {high:.3f}",
            f"{row.first:.2f}",
            f"{row.second:.2f}",
            row.unit,
            str(row.runs),
        )
    Console(width=140).print(table)
