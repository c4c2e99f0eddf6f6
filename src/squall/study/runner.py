"""A study from its YAML to its folder: what is not there yet is simulated, trained and evaluated, several at a time."""

import _thread
import contextlib
import dataclasses
import multiprocessing
import os
import secrets
import shutil
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from squall._process.signals import STOPPING, Stopped, held
from squall._process.threads import keep_freed_memory
from squall.evaluation.rollouts import Keep
from squall.runs.config import ConfigError, RunConfig, can_run_together
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import SAMPLING, RunFolder, RunFolderError
from squall.runs.ranks import started
from squall.runs.simulate import SIMULATED, simulate_sphere_to_file, simulate_to_file
from squall.runs.train import run_together
from squall.study.definition import SHOWN_FROM_FIELDS, SIZES, OtherIntegrator, Study, Trial, data_path
from squall.study.folder import FAILED, FINISHED, LEASES, TRIAL, StudyFolder
from squall.study.lease import Leases
from squall.study.outcome import FIELDS
from squall.systems import ShallowWater
from squall.training.loop import Recorder, TrainingDiverged

__all__ = ["Progress", "part_of", "run_study"]

PROGRESS_SECONDS = 2.0
"""How often progress is reported: often enough to watch, rarely enough that reading the folders costs little."""
LOOKS = 8
"""Batches held by others that are looked at before the next pause, so that waiting costs a shared disk little."""

LOCK_SECONDS = 30
"""How long to wait for a worker of a study that was killed: it ends on its own within seconds."""

FRAMES_KEPT = 101
"""Times at which the fields and curves of a rollout are kept."""

Progress = Callable[[int, int], None]
"""Called with the number of finished training steps and their total."""


