"""Studies whose runs are trained where the test is: a worker's own process would import PyTorch first."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from shortcuts import without_shape_checks

from squall.study.definition import Study, Trial
from squall.study.runner import run_study
from squall.study.worker import Task, Worker, Workers, run_batch


class _Here(Workers):
    size = 1

    def submit(self, batch: Sequence[Task]) -> Future[None]:
        done = Future[None]()
        with without_shape_checks():
            done.set_result(run_batch(batch, Worker()))
        return done

    def stop(self) -> None:
        pass


@contextlib.contextmanager
def _here(count: int | None) -> Iterator[Workers]:
    yield _Here()


def run_here(study: Study, path: Path, **options: Any) -> list[Trial]:
    """`run_study` without processes."""
    return run_study(study, path, on=_here, **options)
