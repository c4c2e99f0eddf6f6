"""What a worker of a study does: it trains and evaluates trials, and stops where it is asked to."""

import _thread
import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from squall._process.signals import STOPPING, Stopped
from squall._process.threads import keep_freed_memory
from squall.data.endless import endless_refused
from squall.evaluation.rollouts import Keep
from squall.runs.config import RunConfig
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import CHECKPOINTS, SAMPLING, RunFolder, RunFolderError
from squall.runs.train import run_together
from squall.study.definition import SHOWN_FROM_FIELDS, OtherIntegrator, Trial
from squall.study.folder import FAILED, TRIAL
from squall.study.outcome import FIELDS
from squall.training.loop import Recorder, TrainingDiverged

LOCK_SECONDS = 30
"""How long to wait for a worker of a study that was killed: it ends on its own within seconds."""

FRAMES_KEPT = 101
"""Times at which the fields and curves of a rollout are kept."""


@dataclass(frozen=True)
class Task:
    """What a worker does: one trial, and what is kept of it."""

    trial: Trial
    config: RunConfig
    path: Path
    evaluations: tuple[OtherIntegrator, ...]
    shown: frozenset[str]
    keep_weights: bool

    @property
    def wanted(self) -> list[str]:
        """The files that the report needs of it."""
        names = ["evaluation.json", *(f"evaluation{other.suffix}.json" for other in self.evaluations)]
        if self.shown & SHOWN_FROM_FIELDS:
            names.append(FIELDS)
        if "sampling" in self.shown and self.config.sampling.name != "uniform" and _keeps_stiffness(self.config):
            names.append(SAMPLING)
        return names

    @property
    def is_done(self) -> bool:
        """Listed, not asked for by name: NFS remembers for a minute that a file was not there."""
        names = set(os.listdir(self.path)) if self.path.is_dir() else set()
        return names.issuperset((TRIAL, *self.wanted)) or (FAILED in names and TRIAL not in names)

    @property
    def keep(self) -> Keep:
        """What its evaluation keeps for the figures of the report."""
        fields = ("truth", "prediction") + (("step_error", "regime") if "one-step" in self.shown else ())
        return Keep(times=FRAMES_KEPT, fields=fields if self.shown & SHOWN_FROM_FIELDS else (), dtype="f2")


class Workers(ABC):
    """Where batches of trials are trained and evaluated, `size` of them at a time."""

    size: int

    @abstractmethod
    def submit(self, batch: Sequence[Task]) -> Future[None]:
        """Begin a batch when a worker is free; its results are in the study's folder when the future is done."""

    @abstractmethod
    def stop(self) -> None:
        """Have every worker save its training and stop; return when all have."""


class Worker(Recorder):
    """What this worker does when it, or its study, is asked to stop: a training is saved at its step, and all else is
    left at once, to be done again."""

    def __init__(self) -> None:
        self.received, self.busy, self.trains = 0, False, False

    def stopping(self) -> bool:
        return self.received > 0

    def stepped(self, step: int) -> None:
        self.trains = True

    def notice(self, number: int, _: object = None) -> None:
        """A signal."""
        self.received = self.received or number
        if self.busy and not self.trains:
            self.busy = False  # once: what is half-done is cleared up
            raise Stopped(self.received)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """For one job."""
        self.busy, self.trains = True, False
        try:
            self.check()
            yield
        finally:
            self.busy = False

    def check(self) -> None:
        """After a training: go on only if nobody asked to stop."""
        self.trains = False
        if self.received:
            raise Stopped(self.received)


_worker = Worker()


def start_worker(stop: connection.Connection) -> None:
    """In a new process: stop at a message through `stop` or a signal, and end with the process of the study."""
    keep_freed_memory()
    for number in STOPPING:
        signal.signal(number, _worker.notice)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if connection.wait([parent.sentinel], timeout=0):  # it ended while this worker was still importing
        os._exit(1)
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    threading.Thread(target=_stop_with, args=(stop,), daemon=True).start()


def _stop_with(stop: connection.Connection) -> None:
    """Notice in the main thread that the study stops. The message stays in the pipe, for all workers to see."""
    connection.wait([stop])
    _thread.interrupt_main(signal.SIGTERM)


def _end_with(parent: int) -> None:
    """End this worker with the study's process, however that ended; what it was writing is written beside."""
    connection.wait([parent])
    os._exit(1)


def run_batch(tasks: Sequence[Task], worker: Worker = _worker) -> None:
    """Train trials as one batch, evaluate them, and write what the report needs into their folders.

    Raises:
        Stopped: if the worker is asked to stop; what is trained is saved.
    """
    with worker.working(), warnings.catch_warnings(), endless_refused():
        warnings.simplefilter("ignore")
        for task in tasks:
            _wait_for(RunFolder(task.path))
        # Named from the study's folder, which may be copied anywhere.
        data_path = tasks[0].trial.config.data.path
        requested = [(task.config, task.path) for task in tasks]
        results = run_together(requested, worker, data_path=data_path, stiffness=_keeps_stiffness)
        finished: dict[tuple[OtherIntegrator, ...], list[Task]] = {}
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, TrainingDiverged):
                RunFolder(task.path).write_json(FAILED, {"step": result.step, "message": str(result)})
                forget(task)
            elif result is None or result.finished:
                finished.setdefault(task.evaluations, []).append(task)
        worker.check()
        for group in finished.values():
            _keep_results(group)


def _keeps_stiffness(config: RunConfig) -> bool:
    """The stiffness index is of the data alone: one trial of a variant keeps it."""
    return config.training.seed == 0


def _device(config: RunConfig) -> str:
    """Where a trial is evaluated: on a CUDA device if it was trained on one."""
    return "cuda" if config.device.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def _keep_results(tasks: Sequence[Task]) -> None:
    """Of tasks that are trained and want the same evaluations."""
    first, paths = tasks[0], [task.path for task in tasks]
    # The study that the user runs names the model.
    where: dict[str, Any] = {"data": first.config.data.path, "device": _device(first.config), "trust": True}
    evaluate_runs(paths, fields_of="last", keep=[task.keep for task in tasks], **where)
    for other in first.evaluations:
        keep = Keep(times=FRAMES_KEPT, fields=())
        evaluate_runs(paths, method=other.integrator, count=other.substeps, keep=keep, **where)
    for task in tasks:
        trial = task.trial
        about = {"labels": list(trial.labels), "seed": trial.seed, "system": trial.system}
        RunFolder(task.path).write_json(TRIAL, about)
        forget(task)


def _wait_for(folder: RunFolder) -> None:
    """Until a worker of a killed study has let go of a folder."""
    for _ in range(LOCK_SECONDS if folder.path.exists() else 0):
        try:
            with folder.locked():
                return
        except RunFolderError:
            time.sleep(1)


def forget(task: Task) -> None:
    """Remove the files that no part of the report needs."""
    if not task.keep_weights:
        shutil.rmtree(task.path / CHECKPOINTS, ignore_errors=True)
