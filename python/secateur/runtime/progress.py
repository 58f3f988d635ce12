"""One progress bar for everything that takes long; silent if stderr is not a terminal."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.progress import Progress

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

    Nothing is written if stderr is not a terminal, or with ``silent``, and nothing remains afterwards. ``total=None``
    means an unknown length: the bar pulses and shows no remaining time. A bar within the block of another is shown
    below it.
    """
    if silent:
        yield _ignore
        return
    with _display() if _shown is None else nullcontext(_shown) as bar:
        if bar is None:
            yield _ignore
            return
        task = bar.add_task(description, total=total, note="", unit=unit)

        def advance(count: int, /, note: str = "") -> None:
            bar.update(task, advance=count)
            if note:
                bar.update(task, note=note)

        try:
            yield advance
        finally:
            # The outermost bar stays until the display ends.
            if len(bar.tasks) > 1:
                bar.remove_task(task)


_shown: Progress | None = None


@contextmanager
def _display() -> Generator[Progress | None, None, None]:
    """Show the bars of this block, one below the other, since two displays at once would overwrite each other."""
    global _shown
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return

    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Done(ProgressColumn):
        def render(self, task: Task) -> Text:
            total = "" if task.total is None else f"/{task.total:,.0f}"
            return Text(f"{task.completed:,.0f}{total} {task.fields['unit']}")

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            text = "" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s"
            return Text(text, style="progress.data.speed")

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        Done(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        _shown = bar
        try:
            yield bar
        finally:
            _shown = None


def _ignore(_count: int, /, note: str = "") -> None:
    del note
