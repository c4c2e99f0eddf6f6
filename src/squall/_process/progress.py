"""How far a long computation is, for people who watch, and for a log where nobody does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINES, SECONDS = 10, 60.0
"""A log gets a line for every tenth of the work, and at least one a minute."""


def progress_bar(console: Console) -> "Progress | ProgressLines":
    """A bar with steps and time left, or lines where no terminal can show one; a task may say more as `status`."""
    if not console.is_terminal or console.is_dumb_terminal:
        return ProgressLines(console)
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
def reporting(console: Console, title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show progress within the block, through a function of the finished steps and, if not given here, their total."""
    with progress_bar(console) as progress:
        task = progress.add_task(title, total=total, status="")
        yield lambda done, total=total: progress.update(task, completed=done, total=total)


class ProgressLines:
    """One task of a `Progress`, as lines in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.title, self.status = "", ""
        self.total: float | None = None
        self.completed = 0.0
        self._shown: float | None = None
        self._began: tuple[float, float] | None = None
        self._due = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        if self.completed != self._shown and self._began:
            self._show(time.monotonic())

    def add_task(self, description: str, total: float | None = None, status: str = "") -> TaskID:
        self.title, self.total, self.status = description, total, status
        return TaskID(0)

    def update(self, task: TaskID, **changes: Any) -> None:
        """As `Progress.update`: `completed`, `total`, `status`."""
        self.total, self.status = changes.get("total", self.total), changes.get("status", self.status)
        if "completed" not in changes:
            return
        self.completed, now = changes["completed"], time.monotonic()
        self._began = self._began or (now, self.completed)
        tenth = None if self._shown is None else LINES * self._shown // (self.total or 1)
        if now >= self._due or tenth is None or LINES * self.completed // (self.total or 1) != tenth:
            self._show(now)

    def _show(self, now: float) -> None:
        began, before = self._began or (now, self.completed)
        total, done = self.total or 0, self.completed
        seconds = (now - began) * (total - done) / (done - before) if before < done < total else 0
        left = (
            f", {seconds / 60:.0f} minutes left" if seconds >= 60 else f", {seconds:.0f} s left" if seconds >= 1 else ""
        )
        status = f"  {self.status}" if self.status else ""
        line = f"{self.title}: {done:g} of {total:g} steps{left}{status}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._shown, self._due = done, now + SECONDS
