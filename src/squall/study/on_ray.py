"""A study on a Ray cluster: every worker is an actor, on whatever node has room.

No disk is shared. An actor has a temporary folder with a copy of the data. The command sends it the files of a run,
collects those that changed every few seconds and writes them into the study's folder, which so gets every checkpoint.
If the actor or its node dies, the run resumes on another one from the last checkpoint that was collected.
"""

import contextlib
import dataclasses
import importlib
import itertools
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import squall
from squall._process.extras import explain_missing_extra
from squall._process.files import write_beside, write_folder_beside
from squall._process.signals import Stopped
from squall.runs.folder import CHECKPOINTS, RunFolder
from squall.study.folder import FAILED, TRIAL
from squall.study.worker import Task, Worker, Workers, forget, run_batch

ANSWER_SECONDS = 8.0
"""How long an address may take to answer."""

COLLECT_SECONDS = 10.0
"""How often the files of a run are collected. A node that dies loses the work after the last collected checkpoint."""

STOP_SECONDS = 60.0
"""How long a worker that is asked to stop may take to save its training."""

ATTEMPTS = 3
"""How many workers may die over one batch."""

Files = dict[str, bytes]
"""Contents by path relative to the folder that holds the runs."""


class ClusterError(ValueError):
    """A cluster that does not answer, or cannot do what is asked of it."""


@contextlib.contextmanager
def ray_workers(
    count: int | None,
    *,
    address: str | None = None,
    resources: Mapping[str, Any] | None = None,
    collect_seconds: float = COLLECT_SECONDS,
) -> Iterator[Workers]:
    """Workers on a Ray cluster, for the block.

    Args:
        count: how many; as many as the cluster has room for if left out.
        address: of the cluster, as `ray.init` takes it. If left out: RAY_ADDRESS, else the one of this machine.
        resources: what an actor takes, as `ray.remote` takes it, such as `{"num_gpus": 1}`; one CPU if left out.
        collect_seconds: how often the files of a run are collected.

    Raises:
        ClusterError: if the address does not answer, or Ray does not know the resources.
        MissingExtraError: if Ray is not installed.
    """
    with explain_missing_extra():
        ray: Any = importlib.import_module("ray")
    options = {"num_cpus": 1, **(resources or {})}
    try:
        actor = ray.remote(max_concurrency=3, **options)(_Node)  # a run, what is collected of it, and a stop
    except (TypeError, ValueError) as error:
        raise ClusterError(f"Ray refuses the resources {dict(resources or {})}: {_line(error)}") from error
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        size = count or _room(ray.cluster_resources(), options)
        with ThreadPoolExecutor(size, thread_name_prefix="squall") as threads:
            yield _RayWorkers(ray, actor, size, threads, collect_seconds)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    """In a thread: for an address that is silent, `ray.init` waits for minutes."""
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    failures: list[BaseException] = []

    def connect() -> None:
        try:
            if match := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):
                socket.create_connection((match[1], int(match[2])), timeout=ANSWER_SECONDS).close()
            ray.init(address, logging_level="error", log_to_driver=False)
        except Exception as error:  # such as another version of Ray
            failures.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if thread.is_alive() or failures:
        where = "on this machine" if address == "auto" else f"at {address}"
        reason = _line(failures[0]) if failures else f"silent for {ANSWER_SECONDS:.0f} s"
        raise ClusterError(
            f"no Ray cluster that can be used answers {where} ({reason}): start one with `ray start --head`, or give "
            "its --address"
        )


def _room(available: Mapping[str, float], options: Mapping[str, Any]) -> int:
    """How many actors a cluster has room for."""
    shares = (("CPU", options.get("num_cpus", 0)), ("GPU", options.get("num_gpus", 0)))
    return max(1, min((int(available.get(name, 0) / share) for name, share in shares if share), default=1))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# On the machine of the command


