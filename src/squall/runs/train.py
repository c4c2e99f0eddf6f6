"""A run from its configuration to its folder: trained, interrupted, resumed."""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from squall._process.threads import threads
from squall._types import Score, Validation
from squall.data import Split
from squall.runs.build import Experiment, build, model_source, with_inputs_named
from squall.runs.config import RunConfig, can_run_together, difference, flat, to_dict, with_defaults
from squall.runs.description import write_description
from squall.runs.folder import SAMPLING, Kind, RunFolder, RunFolderError, fingerprint, refuse_unsavable
from squall.runs.ranks import agreed, joined, refuse_other_count, stopping_together
from squall.runs.record import recorded, sealed
from squall.runs.start import Start
from squall.training.batched import Member, train_together
from squall.training.loop import Checkpoint, Recorder, TrainingDiverged, TrainingResult, refuse_shared, train
from squall.training.sampling import StiffnessAwareSampler
from squall.training.settings import adam
from squall.training.sharded import refuse_unshardable
from squall.training.state import load_optimizer, load_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric
else:  # slow to import; whoever trains has it imported
    Fabric = Any

SAME_BITS = ("commit", "versions", "cpu", "device", "processes", "threads")
"""What of environment.json decides how a training rounds."""

PLACES = ("data.path:", "device.devices:", "device.strategy:")
"""What of a configuration says where the data are and how many processes train, and may change when a run goes on."""

SEGMENT = (*SAME_BITS, "platform", "started")
"""What is kept of how a training that went on was trained before."""


@stopping_together()
def run(
    config: RunConfig,
    path: Path | str,
    watcher: Recorder | None = None,
    *,
    data_path: str | None = None,
    init: Path | str | None = None,
    stiffness: bool = True,
) -> TrainingResult | None:
    """Train what a configuration says, into a folder; go on where an interrupted run stopped.

    A run of which only `training.steps` is larger than before is continued.

    Args:
        config: the configuration.
        path: the run folder; made if it is not there.
        watcher: receives every step and line of metrics, and can ask for a stop.
        data_path: the path of the data that config.yaml records; the absolute one if left out, so that the run can be
            evaluated from any folder.
        init: a run folder whose best weights (without a best one its last) and normalization this run starts from.
        stiffness: whether to write the stiffness index of the transitions, where the sampling uses one.

    Returns:
        the result, or None if the folder holds the finished run already.

    Raises:
        RunFolderError: if the folder holds a run of another configuration, of other data or from other weights; the
            difference is in the message.
        ConfigError: if the weights of `init` do not fit the model.
        OtherProcessError: where several processes train, if another one refuses or ends.
        TrainingDiverged: with the last good checkpoint in a note.
    """
    recorder = _prepare(config, path, watcher, data_path, init=init, stiffness=stiffness)
    experiment = recorder.experiment
    with threads(config.device.threads), recorder.opened():
        if recorder.reached() == config.training.steps:
            return None
        try:
            return train(
                experiment.model,
                experiment.transitions,
                config.training,
                sampler=experiment.sampler,
                substeps=experiment.substeps,
                loss=experiment.loss,
                integrator=experiment.integrator,
                scale=experiment.normalization.std,
                validate=experiment.validation,
                recorder=recorder,
                fabric=recorder.fabric,
                conditions=experiment.inputs.conditions,
            )
        except TrainingDiverged as error:
            saved = "none yet" if recorder.saved_step is None else f"step {recorder.saved_step}"
            error.add_note(f"The last good checkpoint: {saved}, in {recorder.folder.path}")
            raise


