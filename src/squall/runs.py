"""A run from its configuration to its folder: trained, interrupted, resumed."""

import contextlib
import dataclasses
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from squall.config import ConfigError, RunConfig, difference, to_dict
from squall.data import Transitions
from squall.evaluation import RolloutValidation
from squall.experiment import Experiment, build, sampler_of
from squall.placement import threads
from squall.run_folder import Kind, RunFolder, RunFolderError, fingerprint
from squall.sampling import StiffnessAwareSampler
from squall.training import Checkpoint, Recorder, TrainingDiverged, TrainingResult, Validation, train

__all__ = ["run"]


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
    folder = RunFolder(path)
    config = _with_absolute_path(config)
    _refuse_other(folder, config)
    experiment = build(config)
    transitions = Transitions(experiment.split.train)
    sampler = sampler_of(experiment, transitions)
    stiff = sampler.is_stiff if isinstance(sampler, StiffnessAwareSampler) else None
    fabric = _fabric(config, folder)
    fabric.launch()
    first = fabric.is_global_zero
    if first:
        folder.create()
    fabric.barrier()
    with threads(config.device.threads), folder.locked() if first else contextlib.nullcontext():
        if _finished(folder, config.training.steps):
            return None
        if first:
            _describe(folder, experiment, fabric)
        recorder = _FolderRecorder(folder, watcher or Recorder(), fabric)
        validation = experiment.split.validation
        try:
            return train(
                experiment.model,
                transitions,
                config.training,
                sampler=sampler,
                substeps=None if stiff is None else 1 + stiff * (config.sampling.substeps - 1),
                loss=experiment.loss,
                step=experiment.step,
                scale=experiment.normalization.std,
                validate=_validation(experiment) if validation.trajectories else None,
                recorder=recorder,
                fabric=fabric,
            )
        except TrainingDiverged as error:
            saved = recorder.saved_step
            error.add_note(f"The last good checkpoint: {'none yet' if saved is None else f'step {saved}'}, in {path}")
            raise


def _with_absolute_path(config: RunConfig) -> RunConfig:
    """So that the run can be evaluated from any folder."""
    if not config.data.path:
        return config
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, path=str(Path(config.data.path).resolve()))
    )


def _validation(experiment: Experiment) -> RolloutValidation:
    return RolloutValidation(experiment.split.validation, experiment.step, experiment.normalization.std)


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
        before, now = folder.read_json("environment.json")["data"], fingerprint(config.data.path)
        if before != now:
            raise RunFolderError(
                f"{folder.path} holds a run on other data: {config.data.path} has changed since "
                f"({before} -> {now}). Choose another folder, or bring the data back"
            )


def _finished(folder: RunFolder, steps: int) -> bool:
    checkpoint = folder.load("last")
    return checkpoint is not None and checkpoint.step == steps


def _fabric(config: RunConfig, folder: RunFolder) -> Fabric:
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


def _describe(folder: RunFolder, experiment: Experiment, fabric: Fabric) -> None:
    """What is needed to understand the run years later."""
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


def _version(package: str) -> str | None:
    """Of an installed package: whether numba is there decides by which passes the loss computes."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of squall's own sources, where they are a checkout."""
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
