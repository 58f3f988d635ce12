"""One progress bar for everything that takes long; silent where nobody watches."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["Advance", "progress"]


class Advance(Protocol):
    """The callable that `progress` yields."""

    def __call__(self, count: int, /, note: str = "") -> None:
        """Count ``count`` more units as done; ``note`` is shown at the end of the line."""


@contextmanager
def progress(
    total: int | None, description: str = "", unit: str = "images", *, silent: bool = False
) -> Generator[Advance, None, None]:
    """Show done / total, units per second and the remaining time on stderr while the block runs.

    Nothing is written, and nothing is left behind, when stderr is not a terminal, or with ``silent``. ``total=None``
    stands for an unknown length: the bar pulses and no remaining time is given.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield _ignore
        return

    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.1f} {unit}/s", style="progress.data.speed")

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}" + (f"/{total:,}" if total is not None else "") + f" {unit}"),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(count: int, /, note: str = "") -> None:
            bar.update(task, advance=count)
            if note:
                bar.update(task, note=note)

        yield advance


def _ignore(_count: int, /, note: str = "") -> None:
    del note
