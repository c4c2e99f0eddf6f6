"""A trained run, read back from its folder: evaluated, and rolled out."""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from squall.data import Split
from squall.runs.build import Experiment, build
from squall.runs.config import from_dict
from squall.runs.emulator import Emulator
from squall.runs.folder import (
    CheckpointError,
    DamagedCheckpointWarning,
    Kind,
    RunFolder,
    RunFolderError,
    fingerprint,
)
from squall.runs.record import is_own, recorded
from squall.training.loop import Checkpoint

__all__ = ["TrainedRun", "open_run"]


@dataclass(frozen=True)
class TrainedRun:
    """A run folder and the objects that it was trained with; `load` gives the model its weights."""

    folder: RunFolder
    experiment: Experiment

    def load(self, kind: Kind | None = None) -> tuple[Kind, int]:
        """Load a checkpoint into the model: by default the one that rolled out best on the validation trajectories.

        Returns:
            which one it is, and its step.

        Raises:
            CheckpointError: if there is none, or none can be read.
        """
        kinds: tuple[Kind, ...] = (kind,) if kind else ("best", "last")
        for candidate in kinds:
            try:
                checkpoint = self.folder.load(candidate, self._restore)
            except CheckpointError as error:
                if candidate == kinds[-1]:
                    raise
                warnings.warn(f"{error}; the last one is used", DamagedCheckpointWarning, stacklevel=2)
                continue
            if checkpoint is not None:
                self.experiment.model.eval()
                return candidate, checkpoint.step
        raise CheckpointError(f"{self.folder.path} has no '{kinds[0]}' checkpoint: train it with `squall train` first")

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.experiment.model.load_state_dict(checkpoint.model_state)

    @property
    def emulator(self) -> Emulator:
        """The model with its integrator and its grid, with the weights that were loaded last."""
        return Emulator(self.experiment.model, self.experiment.integrator, self.experiment.split.train.description)

    def predict(self, initial: Tensor, steps: int) -> Tensor:
        """Roll out from given initial states.

        Args:
            initial: (batch, channel, *space), on the grid and in the units of the training data.
            steps: how many steps of the data's dt.

        Returns:
            the trajectories, (batch, steps + 1, channel, *space), in the precision of the weights.

        Raises:
            ConfigError: if the states are not on the grid of the training data.
        """
        return self.emulator.rollout(initial, steps)


def open_run(
    path: Path | str, data: str | None = None, *, split: Split | None = None, trust: bool = False
) -> TrainedRun:
    """A trained run, with its data, its normalisation and its model.

    Args:
        path: the run folder.
        data: where its data file is now, if it was moved.
        split: its data, where they are open already.
        trust: whether a model may be imported from outside the installed packages, for a run that was trained by
            somebody else or on another machine.

    Raises:
        RunFolderError: if it is no run folder or was edited after the training, or the data file is not the one that
            it was trained on.
        ConfigError: if its model is code that is not trusted.
    """
    folder = RunFolder(path)
    config = from_dict(folder.read_config())
    if data is not None:
        config = replace(config, data=replace(config.data, path=data))
    environment = folder.read_json("environment.json")
    if recorded(environment) is None:
        warnings.warn(f"{path} is of an earlier version, without a record: edits of it go unnoticed", stacklevel=2)
    trusts = partial(is_own, environment)
    experiment = build(
        config, folder.read_normalization(), split=split, trusts=(lambda source: True) if trust else trusts
    )
    if fingerprint(config.data.path) != environment.get("data"):
        raise RunFolderError(
            f"{config.data.path} is not the file that {path} was trained on: it has changed since. If that file is "
            "elsewhere, name it by --data"
        )
    return TrainedRun(folder, experiment)
