"""How far a long computation is, for people who watch, and for a log where nobody does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["progress_bar", "told"]


def progress_bar(console: Console) -> Progress:
    """A bar with steps and time left; a task may say more as its field `status`."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


@contextmanager
def told(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be told of the steps done and of all: it moves a bar, or writes a line for every percent."""
    if not console.is_terminal:
        yield _PercentLines(console, title)
        return
    with progress_bar(console) as progress:
        task = progress.add_task(title, total=None, status="")
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _PercentLines:
    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title, self.percent = console, title, -1
        self.first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        began, before = self.first = self.first or (now, done)
        percent = 100 * done // max(total, 1)
        if percent == self.percent:
            return
        self.percent = percent
        minutes = (now - began) / 60 * (total - done) / (done - before) if done > before else None
        left = "" if minutes is None else f", {minutes:.0f} minutes left"
        line = f"{self.title}: {done} of {total} steps{left}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
