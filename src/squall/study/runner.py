"""A study from its YAML to its folder: what is not there yet is simulated, trained and evaluated, several at a time."""

import contextlib
import dataclasses
import multiprocessing
import os
import secrets
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from squall._process.signals import handled, held
from squall.runs.config import ConfigError, can_run_together
from squall.runs.folder import RunFolder, RunFolderError
from squall.runs.ranks import started
from squall.runs.simulate import SIMULATED, simulate_sphere_to_file, simulate_to_file
from squall.study.definition import SIZES, Study, Trial, data_path
from squall.study.estimate import refuse_too_long
from squall.study.folder import FINISHED, LEASES, StudyFolder
from squall.study.lease import Leases
from squall.study.worker import Task, Worker, Workers, forget, run_batch, start_worker
from squall.systems import ShallowWater

PROGRESS_SECONDS = 2.0
"""How often progress is reported: often enough to watch, rarely enough that reading the folders costs little."""
LOOKS = 8
"""Batches held by others that are looked at before the next pause, so that waiting costs a shared disk little."""

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
    hours: float | None = None,
    progress: Progress | None = None,
    on: Callable[[int | None], AbstractContextManager[Workers]] | None = None,
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
        hours: the time there is for the trainings; an estimate is made first, on this machine.
        progress: called with the number of finished steps and their total.
        on: opens that many workers elsewhere, such as `on_ray.ray_workers`; processes of this machine if left out.

    Returns:
        the trials whose training diverged.

    Raises:
        RunFolderError: if the folder holds another study, or other processes took over what this one held.
        ConfigError: if the study has no such grid, a file of data is missing, the trainings need more than the hours
            there are, or torchrun started this process.
        ValueError: for a part or a number of workers that cannot be.
        squall._process.signals.Stopped: if a worker was asked to stop.
    """
    for name, value in (("workers", workers), ("together", together)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if started():
        raise ConfigError(
            "a study trains each run in one process and several runs at a time: start `squall study run` without "
            "torchrun, and choose --workers"
        )
    trials = part_of(study.trials if grids is None else study.trials_of(grids), part)
    folder = StudyFolder(path)
    folder.refuse_other(study)
    _refuse_missing_data(folder, study, [trial for trial in trials if not folder.only_packed(trial)])
    with (on or _processes)(workers) as pool:
        RunFolder(folder.path).create()
        leases = Leases(folder.path / LEASES)
        with leases.waiting("study"):
            folder.create(study)
        to_run = [trial for trial in trials if not folder.only_packed(trial)]
        _simulate(leases, folder, study, to_run)
        pending = _pending([_task(study, folder, trial) for trial in to_run], folder, leases)
        batches = _batches(pending, together)
        if hours is not None:
            refuse_too_long(batches, pool.size, hours)
        count = _Count(folder, trials, progress or (lambda done, total: None))
        _run_all(leases, batches, pool, count)
    return [trial for trial in trials if folder.state(trial) == "failed"]


Item = TypeVar("Item")


def part_of(trials: Sequence[Item], part: tuple[int, int]) -> list[Item]:
    """Every n-th trial, from the i-th on, for part (i, n).

    >>> part_of(["a", "b", "c"], (1, 2)), part_of(["a", "b", "c"], (2, 2))
    (['a', 'c'], ['b'])
    """
    i, n = part
    if not 1 <= i <= n:
        raise ValueError(f"part is {i}/{n}, but must be i/n with 1 <= i <= n")
    return list(trials[i - 1 :: n])


def _pending(tasks: Sequence[Task], folder: StudyFolder, leases: Leases) -> list[Task]:
    """What is not there yet: trainings, and evaluations that a grown study asks for where the weights were kept."""
    pending, lacking, begun = [], [], folder.begun() | folder.packed.keys()
    for task in tasks:
        state = folder.state(task.trial) if task.trial.name in begun else "missing"
        if state not in FINISHED:
            pending.append(task)
        elif state == "done" and not all(RunFolder(task.path).has(name) for name in task.wanted):
            kept = RunFolder(task.path).checkpoint_steps("last")
            (pending if kept else lacking).append(task)
        else:
            forget(task)  # a kill may have come before
            leases.clear(task.trial.name)
    if lacking:
        names = ", ".join(task.trial.name for task in lacking)
        warnings.warn(
            f"the study asks for more of {len(lacking)} trials that are done, whose weights are gone: {names}. The "
            "report shows what there is; remove their folders to run them again",
            stacklevel=3,
        )
    return pending


def _refuse_missing_data(folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> None:
    """Of the files that the user names; the folder of the study may not exist yet."""
    for trial in trials:
        path = os.path.normpath(folder.path / trial.config.data.path)
        if trial.system not in study.systems and not os.path.exists(path):
            raise ConfigError(
                f"'{trial.name}' has data.path {trial.config.data.path}, but there is no {path}: give an absolute "
                "path, or one relative to the folder of the study"
            )


def _simulate(leases: Leases, folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> None:
    for name in dict.fromkeys(trial.system for trial in trials if trial.system in study.systems):
        options = dict(study.systems[name])
        path = folder.path / data_path(name, options)
        if path.exists():
            leases.clear(f"data {name}")
            continue
        with leases.waiting(f"data {name}"):
            if path.name in os.listdir(path.parent):
                continue
            system = SIMULATED[options.pop("name")]
            sizes = {key: options.pop(key) for key in SIZES if key in options}
            made = system(**options)
            if isinstance(made, ShallowWater):
                simulate_sphere_to_file(made, path, **sizes)
            else:
                simulate_to_file(made, path, **sizes)


def _task(study: Study, folder: StudyFolder, trial: Trial) -> Task:
    shown = frozenset(study.shown(trial))
    evaluations = tuple(study.evaluations.values()) if "integrators" in shown else ()
    config = folder.config(trial)
    config = dataclasses.replace(config, device=dataclasses.replace(config.device, threads=1))
    return Task(trial, config, folder.run(trial).path, evaluations, shown, study.keep_weights)


def _batches(tasks: Sequence[Task], together: int) -> list[list[Task]]:
    """Tasks that are trained as one, at most so many at once, in the order of their first."""
    alike: list[list[Task]] = []
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
        going, begun = 0, self.folder.begun() | self.folder.packed.keys()
        for trial in [trial for trial in self.trials if trial.name in begun]:
            if self.folder.state(trial) in FINISHED:
                self.trials.remove(trial)
                self.finished += trial.config.training.steps
            else:
                going += self.folder.steps_done(trial)
        self.progress(self.finished + going, self.total)
        end = time.monotonic()
        self.next = end + max(PROGRESS_SECONDS, 100 * (end - begin))


@contextlib.contextmanager
def _processes(count: int | None) -> Iterator[Workers]:
    """Workers on this machine, one process each; this process alone where processes can share nothing."""
    size, context = count or os.cpu_count() or 1, multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        try:
            reader, writer = map(
                stack.enter_context, context.Pipe(duplex=False)
            )  # an event would wait for killed workers
            with held():  # also from the process that tracks what is shared
                pool = ProcessPoolExecutor(size, mp_context=context, initializer=start_worker, initargs=(reader,))
            stack.enter_context(pool)
        except (OSError, ImportError, NotImplementedError) as error:  # such as no room in /dev/shm
            warnings.warn(f"no workers can be started ({error}): trials run one after another", stacklevel=3)
            yield _Here()
        else:
            yield _Processes(size, pool, lambda: writer.send("stop"))


class _Here(Workers):
    """One worker, which is this process."""

    size = 1

    def submit(self, batch: Sequence[Task]) -> Future[None]:
        job, worker = Future[None](), Worker()
        with handled(worker.notice):
            try:
                job.set_result(run_batch(batch, worker))
            except BaseException as error:
                job.set_exception(error)
        return job

    def stop(self) -> None:
        pass


@dataclasses.dataclass
class _Processes(Workers):
    size: int
    pool: ProcessPoolExecutor
    tell: Callable[[], None]

    def submit(self, batch: Sequence[Task]) -> Future[None]:
        with held():  # the pool may start a worker here: until it can take signals
            return self.pool.submit(run_batch, batch)

    def stop(self) -> None:
        self.tell()
        self.pool.shutdown(cancel_futures=True)


def _run_all(leases: Leases, batches: Sequence[list[Task]], pool: Workers, count: _Count) -> None:
    left, running, failed = deque(batches), dict[Future[None], list[Task]](), list[Future[None]]()
    left.rotate(-secrets.randbelow(max(1, len(left))))  # processes that begin together meet seldom
    with leases.beating():
        try:
            while (left or running) and not failed:
                while len(running) < pool.size and (batch := _next(leases, left)):
                    running[pool.submit(batch)] = batch
                count.tell()
                if left and not running:
                    time.sleep(PROGRESS_SECONDS)  # others hold what is left
                done = wait(running, PROGRESS_SECONDS, FIRST_COMPLETED).done if running else set()
                for job in done:
                    _release(leases, running.pop(job))
                failed = [job for job in done if not job.cancelled() and job.exception() is not None]
                _refuse_lost(leases)
        finally:
            pool.stop()  # after an interrupt or an error: every worker saves and stops
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


def _next(leases: Leases, left: deque[list[Task]]) -> list[Task]:
    """The first batch of which this process gets a part; none if others hold what was looked at."""
    for _ in range(min(len(left), LOOKS)):
        mine, held = list[Task](), list[Task]()
        while left and not (mine or held):
            for task in left.popleft():
                if task.is_done:
                    leases.clear(task.trial.name)
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


def _release(leases: Leases, batch: Sequence[Task]) -> None:
    for task in batch:
        leases.release(task.trial.name, done=task.is_done)


def _refuse_lost(leases: Leases) -> None:
    if leases.taken:
        raise RunFolderError(
            f"other processes took over {', '.join(leases.taken)}: nothing was heard of this one for "
            f"{leases.expiry:.0f} s, as if it was suspended or cut off from the disk. Give the same command again"
        )