def run_together(
    requested: Sequence[tuple[RunConfig, Path | str]],
    watcher: Recorder | None = None,
    *,
    data_path: str | None = None,
    stiffness: Callable[[RunConfig], bool] = lambda config: True,
) -> list[TrainingResult | TrainingDiverged | None]:
    """Train several configurations as one batched computation, into a folder each: see `config.can_run_together`.

    Every run ends where `run` would have brought it, to rounding. One alone is left to `run`.

    Args:
        requested: the configurations and their run folders.
        watcher, data_path: as `run` takes them.
        stiffness: for which of them the stiffness index is written.

    Returns:
        for each its result, what its training diverged by, or None if its folder holds the finished run already.

    Raises:
        ValueError: for configurations that cannot be run together.
        RunFolderError: as `run`.
    """
    if not requested:
        return []
    first, first_path = requested[0]
    if len(requested) == 1:
        try:
            return [run(first, first_path, watcher, data_path=data_path, stiffness=stiffness(first))]
        except TrainingDiverged as error:
            return [error]
    if odd := [path for config, path in requested if not can_run_together(first, config)]:
        raise ValueError(
            f"{odd[0]} cannot be trained together with {first_path}: runs that can differ only by seed, loss and "
            "sampling, and have no substeps and one full precision"
        )
    recorders: list[_FolderRecorder] = []
    for config, path in requested:
        split = recorders[0].experiment.split if recorders else None
        recorders.append(_prepare(config, path, watcher, data_path, split, stiffness=stiffness(config)))
    results: list[TrainingResult | TrainingDiverged | None] = [None] * len(recorders)
    with threads(first.device.threads), contextlib.ExitStack() as stack:
        by_step: dict[int, list[int]] = {}  # a kill may have come between two checkpoints
        for i, recorder in enumerate(recorders):
            stack.enter_context(recorder.opened())
            by_step.setdefault(recorder.reached(), []).append(i)
        by_step.pop(first.training.steps, None)
        for group in by_step.values():
            for i, result in zip(group, _train_together([recorders[i] for i in group]), strict=True):
                results[i] = result
    return results


def _train_together(recorders: Sequence["_FolderRecorder"]) -> list[TrainingResult | TrainingDiverged]:
    experiments = [recorder.experiment for recorder in recorders]
    first = experiments[0]
    return train_together(
        [
            Member(x.model, x.loss, x.sampler, x.validation, recorder)
            for x, recorder in zip(experiments, recorders, strict=True)
        ],
        first.transitions,
        first.config.training,
        integrator=first.integrator,
        scale=first.normalization.std,
        device=recorders[0].fabric.device,
    )


def _prepare(
    config: RunConfig,
    path: Path | str,
    watcher: Recorder | None,
    data_path: str | None,
    split: Split | None = None,
    init: Path | str | None = None,
    *,
    stiffness: bool,
) -> "_FolderRecorder":
    """Report every error of the configuration before anything is written."""
    from squall.runs.tracking import loggers  # imports lightning-fabric, and with it torch's compiler: 2 seconds

    folder = RunFolder(path)
    if config.data.path:
        data = dataclasses.replace(config.data, path=os.path.realpath(config.data.path))
        config = dataclasses.replace(config, data=data)
    if config.tensorboard:
        warnings.warn("tensorboard: true is now logger: tensorboard", stacklevel=2)
    fabric = joined(config.device, loggers(config.trackers, folder.path, flat(to_dict(config))))

    def prepare() -> tuple[tuple[Experiment, Start | None], dict[str, Any]]:
        refuse_other_count(config.device)
        named = with_inputs_named(config)
        _refuse_other(folder, named)
        start = Start.of(folder, init)
        experiment = build(named, start and start.normalization, split=split)
        if start is not None:
            start.give(experiment.model)
        refuse_unsavable(experiment.model)
        _ = experiment.sampler  # refuses too large a minibatch
        refuse_shared(config.training, experiment.loss, fabric.world_size)
        if config.device.strategy == "fsdp" and fabric.world_size > 1:
            refuse_unshardable(experiment.model)
        return (experiment, start), _description(named, start) if fabric.world_size > 1 else {}

    experiment, start = agreed(fabric, prepare)
    recorded = None if start is None else start.record
    where = data_path or config.data.path
    return _FolderRecorder(folder, experiment, fabric, watcher or Recorder(), where, recorded, stiffness)


def _description(config: RunConfig, start: Start | None) -> dict[str, Any]:
    """What all processes of a training must have in common."""
    values = to_dict(config)
    del values["data"]["path"]  # a file may lie elsewhere on another machine
    return values | {"file": fingerprint(config.data.path), "init": start and start.record}


