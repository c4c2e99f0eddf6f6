"""A run from its configuration to its folder: trained, interrupted, resumed."""

import contextlib
import dataclasses
import functools
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from squall._process.threads import threads
from squall._types import Validation
from squall.data import Split, Transitions
from squall.evaluation.rollouts import RolloutValidation
from squall.runs.build import Experiment, build, sampler_of
from squall.runs.config import ConfigError, RunConfig, can_run_together, difference, to_dict
from squall.runs.folder import SAMPLING, Kind, RunFolder, RunFolderError, fingerprint
from squall.training.batched import Member, train_together
from squall.training.loop import Checkpoint, Recorder, TrainingDiverged, TrainingResult, train
from squall.training.sampling import Sampler, StiffnessAwareSampler

if TYPE_CHECKING:
    from lightning_fabric import Fabric
else:  # slow to import; whoever trains has it imported
    Fabric = Any

__all__ = ["run", "run_together"]

TYPES = {"32-true": torch.float32, "64-true": torch.float64}


def run(config: RunConfig, path: Path | str, watcher: Recorder | None = None) -> TrainingResult | None:
    """Train what a configuration says, into a folder; go on where an interrupted run stopped.

    Args:
        config: the configuration.
        path: the run folder; made if it is not there.
        watcher: is told of every step and line of metrics, and can ask for a stop.

    Returns:
        the result, or None if the folder holds the finished run already.

    Raises:
        RunFolderError: if the folder holds a run of another configuration or of other data; the difference
            is in the message.
        TrainingDiverged: with the last good checkpoint in a note.
    """
    prepared = _prepare(config, path)
    experiment, fabric = prepared.experiment, prepared.fabric
    with threads(config.device.threads), prepared.opened():
        if _finished(prepared.folder, config.training.steps):
            return None
        recorder = prepared.recorder(watcher)
        try:
            return train(
                experiment.model,
                prepared.transitions,
                config.training,
                sampler=prepared.sampler,
                substeps=prepared.substeps,
                loss=experiment.loss,
                step=experiment.step,
                scale=experiment.normalization.std,
                validate=_validation(experiment),
                recorder=recorder,
                fabric=fabric,
            )
        except TrainingDiverged as error:
            error.add_note(recorder.last_good)
            raise


def run_together(
    asked: Sequence[tuple[RunConfig, Path | str]], watcher: Recorder | None = None
) -> list[TrainingResult | TrainingDiverged | None]:
    """Train several configurations as one batched computation, into a folder each: see `config.can_run_together`.

    Every run ends where `run` would have brought it, to rounding. One alone is left to `run`.

    Args:
        asked: the configurations and their run folders.
        watcher: is told of every step and line of metrics, and can ask for a stop.

    Returns:
        for each its result, what its training diverged by, or None if its folder holds the finished run already.

    Raises:
        ValueError: for configurations that cannot be run together.
        RunFolderError: as `run`.
    """
    if not asked:
        return []
    if len(asked) == 1:
        try:
            return [run(*asked[0], watcher)]
        except TrainingDiverged as error:
            return [error]
    if odd := [path for config, path in asked if not can_run_together(asked[0][0], config)]:
        raise ValueError(
            f"{odd[0]} cannot be trained together with {asked[0][1]}: runs that can differ only by seed, loss and "
            "sampling, and have no substeps and one full precision"
        )
    prepared: list[_Prepared] = []
    for config, path in asked:
        prepared.append(_prepare(config, path, prepared[0].experiment.split if prepared else None))
    found: list[TrainingResult | TrainingDiverged | None] = [None] * len(prepared)
    with threads(asked[0][0].device.threads), contextlib.ExitStack() as stack:
        for one in prepared:
            stack.enter_context(one.opened())
        for group in _by_step(prepared):
            for i, result in zip(group, _train_together([prepared[i] for i in group], watcher), strict=True):
                found[i] = result
    return found


