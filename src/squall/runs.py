"""A run from its configuration to its folder, and back: train, resume, evaluate, predict."""

import contextlib
import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

import squall.data
from squall.config import ConfigError, RunConfig, difference, from_dict, to_dict
from squall.data import Transitions
from squall.evaluation import Rollouts, RolloutValidation, evaluate
from squall.experiment import Experiment, build, integrator
from squall.integrators import Step, rollout, substeps
from squall.run_folder import CheckpointError, Kind, RunFolder, RunFolderError
from squall.sampling import UniformSampler
from squall.training import Checkpoint, Recorder, TrainingDiverged, TrainingResult, Validation, train

__all__ = ["Trained", "evaluate_run", "evaluation_suffix", "load_run", "predict", "run"]

FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 256, 2**20


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
    _refuse_other(folder, config)
    experiment = build(config)
    transitions = Transitions(experiment.split.train)
    sampler = UniformSampler(len(transitions), config.training.batch, config.training.seed)
    fabric = _fabric(config, folder)
    fabric.launch()
    first = fabric.is_global_zero
    if first:
        folder.create()
    fabric.barrier()
    with _threads(config.device.threads), folder.locked() if first else contextlib.nullcontext():
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
                loss=experiment.loss,
                step=experiment.step,
                scale=experiment.normalization.std,
                validate=RolloutValidation(validation, experiment.step) if validation.trajectories else None,
                recorder=recorder,
                fabric=fabric,
            )
        except TrainingDiverged as error:
            saved = recorder.saved_step
            error.add_note(f"The last good checkpoint: {'none yet' if saved is None else f'step {saved}'}, in {path}")
            raise