def _refuse_other(folder: RunFolder, config: RunConfig) -> None:
    """A folder belongs to one configuration and one data set; a run of it may get more steps."""
    if not folder.has("config.yaml"):
        if folder.path.is_dir() and any(not path.name.startswith(".") for path in folder.path.iterdir()):
            raise RunFolderError(f"{folder.path} is not empty and no run folder: choose another folder")
        return
    there = with_defaults(folder.read_config())
    lines = [line for line in difference(there, to_dict(config)) if not line.startswith(PLACES)]
    if config.training.steps > flat(there).get("training.steps", math.inf):  # it goes on
        if config.training.schedule == "cosine":
            raise RunFolderError(
                f"{folder.path} holds a run of {there['training']['steps']} steps whose learning rate falls to 0 at "
                "its end (training.schedule is 'cosine'): more steps would be another run. Start one from its weights "
                f"with --init {folder.path}"
            )
        lines = [line for line in lines if not line.startswith("training.steps:")]
    if lines:
        raise RunFolderError(
            f"{folder.path} holds a run of another configuration (there -> requested):\n  "
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


class _FolderRecorder(Recorder):
    """Writes the training of an experiment into its folder, from the first process only, and informs the watcher."""

    def __init__(
        self,
        folder: RunFolder,
        experiment: Experiment,
        fabric: Fabric,
        watcher: Recorder,
        data_path: str,
        init: dict[str, Any] | None,
        stiffness: bool,
    ) -> None:
        self.folder, self.experiment, self.fabric = folder, experiment, fabric
        self.watcher, self.data_path, self.init, self.stiffness = watcher, data_path, init, stiffness
        self.saved_step: int | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder, made and described, against other processes."""
        first = self.fabric.is_global_zero
        if first:
            self.folder.create()
        self.fabric.barrier()
        with self.folder.locked() if first else contextlib.nullcontext(), self._tracked():
            if first:
                self._describe()
            yield
            self.fabric.barrier()  # whoever ends before the first process has saved would have it stopped

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        """Tell the loggers of the first process how the training ended."""
        status = "failed"
        try:
            yield
            status = "success"
        finally:
            for logger in self.fabric.loggers if self.fabric.is_global_zero else ():
                logger.finalize(status)

    def _describe(self) -> None:
        """Write what is needed to understand the run years later, where it is not there yet."""
        folder, experiment = self.folder, self.experiment
        if not folder.has("config.yaml"):
            values = to_dict(experiment.config)
            values["data"]["path"] = self.data_path
            folder.write_config(values)
        there = folder.read_config()
        config = {**there, "training": {**there["training"], "steps": experiment.config.training.steps}}
        normalization = experiment.normalization.to_dict()
        if not folder.has("normalization.json"):
            folder.write_json("normalization.json", normalization)
        environment = self._new_environment(config)
        if environment is not None:
            source = model_source(experiment.config.model.name)
            environment["description"] = write_description(folder, experiment.split.train)
            folder.write_json("environment.json", sealed(environment, config, normalization, source))
        if there != config:  # in this order: what environment.json says of earlier steps explains the old file
            folder.write_config(config)
        sampler = experiment.sampler
        if self.stiffness and isinstance(sampler, StiffnessAwareSampler) and not folder.has(SAMPLING):
            shape = (experiment.split.train.trajectories, -1)
            index, stiff = (x.reshape(shape).numpy() for x in (sampler.index, sampler.is_stiff))
            dt = np.array(experiment.transitions.dt)
            folder.write_arrays(SAMPLING, index=index.astype("f4"), stiff=stiff, dt=dt)

    def _new_environment(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """What environment.json is to hold; None where it stays as it is.

        A training that goes on longer than planned, or elsewhere, adds a segment: where and with what it was trained
        before.
        """
        folder = self.folder
        now = _environment(self.experiment, self.fabric) | ({} if self.init is None else {"init": self.init})
        if not folder.has("environment.json"):
            return now
        before, steps = folder.read_json("environment.json"), config["training"]["steps"]
        reached = next(iter(folder.checkpoint_steps("last")), 0)
        moved = difference(*({name: x.get(name) for name in SAME_BITS if name in before} for x in (before, now)))
        sealed_before = recorded(before)
        planned = sealed_before["config"]["training"]["steps"] if sealed_before else steps
        if reached >= steps or (not moved and planned == steps):
            return None
        if moved:
            warnings.warn(
                f"{folder.path} goes on from step {reached} on another machine or in another version, and may round "
                f"otherwise: {'; '.join(moved)}",
                stacklevel=2,
            )
        segment = {name: before[name] for name in SEGMENT if name in before}
        segments = [*before.get("segments", ()), {**segment, "steps": planned, "until": reached}]
        return now | {"segments": segments}

    def reached(self) -> int:
        """The step of the last checkpoint, or the last of all where the training ended early; 0 without one."""
        checkpoint, settings = self._load("last", self._fits), self.experiment.config.training
        if checkpoint is None:
            return 0
        early = 0 < settings.patience <= checkpoint.state.get("unimproved", 0)
        return settings.steps if early else checkpoint.step

    def resume(self) -> Checkpoint | None:
        sharded = self.experiment.config.device.strategy == "fsdp"  # and cannot be copied; `reached` has checked it
        checkpoint = self._load("last", *(() if sharded else (self._fits,)))
        self.saved_step = checkpoint and checkpoint.step
        if self.fabric.is_global_zero:
            self.folder.rewind_metrics(self.saved_step or 0)
        self.watcher.stepped(self.saved_step or 0)
        return checkpoint

    def resume_best(self) -> Checkpoint | None:
        return self._load("best")

    def _load(self, kind: Kind, *fits: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """The newest checkpoint of the folder, which only the first process reads."""
        checkpoint = self.folder.load(kind, *fits) if self.fabric.is_global_zero else None
        return self.fabric.broadcast(checkpoint)

    def _fits(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another training before the training takes it."""
        model, settings = copy.deepcopy(self.experiment.model), self.experiment.config.training
        load_state(model, checkpoint.model_state)
        leaves = [torch.nn.Parameter(x.detach(), x.requires_grad) for x in model.parameters()]  # copies may be none
        optimizer = adam(leaves, settings, torch.device("cpu"))
        load_optimizer(optimizer, checkpoint.state["optimizer"])
        for parameter, values in optimizer.state.items():
            for value in values.values():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"a moment of the optimiser has shape {tuple(value.shape)}")
        copy.deepcopy(self.experiment.loss).load_state_dict(checkpoint.state["loss"])
        torch.Generator().set_state(checkpoint.state["random"]["cpu"])
        _ = checkpoint.state["score"] and Score(*checkpoint.state["score"])
        float(checkpoint.state["seconds"])

    def stopping(self) -> bool:
        return self.watcher.stopping()

    def stepped(self, step: int) -> None:
        self.watcher.stepped(step)

    def logged(self, metrics: dict[str, Any]) -> None:
        self.watcher.logged(metrics)
        if self.fabric.is_global_zero:
            self.folder.append_metrics(metrics)
            values = flat(metrics, separator="/")
            numbers = {name: float(x) for name, x in values.items() if isinstance(x, int | float) and name != "step"}
            self.fabric.log_dict(numbers, step=metrics["step"])

    def saved(self, checkpoint: Checkpoint) -> None:
        self._save("last", checkpoint)
        self.saved_step = checkpoint.step

    def improved(self, checkpoint: Checkpoint, validation: Validation) -> None:
        self._save("best", checkpoint)
        if validation.fields is not None and self.fabric.is_global_zero:
            from squall.runs.tracking import log_picture, rollout_picture  # here, as `loggers` above

            picture = rollout_picture(*validation.fields)
            for logger in self.fabric.loggers:
                log_picture(logger, picture, checkpoint.step)

    def _save(self, kind: Kind, checkpoint: Checkpoint) -> None:
        if self.fabric.is_global_zero:
            self.folder.save(kind, checkpoint)


def _environment(experiment: Experiment, fabric: Fabric) -> dict[str, Any]:
    packages = ("squall", "torch", "numpy", "scipy", "h5py", "lightning-fabric", "numba")
    return {
        "commit": _commit(),
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "threads": torch.get_num_threads(),
        "seed": experiment.config.training.seed,
        "data": fingerprint(experiment.config.data.path),
        "trajectories": {name: part.trajectories for name, part in experiment.split._asdict().items()},
        "parameters": sum(p.numel() for p in experiment.model.parameters()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    """Of an installed package; which passes compute depends on whether numba is there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str | None:
    """The commit of squall's own sources, where they are a checkout; of a copy, SQUALL_COMMIT."""
    if commit := os.environ.get("SQUALL_COMMIT"):
        return commit
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