def run_study(
    study: Study,
    path: Path | str,
    *,
    workers: int | None = None,
    together: int = 1,
    part: tuple[int, int] = (1, 1),
    grids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Trial]:
    """Run every trial that its folder does not hold yet.

    The same call may run many times at once, on one machine or on several that share the disk: they divide the trials
    by leases, and each returns when all are done. After a kill at any moment, the same call resumes the study. A
    training that diverges is a result, kept as `failed.json`. An exception such as KeyboardInterrupt, and a signal to a
    worker, has every worker save its training at the step.

    Args:
        study: what to run.
        path: the folder of the study.
        workers: how many processes, one thread each; as many as there are cores if left out.
        together: how many trials a process trains at once as one batched computation, where they differ only by
            seed, loss and sampling; meant for a GPU.
        part: (i, n): only the i-th of n parts of the trials, for n machines whose folders are then copied together.
        grids: only the trials of these; of all grids if left out.
        progress: called with the number of finished steps and their total.

    Returns:
        the trials whose training diverged.

    Raises:
        RunFolderError: if the folder holds another study, or other processes took over what this one held.
        ConfigError: if the study has no such grid, or torchrun started this process.
        ValueError: for a part or a number of workers that cannot be.
        squall._process.signals.Stopped: if a worker was asked to stop.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    for name, value in (("workers", workers), ("together", together)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if started():
        raise ConfigError(
            "a study trains each run in one process and several runs at a time: start `squall study run` without "
            "torchrun, and choose --workers"
        )
    trials = part_of(study.trials if grids is None else study.trials_of(grids), part)
    folder = StudyFolder(path)
    folder.refuse_other(study)
    RunFolder(folder.path).create()
    leases = Leases(folder.path / LEASES)
    with leases.waiting("study"):
        folder.create(study)
    to_run = [trial for trial in trials if not folder.only_packed(trial)]
    _simulate(leases, folder, study, to_run)
    pending = _pending([_task(study, folder, trial) for trial in to_run], folder)
    count = _Count(folder, trials, progress or (lambda done, total: None))
    _run_all(leases, _batches(pending, together), workers, count)
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


def _pending(tasks: Sequence["_Task"], folder: StudyFolder) -> list["_Task"]:
    """What is not there yet: trainings, and evaluations that a grown study asks for where the weights were kept."""
    pending, lacking = [], []
    for task in tasks:
        state = folder.state(task.trial)
        if state not in ("done", "failed"):
            pending.append(task)
        elif state == "done" and not all(RunFolder(task.path).has(name) for name in task.wanted):
            kept = RunFolder(task.path).checkpoint_steps("last")
            (pending if kept else lacking).append(task)
        else:
            _forget(task)  # a kill may have come before
    if lacking:
        names = ", ".join(task.trial.name for task in lacking)
        warnings.warn(
            f"the study asks for more of {len(lacking)} trials that are done, whose weights are gone: {names}. The "
            "report shows what there is; remove their folders to run them again",
            stacklevel=3,
        )
    return pending


def _simulate(leases: Leases, folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> None:
    for name in dict.fromkeys(trial.system for trial in trials):
        options = dict(study.systems[name])
        path = folder.path / data_path(name, options)
        halves = f".{path.name}.*.part"
        if path.exists() and not any(path.parent.glob(halves)):
            continue
        with leases.waiting(f"data {name}"):
            for half in path.parent.glob(halves):  # of a study that was killed
                half.unlink()
            if path.name in os.listdir(path.parent):
                continue
            system = SIMULATED[options.pop("name")]
            sizes = {key: options.pop(key) for key in SIZES if key in options}
            made = system(**options)
            if isinstance(made, ShallowWater):
                simulate_sphere_to_file(made, path, **sizes)
            else:
                simulate_to_file(made, path, **sizes)


@dataclass(frozen=True)
class _Task:
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
        names = [f"{name}.json" for name in ("evaluation", *self.others)]
        if self.shown & SHOWN_FROM_FIELDS:
            names.append(FIELDS)
        if "sampling" in self.shown and self.config.sampling.name != "uniform" and self.trial.seed == 0:
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

    @property
    def others(self) -> list[str]:
        """The names of the evaluations by other integrators, without their ending."""
        return [f"evaluation{other.suffix}" for other in self.evaluations]


def _task(study: Study, folder: StudyFolder, trial: Trial) -> _Task:
    shown = frozenset(study.shown(trial))
    evaluations = tuple(study.evaluations.values()) if "integrators" in shown else ()
    config = _on_one_thread(folder.config(trial))
    return _Task(trial, config, folder.run(trial).path, evaluations, shown, study.keep_weights)


def _batches(tasks: Sequence[_Task], together: int) -> list[list[_Task]]:
    """Tasks that are trained as one, at most so many at once, in the order of their first."""
    alike: list[list[_Task]] = []
    for task in tasks:
        for group in alike:
            if len(group) < together and can_run_together(group[0].config, task.config):
                group.append(task)
                break
        else:
            alike.append([task])
    return alike


class _Count:
    """Tells the finished training steps, and asks the disk seldom: of what is finished only once."""

    def __init__(self, folder: StudyFolder, trials: Sequence[Trial], progress: Progress) -> None:
        self.folder, self.progress, self.trials = folder, progress, list(trials)
        self.total = sum(trial.config.training.steps for trial in trials)
        self.finished, self.next = 0, 0.0

    def tell(self, *, now: bool = False) -> None:
        begin = time.monotonic()
        if begin < self.next and not now:
            return
        going = 0
        for trial in list(self.trials):
            if self.folder.state(trial) in FINISHED:
                self.trials.remove(trial)
                self.finished += trial.config.training.steps
            else:
                going += self.folder.steps_done(trial)
        self.progress(self.finished + going, self.total)
        end = time.monotonic()
        self.next = end + max(PROGRESS_SECONDS, 100 * (end - begin))


def _run_all(leases: Leases, batches: Sequence[list[_Task]], workers: int, count: _Count) -> None:
    context = multiprocessing.get_context("spawn")
    with held():  # also from the process that tracks what is shared
        stop = context.Event()
    left, running, failed = _rotated(batches), dict[Future[None], list[_Task]](), list[Future[None]]()
    with (
        leases.beating(),
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop,)) as pool,
    ):
        try:
            while (left or running) and not failed:
                while len(running) < workers and (batch := _next(leases, left)):
                    with held():  # the pool may start a worker here: until it can take signals
                        running[pool.submit(_run_batch, batch)] = batch
                count.tell()
                done = wait(running, PROGRESS_SECONDS, FIRST_COMPLETED).done if running else set()
                for job in done:
                    _release(leases, running.pop(job))
                failed = [job for job in done if _failed(job)]
                if left and not running:
                    time.sleep(PROGRESS_SECONDS)  # others hold what is left
                _refuse_lost(leases)
        finally:
            stop.set()  # after an interrupt or an error: every worker saves and stops
            pool.shutdown(cancel_futures=True)
            for batch in running.values():
                _release(leases, batch)
        try:
            for job in (*failed, *running):
                if not job.cancelled():
                    job.result()
        except BrokenProcessPool as error:
            raise RunFolderError(
                "a worker was killed, perhaps for memory: give the same command again, with fewer --workers or a "
                "smaller --together"
            ) from error
    count.tell(now=True)


def _rotated(batches: Sequence[list[_Task]]) -> deque[list[_Task]]:
    """From a random one on, so that processes that begin together meet seldom. No result depends on the order."""
    queue = deque(batches)
    queue.rotate(-secrets.randbelow(max(1, len(queue))))
    return queue


def _next(leases: Leases, left: deque[list[_Task]]) -> list[_Task]:
    """The first batch of which this process gets a part; none if others hold what was looked at."""
    for _ in range(min(len(left), LOOKS)):
        mine, held = list[_Task](), list[_Task]()
        while left and not (mine or held):
            for task in left.popleft():
                if task.is_done:
                    continue
                if not leases.claim(task.trial.name):
                    held.append(task)
                elif task.is_done:  # by whoever held it until now
                    leases.release(task.trial.name, done=True)
                else:
                    mine.append(task)
        if held:
            left.append(held)
        if mine:
            return mine
    return []


def _release(leases: Leases, batch: Sequence[_Task]) -> None:
    for task in batch:
        leases.release(task.trial.name, done=task.is_done)


def _refuse_lost(leases: Leases) -> None:
    if leases.taken:
        raise RunFolderError(
            f"other processes took over {', '.join(leases.taken)}: nothing was heard of this one for "
            f"{leases.expiry:.0f} s, as if it was suspended or cut off from the disk. Give the same command again"
        )


def _failed(job: Future[None]) -> bool:
    return job.done() and not job.cancelled() and job.exception() is not None


def _on_one_thread(config: RunConfig) -> RunConfig:
    device = dataclasses.replace(config.device, threads=1)
    return dataclasses.replace(config, device=device)


# In a worker


class _Worker(Recorder):
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


_worker = _Worker()


def _start_worker(event: Any) -> None:
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
    threading.Thread(target=_stop_with, args=(event,), daemon=True).start()


def _stop_with(event: Any) -> None:
    """Notice in the main thread that the study stops."""
    event.wait()
    _thread.interrupt_main(signal.SIGTERM)


def _end_with(parent: int) -> None:
    """End this worker with the study's process, however that ended; what it was writing is written beside."""
    connection.wait([parent])
    os._exit(1)