def _refuse_other(folder: RunFolder, config: RunConfig) -> None:
    """A folder belongs to one configuration and one data set."""
    if not folder.has("config.yaml"):
        if folder.path.is_dir() and any(not path.name.startswith(".") for path in folder.path.iterdir()):
            raise RunFolderError(f"{folder.path} is not empty and no run folder: choose another folder")
        return
    lines = difference(folder.read_config(), to_dict(config))
    if lines:
        raise RunFolderError(
            f"{folder.path} holds a run of another configuration (there -> asked for):\n  "
            + "\n  ".join(lines)
            + "\nChoose another folder, or the configuration that is there"
        )
    if folder.has("environment.json") and Path(config.data.path).exists():
        before, now = folder.read_json("environment.json")["data"], _fingerprint(config.data.path)
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


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _describe(folder: RunFolder, experiment: Experiment, fabric: Fabric) -> None:
    """What is needed to understand the run years later."""
    config = experiment.config
    if not folder.has("config.yaml"):
        folder.write_config(to_dict(config))
    packages = ("squall", "torch", "numpy", "scipy", "h5py", "lightning-fabric")
    environment = {
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "threads": torch.get_num_threads(),
        "seed": config.training.seed,
        "data": _fingerprint(config.data.path),
        "trajectories": {name: part.trajectories for name, part in experiment.split._asdict().items()},
        "parameters": sum(p.numel() for p in experiment.model.parameters()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if not folder.has("environment.json"):
        folder.write_json("environment.json", environment)


def _fingerprint(path: str) -> dict[str, Any]:
    """Size and checksum of a file; of one over 256 MiB the checksum is of 256 blocks spread over it."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        stride = max(FINGERPRINT_BLOCK, size // FINGERPRINT_BLOCKS)
        for offset in range(0, size, stride):
            file.seek(offset)
            digest.update(file.read(FINGERPRINT_BLOCK))
    return {"bytes": size, "sha256": digest.hexdigest()}


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


@dataclass(frozen=True)
class Trained:
    """A trained run: its objects, with the weights of a checkpoint, and the step that they come from."""

    experiment: Experiment
    kind: Kind
    step: int


def load_run(path: Path | str, checkpoint: Kind | None = None) -> Trained:
    """A run with its trained weights, by default those that rolled out best on the validation trajectories.

    Args:
        path: the run folder.
        checkpoint: `best` or `last`; `best` if there is one, else `last`, if left out.

    Raises:
        RunFolderError: if the folder is no run folder or has no such checkpoint.
    """
    folder = RunFolder(path)
    experiment = build(from_dict(folder.read_config()))
    kinds: tuple[Kind, ...] = (checkpoint,) if checkpoint else ("best", "last")
    for kind in kinds:
        found = folder.load(kind)
        if found is not None:
            experiment.model.to(next(iter(found.weights.values())).dtype)
            experiment.model.load_state_dict(found.weights)
            experiment.model.eval()
            return Trained(experiment, kind, found.step)
    raise CheckpointError(f"{path} has no '{kinds[0]}' checkpoint: train it with `squall train` first")


def evaluate_run(path: Path | str, *, method: str | None = None, count: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Evaluate the best and the last checkpoint of a run on its test trajectories; write what was found.

    Args:
        path: the run folder. `evaluation.json` and `rollouts.npz` are written into it; with another integrator
            than that of the training their names carry it.
        method: the integrator of the rollouts; that of the training if left out.
        count: how many steps of it cover one dt.
        device: where to compute.

    Returns:
        what `evaluation.json` holds.
    """
    folder = RunFolder(path)
    folder.read_config()
    kinds = _kinds(folder)
    trained = load_run(path, kinds[0])
    test = _test(trained.experiment)
    step = _evaluation_step(trained.experiment, method, count)
    checkpoints: dict[str, Any] = {}
    with _threads(trained.experiment.config.device.threads):
        for kind in kinds:
            trained = load_run(path, kind)
            evaluation = evaluate(
                trained.experiment.model.to(device),
                test,
                step=step,
                system=trained.experiment.system,
                scale=trained.experiment.normalization.std,
            )
            checkpoints[kind] = {"step": trained.step, **evaluation.to_dict()}
            if kind == kinds[0]:
                _write_rollouts(folder, f"rollouts{evaluation_suffix(method, count)}.npz", evaluation.rollouts, test)
    experiment = trained.experiment
    found = {
        "integrator": getattr(step, "name", "step"),
        "dt": test.dt,
        "steps": test.steps,
        "fields": list(test.fields),
        "system": None if experiment.system is None else experiment.system.name,
        "data": _fingerprint(experiment.config.data.path),
        "checkpoints": checkpoints,
    }
    folder.write_json(f"evaluation{evaluation_suffix(method, count)}.json", found)
    return found


def _kinds(folder: RunFolder) -> list[Kind]:
    """The checkpoints worth evaluating, the best first; the last one too if it is another."""
    best, last = folder.checkpoint_steps("best"), folder.checkpoint_steps("last")
    if not last:
        raise CheckpointError(f"{folder.path} has no checkpoint yet: train it with `squall train` first")
    if not best:
        return ["last"]
    return ["best"] if best[0] == last[0] else ["best", "last"]


def _write_rollouts(folder: RunFolder, name: str, rollouts: Rollouts, test: squall.data.Source) -> None:
    coordinates = {f"axis_{i}": x for i, x in enumerate(test.coordinates)}
    folder.write_arrays(name, time=rollouts.time, truth=rollouts.truth, prediction=rollouts.prediction, **coordinates)


def _test(experiment: Experiment) -> squall.data.Source:
    if experiment.split.test.trajectories == 0:
        raise ConfigError("data.test is 0: there are no test trajectories to evaluate on")
    return experiment.split.test


def evaluation_suffix(method: str | None, count: int) -> str:
    """What sets the files of an evaluation by another integrator apart."""
    if method is None and count == 1:
        return ""
    return f"-{method or 'same'}-{count}"


def _evaluation_step(experiment: Experiment, method: str | None, count: int) -> Step:
    if count < 1:
        raise ConfigError(f"substeps is {count}, but must be at least 1")
    if experiment.config.model.predicts == "state" and (method is not None or count > 1):
        raise ConfigError("the model predicts the next state: no other integrator and no substeps apply to it")
    step = experiment.step if method is None else integrator(method)
    return step if count == 1 else substeps(step, count)


def predict(path: Path | str, initial: Tensor, steps: int, checkpoint: Kind | None = None) -> Tensor:
    """Roll a trained run out from initial states of one's own.

    Args:
        path: the run folder.
        initial: (batch, channel, *space), on the grid and in the units of the training data.
        steps: how many steps of the data's dt.
        checkpoint: `best` or `last`.

    Returns:
        the trajectories, (batch, steps + 1, channel, *space), in the precision of the weights.
    """
    trained = load_run(path, checkpoint)
    experiment = trained.experiment
    training = experiment.split.train
    expected = (training.channels, *training.space)
    if tuple(initial.shape[1:]) != expected:
        raise ConfigError(
            f"initial states have shape {tuple(initial.shape)}, but must have (batch, {', '.join(map(str, expected))})"
        )
    first = initial.to(next(experiment.model.parameters()))
    with torch.no_grad():
        return rollout(experiment.step, experiment.model, first, training.dt, steps)
