"""Ratios measured side by side: both sides in turn in one process, the median of the paired ratios, one table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Generator
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
    first_ms: float
    second_ms: float
    runs: int


_ROWS: list[Row] = []


class Paired:
    """Time two functions in turn: pytest-benchmark times the first, the second runs before each of its rounds."""

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self._benchmark = benchmark

    def __call__(self, what: str, first: Callable[[], object], second: Callable[[], object], runs: int = 15) -> Row:
        """Run each two times to warm up and ``runs`` times measured, and keep the row for the table."""
        others: list[float] = []

        def time_second() -> None:
            start = time.perf_counter()
            second()
            others.append(time.perf_counter() - start)

        self._benchmark.pedantic(first, setup=time_second, rounds=runs, warmup_rounds=2)
        times = self._benchmark.stats.stats.data
        others = others[-runs:]
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], n=4)
        self._benchmark.extra_info["ratio"] = ratio
        row = Row(what, ratio, (low, high), 1e3 * statistics.median(times), 1e3 * statistics.median(others), runs)
        _ROWS.append(row)
        return row


@pytest.fixture
def paired(benchmark: BenchmarkFixture) -> Generator[Paired, None, None]:
    """Paired timing with the agreed number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    sc.core.runtime.set_threads(THREADS)
    yield Paired(benchmark)
    torch.set_num_threads(before)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def pytest_terminal_summary() -> None:
    """Print what was measured, and on what."""
    if not _ROWS:
        return
    table = Table(
        title=f"{_processor()}, {THREADS} threads, {sc.core.runtime.isa()}, "
        f"torch {torch.__version__}, timm {timm.__version__}"
    )
    for column in ("what", "median ratio", "quartiles", "first ms", "second ms", "runs"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in _ROWS:
        low, high = row.quartiles
        table.add_row(
            row.what,
            f"{row.ratio:.3f}",
            f"{low:.3f} … {high:.3f}",
            f"{row.first_ms:.2f}",
            f"{row.second_ms:.2f}",
            str(row.runs),
        )
    Console(width=140).print(table)
