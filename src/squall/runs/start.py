"""The weights that a run starts from, where they are those of another run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from squall.data import Normalization
from squall.runs.config import ConfigError
from squall.runs.folder import RunFolder, RunFolderError
from squall.training.loop import Checkpoint
from squall.training.state import load_state


@dataclass(frozen=True)
class Start:
    """Weights and normalization of another run.

    `record` is what environment.json keeps: the run, which checkpoint, its step and the checksum of its weights.
    `checkpoint` is None where the new run has a checkpoint of its own to go on from.
    """

    record: dict[str, Any]
    normalization: Normalization
    checkpoint: Checkpoint | None

    @staticmethod
    def of(folder: RunFolder, init: Path | str | None) -> "Start | None":
        """What the run in `folder`, new or not, starts from: the run `init`, or nothing.

        Raises:
            RunFolderError: if it started from something else, or `init` has changed since.
            CheckpointError: if `init` has no checkpoint.
        """
        requested = None if init is None else os.path.realpath(init)
        there = folder.read_json("environment.json") if folder.has("environment.json") else None
        before = None if there is None else there.get("init")
        if there is not None and (before and before["run"]) != requested:
            raise RunFolderError(
                f"{folder.path} holds a run that started from {_name(before and before['run'])}, not from "
                f"{_name(requested)}: choose another folder, or give --init as before"
            )
        if requested is None:
            return None
        if before and folder.checkpoint_steps("last"):
            return Start(before, folder.read_normalization(), None)
        other = RunFolder(requested)
        other.read_config()  # refuses what is no run folder, or was edited
        kind, checkpoint = other.newest()
        sha256 = other.weights_checksum(kind, checkpoint.step)
        record = {"run": requested, "checkpoint": kind, "step": checkpoint.step, "sha256": sha256}
        if before and before["sha256"] != sha256:
            raise RunFolderError(
                f"{requested} has other weights than when {folder.path} was made: choose another folder"
            )
        return Start(record, other.read_normalization(), checkpoint)

    def give(self, model: nn.Module) -> None:
        """Load the weights into a model.

        Raises:
            ConfigError: if they do not fit.
        """
        if self.checkpoint is None:
            return
        try:
            load_state(model, self.checkpoint.model_state)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:  # a module may load in its own way
            raise ConfigError(
                f"the weights of {self.record['run']} do not fit the model: {error}. Give the settings under 'model' "
                "that its config.yaml has"
            ) from error


def _name(run: str | None) -> str:
    return "new weights" if run is None else run