class _RayWorkers(Workers):
    """As many actors as threads; each thread leads one, and collects its files every so many seconds."""

    def __init__(self, ray: Any, actor: Any, size: int, threads: ThreadPoolExecutor, seconds: float) -> None:
        self.ray, self.actor, self.size, self.threads, self.seconds = ray, actor, size, threads, seconds
        self.ending, self.actors, self.idle = threading.Event(), set[Any](), list[Any]()
        self.lock, self.data = threading.Lock(), dict[str, Any]()

    def submit(self, batch: Sequence[Task]) -> Future[None]:
        return self.threads.submit(self._run, batch)

    def stop(self) -> None:
        self.ending.set()
        self.threads.shutdown(cancel_futures=True)
        for actor in list(self.actors):
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.get(actor.close.remote(), timeout=ANSWER_SECONDS)
            self._end(actor)

    def _run(self, batch: Sequence[Task]) -> None:
        """Do a batch; again on another actor if one dies over it."""
        reason, actor = "", None
        for _ in range(ATTEMPTS):
            try:
                actor = self._free_actor()
                self._lead(actor, batch)
                return self.idle.append(actor)
            except self.ray.exceptions.RayError as error:
                reason = _line(error)
                if "ModuleNotFoundError" in reason:
                    raise ClusterError(f"a node of the cluster cannot import what the study needs: {reason}") from error
                if isinstance(error, self.ray.exceptions.RayTaskError):  # the code failed, not the cluster
                    raise
                if actor is not None:
                    self._end(actor)
                if self.ending.is_set():
                    raise Stopped(signal.SIGTERM) from error
        raise ClusterError(
            f"{ATTEMPTS} workers died over {batch[0].trial.name}, perhaps for memory. Give the same command again, "
            f"with fewer --workers or a smaller --together. The last of them: {reason}"
        )

    def _free_actor(self) -> Any:
        """An idle actor, or a new one, for which the cluster may have room only later."""
        if idle := self._idle_actor():
            return idle
        actor = self.actor.remote()
        self.actors.add(actor)
        started = actor.changed.remote()
        while not self.ray.wait([started], timeout=0.5)[0]:
            if self.ending.is_set():
                raise Stopped(signal.SIGTERM)
            if idle := self._idle_actor():
                self._end(actor)
                return idle
        self.ray.get(started)
        return actor

    def _idle_actor(self) -> Any:
        """An actor without a batch that is still alive; None without one."""
        while self.idle:
            with contextlib.suppress(IndexError, self.ray.exceptions.RayError):
                actor = self.idle.pop()
                self.ray.get(actor.changed.remote(), timeout=ANSWER_SECONDS)
                return actor
        return None

    def _end(self, actor: Any) -> None:
        self.actors.discard(actor)
        self.ray.kill(actor)

    def _lead(self, actor: Any, batch: Sequence[Task]) -> None:
        """Send a batch to an actor, and collect its files until it is done."""
        runs, data = batch[0].path.parent, Path(batch[0].config.data.path)
        files = {name: content for task in batch for name, content in _read(runs, task.path, {}).items()}
        # In a list Ray hands on the reference: an actor that has the data fetches nothing.
        job = actor.run.remote(squall.__version__, batch, files, data.name, [self._stored(data)])
        due, deadline = time.monotonic() + self.seconds, None
        while not self.ray.wait([job], timeout=min(0.5, self.seconds))[0]:
            now = time.monotonic()
            if deadline is None and self.ending.is_set():
                actor.stop.remote()
                deadline = now + STOP_SECONDS
            elif deadline is not None and now > deadline:
                raise Stopped(signal.SIGTERM)
            if now >= due:
                _write(runs, self.ray.get(actor.changed.remote()))
                due = time.monotonic() + self.seconds
        failure, changed = self.ray.get(job)
        _write(runs, changed)
        if failure is not None:
            raise failure
        for task in batch:
            if task.is_done:
                forget(task)

    def _stored(self, path: Path) -> Any:
        """The content of a data file in Ray's store; put there once."""
        with self.lock:
            if str(path) not in self.data:
                self.data[str(path)] = self.ray.put(path.read_bytes())
            return self.data[str(path)]