def _run_batch(tasks: Sequence[_Task]) -> None:
    with _worker.working(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in tasks:
            _wait_for(RunFolder(task.path))
        # Named from the study's folder, which may be copied anywhere.
        data_path = tasks[0].trial.config.data.path
        results = run_together([(task.config, task.path) for task in tasks], _worker, data_path=data_path)
        finished: dict[tuple[OtherIntegrator, ...], list[_Task]] = {}
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, TrainingDiverged):
                _keep_failure(task, result)
            elif result is None or result.finished:
                finished.setdefault(task.evaluations, []).append(task)
        _worker.check()
        for group in finished.values():
            _keep_results(group)


def _device(config: RunConfig) -> str:
    """Where a trial is evaluated: on a CUDA device if it was trained on one."""
    return "cuda" if config.device.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def _keep_failure(task: _Task, error: TrainingDiverged) -> None:
    folder = RunFolder(task.path)
    folder.write_json(FAILED, {"step": error.step, "message": str(error)})
    _forget(task)


def _keep_results(tasks: Sequence[_Task]) -> None:
    """Of tasks that are trained and want the same evaluations."""
    first, paths = tasks[0], [task.path for task in tasks]
    # The study that the user runs names the model.
    where: dict[str, Any] = {"data": first.config.data.path, "device": _device(first.config), "trust": True}
    evaluate_runs(paths, fields_of="last", keep=[task.keep for task in tasks], **where)
    for other in first.evaluations:
        keep = Keep(times=FRAMES_KEPT, fields=())
        evaluate_runs(paths, method=other.integrator, count=other.substeps, keep=keep, **where)
    for task in tasks:
        _keep_result(task)


def _keep_result(task: _Task) -> None:
    folder, trial = RunFolder(task.path), task.trial
    folder.write_json(TRIAL, {"labels": list(trial.labels), "seed": trial.seed, "system": trial.system})
    _forget(task)


def _wait_for(folder: RunFolder) -> None:
    """Until a worker of a killed study has let go of a folder."""
    for _ in range(LOCK_SECONDS if folder.path.exists() else 0):
        try:
            with folder.locked():
                return
        except RunFolderError:
            time.sleep(1)


def _forget(task: _Task) -> None:
    """Remove what no part of the report needs."""
    if not task.keep_weights:
        shutil.rmtree(task.path / "checkpoints", ignore_errors=True)
    if task.trial.seed != 0:  # the index is of the data alone
        (task.path / SAMPLING).unlink(missing_ok=True)
