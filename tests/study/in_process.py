"""Studies whose runs are trained where the test is: a worker's own process would import PyTorch first."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from shortcuts import without_shape_checks

from squall.runs.build import build
from squall.runs.config import from_dict, to_dict
from squall.study.definition import Study, Trial
from squall.study.runner import run_study
from squall.study.worker import Task, Worker, Workers, run_batch
from squall.training import train


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


def assert_takes_a_step(trial: Trial, data: Path, arguments: dict[str, Any]) -> None:
    """One training step on a small file, by a model with these arguments: all weights finite, and some changed."""
    values = to_dict(trial.config)
    values["data"] |= {"path": str(data), "validation": 1, "test": 1}
    values["model"]["arguments"] = arguments
    values["training"] |= {"steps": 1, "batch": 2, "schedule": "constant"}
    made = build(from_dict(values))
    before = [p.detach().clone() for p in made.model.parameters()]
    with without_shape_checks():
        train(made.model, made.transitions, made.config.training, loss=made.loss, scale=made.normalization.std)
    after = list(made.model.parameters())
    assert all(p.isfinite().all() for p in after), trial.labels
    assert not all(map(torch.equal, before, after)), trial.labels