# On a node


class _Node:
    """An actor: does one batch at a time in a temporary folder."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="squall-"))
        self.runs = self.root / "runs"
        self.worker = Worker()
        self.collected: dict[str, tuple[int, int]] = {}

    def run(
        self, version: str, batch: Sequence[Task], files: Files, data: str, content: Sequence[Any]
    ) -> tuple[Exception | Stopped | None, Files]:
        """Do a batch from where its files are; return what it failed by, and the files that changed since.

        `version` and the paths of the batch are those of the machine of the command; `content` refers to the data file.
        """
        ray: Any = importlib.import_module("ray")
        if version != squall.__version__:
            text = f"{socket.gethostname()} has squall {squall.__version__}, but the command has {version}"
            return ClusterError(f"{text}: install the same version on every node"), {}
        shutil.rmtree(self.runs, ignore_errors=True)
        _write(self.runs, files)
        self.collected = {}
        _read(self.runs, self.runs, self.collected)
        path = self.root / data
        if not path.exists():
            with write_beside(path) as part:
                part.write_bytes(ray.get(content[0]))
        try:
            run_batch([_moved(task, self.runs, path) for task in batch], self.worker)
        except (Exception, Stopped) as error:
            return error, self.changed()
        return None, self.changed()

    def changed(self) -> Files:
        """The files that changed since the last call."""
        return _read(self.runs, self.runs, self.collected)

    def stop(self) -> None:
        """Have the training saved at its step."""
        self.worker.received = signal.SIGTERM

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.root, ignore_errors=True)


def _moved(task: Task, runs: Path, data: Path) -> Task:
    """A task with the paths of this machine."""
    config = dataclasses.replace(task.config, data=dataclasses.replace(task.config.data, path=str(data)))
    return dataclasses.replace(task, config=config, path=runs / task.path.name)


# Folders as contents


def _read(runs: Path, below: Path, known: dict[str, tuple[int, int]]) -> Files:
    """The files in a folder that are not known in their present state, which then is known.

    Checkpoints are read before the metrics, which must not end before them.
    """
    files: Files = {}
    for place, _, _ in os.walk(below, topdown=False):
        if any(part.startswith(".") for part in Path(place).relative_to(runs).parts):
            continue  # half-written
        new, states = {}, {}
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that was dropped meanwhile
            for path in sorted(Path(place).iterdir()):
                name, status = path.relative_to(runs).as_posix(), path.stat()
                states[name] = status.st_size, status.st_mtime_ns
                if path.is_file() and not path.name.startswith(".") and known.get(name) != states[name]:
                    new[name] = path.read_bytes()
            files |= new
            known |= states
    return files


def _write(runs: Path, files: Files) -> None:
    """Write files of runs: every checkpoint whole or not at all, and last what marks a run as complete."""

    def order(name: str) -> tuple[bool, bool, str, str]:
        folder, _, file = name.rpartition("/")
        return file in (TRIAL, FAILED), folder.count("/") > 0, folder, file

    for run in dict.fromkeys(name.partition("/")[0] for name in files):
        folder = RunFolder(runs / run)
        folder.create()
        with folder.locked():
            own = sorted((name for name in files if name.startswith(f"{run}/")), key=order)
            for place, names in itertools.groupby(own, os.path.dirname):
                contents = {os.path.basename(name): files[name] for name in names}
                if place.startswith(f"{run}/{CHECKPOINTS}/"):
                    write_folder_beside(runs / place, contents)
                    continue
                (runs / place).mkdir(parents=True, exist_ok=True)
                for name, content in contents.items():
                    with write_beside(runs / place / name) as part:
                        part.write_bytes(content)