def _by_step(prepared: Sequence["_Prepared"]) -> list[list[int]]:
    """Those that are not finished, by the step at which they stand: a kill may have fallen between two checkpoints."""
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(prepared):
        checkpoint = one.folder.load("last")
        step = checkpoint.step if checkpoint else 0
        if step < one.experiment.config.training.steps:
            groups.setdefault(step, []).append(i)
    return list(groups.values())


def _train_together(
    prepared: Sequence["_Prepared"], watcher: Recorder | None
) -> list[TrainingResult | TrainingDiverged]:
    first = prepared[0]
    members = [
        Member(
            one.experiment.model.to(TYPES[one.experiment.config.device.precision]),
            one.experiment.loss,
            one.sampler,
            _validation(one.experiment),
            one.recorder(watcher),
        )
        for one in prepared
    ]
    return train_together(
        members,
        first.transitions,
        first.experiment.config.training,
        step=first.experiment.step,
        scale=first.experiment.normalization.std,
        device=first.fabric.device,
    )


@dataclass(frozen=True)
class _Prepared:
    """A configuration with its folder, as objects, before anything is written."""

    folder: RunFolder
    experiment: Experiment
    transitions: Transitions
    sampler: Sampler
    fabric: Fabric

    @property
    def substeps(self) -> Tensor | None:
        """How many steps cover dt, for every transition; None if one does."""
        if not isinstance(self.sampler, StiffnessAwareSampler):
            return None
        return 1 + self.sampler.is_stiff * (self.experiment.config.sampling.substeps - 1)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder, made and described, against other processes."""
        first = self.fabric.is_global_zero
        if first:
            self.folder.create()
        self.fabric.barrier()
        with self.folder.locked() if first else contextlib.nullcontext():
            if first:
                _describe(self)
            yield

    def recorder(self, watcher: Recorder | None) -> "_FolderRecorder":
        return _FolderRecorder(self.folder, watcher or Recorder(), self.fabric)


def _prepare(config: RunConfig, path: Path | str, split: Split | None = None) -> _Prepared:
    folder = RunFolder(path)
    config = _with_absolute_path(config)
    _refuse_other(folder, config)
    experiment = build(config, split=split)
    transitions = Transitions(experiment.split.train)
    sampler = sampler_of(experiment, transitions)
    fabric = _fabric(config, folder)
    fabric.launch()
    return _Prepared(folder, experiment, transitions, sampler, fabric)


def _with_absolute_path(config: RunConfig) -> RunConfig:
    """So that the run can be evaluated from any folder."""
    if not config.data.path:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=os.path.realpath(config.data.path)))


def _validation(experiment: Experiment) -> RolloutValidation | None:
    source = experiment.split.validation
    return RolloutValidation(source, experiment.step, experiment.normalization.std) if source.trajectories else None


def _refuse_other(folder: RunFolder, config: RunConfig) -> None:
    """A folder belongs to one configuration and one data set."""
    if not folder.has("config.yaml"):
        if folder.path.is_dir() and any(not path.name.startswith(".") for path in folder.path.iterdir()):
            raise RunFolderError(f"{folder.path} is not empty and no run folder: choose another folder")
        return
    lines = [line for line in difference(folder.read_config(), to_dict(config)) if not line.startswith("data.path:")]
    if lines:
        raise RunFolderError(
            f"{folder.path} holds a run of another configuration (there -> asked for):\n  "
            + "\n  ".join(lines)
            + "\nChoose another folder, or the configuration that is there"
        )
    if folder.has("environment.json") and Path(config.data.path).exists():
        before, now = folder.read_json("environment.json").get("data"), fingerprint(config.data.path)
        if before != now:
            raise RunFolderError(
                f"{folder.path} holds a run on other data: {config.data.path} has changed since "
                f"({before} -> {now}). Choose another folder, or bring the data back"
            )


def _finished(folder: RunFolder, steps: int) -> bool:
    checkpoint = folder.load("last")
    return checkpoint is not None and checkpoint.step == steps


def _fabric(config: RunConfig, folder: RunFolder) -> Fabric:
    from lightning_fabric import Fabric

    loggers = []
    if config.tensorboard:
        try:
            from lightning_fabric.loggers.tensorboard import TensorBoardLogger

            loggers.append(TensorBoardLogger(root_dir=folder.path, name="tensorboard", version=""))
        except ImportError as error:
            raise ConfigError(
                "tensorboard is true, but it is not installed: pip install 'squall[tensorboard]'"
            ) from error
    device = config.device
    try:
        return Fabric(
            accelerator=device.accelerator,
            devices=device.devices,
            strategy=device.strategy,
            precision=device.precision,
            loggers=loggers,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the settings under 'device' cannot be used here: {error}") from error


def _describe(prepared: _Prepared) -> None:
    """What is needed to understand the run years later."""
    folder, experiment, fabric = prepared.folder, prepared.experiment, prepared.fabric
    config = experiment.config
    if not folder.has("config.yaml"):
        folder.write_config(to_dict(config))
    packages = ("squall", "torch", "numpy", "scipy", "h5py", "lightning-fabric", "numba")
    if not folder.has("normalization.json"):
        folder.write_json("normalization.json", experiment.normalization.to_dict())
    environment = {
        "commit": _commit(),
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "threads": torch.get_num_threads(),
        "seed": config.training.seed,
        "data": fingerprint(config.data.path),
        "trajectories": {name: part.trajectories for name, part in experiment.split._asdict().items()},
        "parameters": sum(p.numel() for p in experiment.model.parameters()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if not folder.has("environment.json"):
        folder.write_json("environment.json", environment)
    if isinstance(prepared.sampler, StiffnessAwareSampler) and not folder.has(SAMPLING):
        trajectories = experiment.split.train.trajectories
        index, stiff = (
            x.reshape(trajectories, -1).numpy() for x in (prepared.sampler.index, prepared.sampler.is_stiff)
        )
        folder.write_arrays(SAMPLING, index=index.astype("f4"), stiff=stiff, dt=np.array(prepared.transitions.dt))


def _version(package: str) -> str | None:
    """Of an installed package: whether numba is there decides by which passes the loss computes."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str | None:
    """The commit of squall's own sources, where they are a checkout; of a copy of one, SQUALL_COMMIT may tell."""
    if told := os.environ.get("SQUALL_COMMIT"):
        return told
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class _FolderRecorder(Recorder):
    """Writes a training into its run folder, from the first process only, and tells whoever else watches."""

    def __init__(self, folder: RunFolder, watcher: Recorder, fabric: Fabric) -> None:
        self.folder, self.watcher, self.fabric = folder, watcher, fabric
        self.saved_step: int | None = None

    def resume(self) -> Checkpoint | None:
        checkpoint = self.folder.load("last")
        self.saved_step = checkpoint and checkpoint.step
        if self.fabric.is_global_zero:
            self.folder.rewind_metrics(self.saved_step or 0)
        self.watcher.stepped(self.saved_step or 0)
        return checkpoint

    def resume_best(self) -> Checkpoint | None:
        return self.folder.load("best")

    @property
    def last_good(self) -> str:
        saved = "none yet" if self.saved_step is None else f"step {self.saved_step}"
        return f"The last good checkpoint: {saved}, in {self.folder.path}"

    def stopping(self) -> bool:
        return self.watcher.stopping()

    def stepped(self, step: int) -> None:
        self.watcher.stepped(step)

    def logged(self, metrics: dict[str, Any]) -> None:
        self.watcher.logged(metrics)
        if self.fabric.is_global_zero:
            self.folder.append_metrics(metrics)
        self.fabric.log_dict(_flat(metrics), step=metrics["step"])

    def saved(self, checkpoint: Checkpoint) -> None:
        self._save("last", checkpoint)
        self.saved_step = checkpoint.step

    def improved(self, checkpoint: Checkpoint, validation: Validation) -> None:
        self._save("best", checkpoint)

    def _save(self, kind: Kind, checkpoint: Checkpoint) -> None:
        if self.fabric.is_global_zero:
            self.folder.save(kind, checkpoint)


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = float(value)
    return found
