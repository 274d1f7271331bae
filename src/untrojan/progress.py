"""Progress bars that are silent in a library and live on a command line.

Library code says ``with task("decoding", total=60_000, unit="images") as bar: bar.advance(100)``.
Nothing is drawn until the command line calls :func:`enable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_console: Console | None = None
_live: Progress | None = None


def enable(console: Console | None = None) -> None:
    """Draw bars on ``console`` (standard error when none is given)."""
    global _console
    from rich.console import Console as RichConsole

    _console = console or RichConsole(stderr=True)


class Task:
    """One bar. ``advance`` moves it; ``note`` sets the text at its end, such as the current loss."""

    def __init__(self, progress: Progress | None = None, task_id: TaskID | None = None) -> None:
        self._progress, self._id = progress, task_id

    def advance(self, amount: float = 1) -> None:
        if self._progress is not None and self._id is not None:
            self._progress.advance(self._id, amount)

    def note(self, text: str) -> None:
        if self._progress is not None and self._id is not None:
            self._progress.update(self._id, note=text)


@contextmanager
def task(description: str, total: float | None, unit: str = "", done: float = 0) -> Iterator[Task]:
    """A bar with rate and time left; nested bars share one display. ``done`` is work already behind us."""
    global _live
    if _console is None:
        yield Task()
        return
    outermost = _live is None
    progress = _live or _new_display(_console)
    if outermost:
        _live = progress
        progress.start()
    task_id = progress.add_task(description, total=total, completed=done, unit=unit, note="")  # type: ignore[arg-type]
    try:
        yield Task(progress, task_id)
    finally:
        if outermost:
            progress.stop()
            _live = None
        else:
            progress.remove_task(task_id)


def _new_display(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed and speed >= 1 else "")

    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=not console.is_terminal,
    )
