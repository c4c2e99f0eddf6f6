"""A study from its YAML to its folder: what is not there yet is simulated, trained and evaluated, several at a time."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from squall.config import RunConfig
from squall.run_folder import RunFolder, RunFolderError
from squall.runs import run
from squall.simulation import simulate_to_file
from squall.study import SIZES, TRIAL, Study, StudyFolder, Trial
from squall.systems import SYSTEMS
from squall.trained import evaluate_run
from squall.training import Recorder, TrainingDiverged

__all__ = ["Progress", "part_of", "run_study"]

POLL_SECONDS = 0.5
LOCK_SECONDS = 30
"""How long to wait for a worker of a study that was killed: it ends by itself within a moment."""

FRAMES_KEPT = 101
"""Times at which the fields of a rollout are kept."""

Progress = Callable[[int, int], None]
"""Told of the training steps that are done, and of all."""


def run_study(
    study: Study,
    path: Path | str,
    *,
    workers: int | None = None,
    part: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> list[Trial]:
    """Run every trial that its folder does not hold yet.

    A process that is killed, at any moment, loses nothing: the same call goes on. A training that diverges is a
    result, kept as `failed.json`.

    Args:
        study: what to run.
        path: the folder of the study.
        workers: how many trials at a time, one thread each; as many as there are cores if left out.
        part: (i, n): only the i-th of n parts of the trials, for n machines whose folders are then copied together.
        progress: told of the steps that are done.

    Returns:
        the trials whose training diverged.

    Raises:
        RunFolderError: if the folder holds another study, or another process works on it.
        ValueError: for a part or a number of workers that cannot be.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}, but must be at least 1")
    trials = part_of(study.trials, part)
    folder = StudyFolder(path)
    RunFolder(folder.path).create()
    with RunFolder(folder.path).locked():
        folder.create(study)
        _simulate(folder, study, trials)
        pending = [trial for trial in trials if folder.state(trial) not in ("done", "failed")]
        _run_all(folder, trials, pending, workers, study.keep_weights, progress or (lambda done, total: None))
    return [trial for trial in trials if folder.state(trial) == "failed"]


Item = TypeVar("Item")


def part_of(trials: Sequence[Item], part: tuple[int, int]) -> list[Item]:
    """Every n-th trial, from the i-th on, for part (i, n).

    >>> part_of(["a", "b", "c"], (1, 2)), part_of(["a", "b", "c"], (2, 2))
    (['a', 'c'], ['b'])
    """
    i, n = part
    if not 1 <= i <= n:
        raise ValueError(f"part is {i}/{n}, but must be one of 1/{n} ... {n}/{n}")
    return list(trials[i - 1 :: n])


def _simulate(folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> None:
    for name in dict.fromkeys(trial.system for trial in trials):
        path = folder.path / "data" / f"{name}.hdf5"
        if not path.exists():
            options = dict(study.systems[name])
            system = SYSTEMS[options.pop("name")]
            sizes = {key: options.pop(key) for key in SIZES if key in options}
            simulate_to_file(system(**options), path, **sizes)


def _run_all(
    folder: StudyFolder, trials: Sequence[Trial], pending: Sequence[Trial], workers: int, keep: bool, progress: Progress
) -> None:
    total = sum(trial.config.training.steps for trial in trials)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop,)) as pool:
        jobs: list[Future[None]] = [
            pool.submit(_run_one, trial, _on_one_thread(folder.config(trial)), folder.run(trial).path, keep)
            for trial in pending
        ]
        try:
            while not all(job.done() for job in jobs) and not any(_failed(job) for job in jobs):
                progress(sum(folder.steps_done(trial) for trial in trials), total)
                time.sleep(POLL_SECONDS)
        finally:
            stop.set()  # after an interrupt or an error: every worker saves and stops
            pool.shutdown(cancel_futures=True)
        try:
            for job in jobs:
                job.result()
        except BrokenProcessPool as error:
            raise RunFolderError(
                "a worker was killed, perhaps for memory: give the same command again, with fewer --workers"
            ) from error
    progress(sum(folder.steps_done(trial) for trial in trials), total)


def _failed(job: Future[None]) -> bool:
    return job.done() and not job.cancelled() and job.exception() is not None


def _on_one_thread(config: RunConfig) -> RunConfig:
    device = dataclasses.replace(config.device, threads=1)
    return dataclasses.replace(config, device=device)


# In a worker


class _Stop(Recorder):
    """Asks for a stop when the study is interrupted."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def stopping(self) -> bool:
        return self.event.is_set()


_stop: Recorder = Recorder()


def _start_worker(event: Any) -> None:
    global _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study's own process turns it into a stop
    _stop = _Stop(event)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker with the study's process, however that ended; what it was writing is written beside."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _run_one(trial: Trial, config: RunConfig, path: Path, keep: bool) -> None:
    folder = RunFolder(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = _trained(config, folder)
        except TrainingDiverged as error:
            _free_of_this_machine(folder, trial)
            folder.write_json("failed.json", {"step": error.step, "message": str(error)})
            _forget_weights(folder, keep)
            return
        if result is not None and not result.finished:
            return
        evaluate_run(path, data=config.data.path, fields_of="last")
    _thin(folder)
    _free_of_this_machine(folder, trial)
    folder.write_json(TRIAL, {"labels": list(trial.labels), "seed": trial.seed, "system": trial.system})
    _forget_weights(folder, keep)


def _free_of_this_machine(folder: RunFolder, trial: Trial) -> None:
    """Name the data from the study's folder, which may be copied anywhere."""
    values = folder.read_config()
    values["data"]["path"] = trial.config.data.path
    folder.write_config(values)


def _trained(config: RunConfig, folder: RunFolder) -> Any:
    """Train, once a worker of a killed study has let go of the folder."""
    for _ in range(LOCK_SECONDS if folder.path.exists() else 0):
        try:
            with folder.locked():
                break
        except RunFolderError:
            time.sleep(1)
    return run(config, folder.path, _stop)


def _thin(folder: RunFolder) -> None:
    """Keep the fields and the curves of the rollouts at some of the times, the fields in half precision: they are for
    figures."""
    found = folder.read_json("evaluation.json")
    for item in found["checkpoints"].values():
        item["curves"] = {name: _strided(values) for name, values in item["curves"].items()}
    arrays = folder.read_arrays("rollouts.npz")
    stride = max(1, (len(arrays["time"]) - 1) // (FRAMES_KEPT - 1))
    for name, dtype in {"truth": "f2", "prediction": "f2", "step_error": "f4", "regime": "i1"}.items():
        arrays[name] = arrays[name][:, ::stride].astype(dtype)
    arrays["time"] = arrays["time"][::stride]
    folder.write_arrays("rollouts.npz", **arrays)
    folder.write_json("evaluation.json", found)


def _strided(values: list[Any]) -> list[Any]:
    """About as many of a curve's numbers as times are kept, the last among them; of several curves, so many each."""
    if values and isinstance(values[0], list):
        return [_strided(one) for one in values]
    stride = max(1, len(values) // (FRAMES_KEPT - 1))
    return values[::-1][::stride][::-1]


def _forget_weights(folder: RunFolder, keep: bool) -> None:
    if not keep:
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
