"""Where a training is logged besides metrics.jsonl: one logger a tool, all with Fabric's interface."""

import importlib
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from lightning_fabric.loggers.logger import Logger

from squall._process.documents import read_text
from squall._process.extras import explain_missing_extra
from squall._process.files import write_text

Picture = UInt8[np.ndarray, "height width 3"]
Field = Float[np.ndarray, "time channel *space"]

PROJECT = "squall"
"""What the tools call the collection of all runs."""

ROLLOUT = "rollout"
"""What they call the pictures."""

LEAST_PIXELS = 128
"""Of a panel along time and space; small grids are drawn with larger points."""


@explain_missing_extra()
def loggers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """A logger for each name of `TRACKERS`, told the settings of the run by dotted key.

    Raises:
        MissingExtraError: if the package of one is not installed.
    """
    return [TRACKERS[name](folder, settings) for name in dict.fromkeys(names)]


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> Logger:
    importlib.import_module("tensorboard")  # Fabric's own message names another package
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(root_dir=folder, name="tensorboard", version="")


class _Tracker(Logger):
    """What the loggers below share. `start` is called at the first line, when the run folder is there."""

    tool: str

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder.absolute(), dict(settings)
        self.module, self.run = importlib.import_module(self.tool), None

    @property
    def name(self) -> str:
        return self.tool

    @property
    def version(self) -> str:
        return self.folder.name

    def start(self) -> Any:
        """The tool's own object for this run; a resumed training goes on in the same."""
        raise NotImplementedError

    def send(self, run: Any, metrics: dict[str, float], step: int) -> None:
        run.log(metrics, step=step)

    def send_picture(self, run: Any, picture: Picture, step: int) -> None:
        run.log({ROLLOUT: self.module.Image(picture)}, step=step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are given to the constructor."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.send(self._started(), metrics, step or 0)

    def log_picture(self, picture: Picture, step: int) -> None:
        self.send_picture(self._started(), picture, step)

    def _started(self) -> Any:
        self.run = self.start() if self.run is None else self.run
        return self.run

    def identity(self, new: Callable[[], str]) -> tuple[str, bool]:
        """The tool's name for this run, kept in the folder, and whether it is new."""
        path = self.folder / f"{self.tool}.id"
        if path.exists():
            return read_text(path).strip(), False
        name = new()
        write_text(path, f"{name}\n")
        return name, True


class _MLflow(_Tracker):
    """The server or folder that MLFLOW_TRACKING_URI names; else `mlflow/` in the run folder."""

    tool = "mlflow"

    def start(self) -> Any:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if not uri:
            store = self.folder / "mlflow"
            store.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{store / 'mlflow.db'}", (store / "artifacts").as_uri()
        client = self.module.MlflowClient(uri)
        experiment = client.get_experiment_by_name(PROJECT)
        if experiment is None:
            there = client.create_experiment(PROJECT, artifact_location=artifacts)
        else:
            there = experiment.experiment_id
        self.id, new = self.identity(lambda: client.create_run(there, run_name=self.folder.name).info.run_id)
        if new:
            for name, value in self.settings.items():
                client.log_param(self.id, name, value)
        else:
            client.update_run(self.id, status="RUNNING")
        return client

    def send(self, run: Any, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            run.log_metric(self.id, name, value, step=step)

    def send_picture(self, run: Any, picture: Picture, step: int) -> None:
        run.log_image(self.id, picture, key=ROLLOUT, step=step)

    def finalize(self, status: str) -> None:
        if self.run is not None:
            self.run.set_terminated(self.id, "FINISHED" if status == "success" else "FAILED")


class _WandB(_Tracker):
    """Offline in `wandb/` of the run folder, unless WANDB_MODE says otherwise."""

    tool = "wandb"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, settings)
        importlib.import_module("PIL")  # which it asks for at the first picture

    def start(self) -> Any:
        name, _ = self.identity(lambda: secrets.token_hex(4))
        project, mode = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_MODE", "offline")
        options = {"id": name, "resume": "allow", "mode": mode, "dir": self.folder}
        return self.module.init(project=project, name=self.folder.name, config=self.settings, **options)

    def finalize(self, status: str) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if status == "success" else 1)


class _Trackio(_Tracker):
    """trackio's own database, in the folder that TRACKIO_DIR names."""

    tool = "trackio"

    def start(self) -> Any:
        name, _ = self.identity(lambda: f"{self.folder.name}-{secrets.token_hex(4)}")
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        return self.module.init(project=PROJECT, name=name, config=self.settings, resume="allow", **quiet)

    def finalize(self, status: str) -> None:
        if self.run is not None:
            self.run.finish()


TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Logger]] = MappingProxyType(
    {"tensorboard": _tensorboard, "mlflow": _MLflow, "wandb": _WandB, "trackio": _Trackio}
)
"""Loggers by the name of their tool."""


def log_picture(logger: Any, picture: Picture, step: int) -> None:
    """Send a picture to the tool of a logger."""
    if isinstance(logger, _Tracker):
        logger.log_picture(picture, step)
    else:  # Fabric's own, of TensorBoard
        logger.experiment.add_image(ROLLOUT, picture, step, dataformats="HWC")


def rollout_picture(truth: Field, prediction: Field) -> Picture:
    """Truth, prediction and their difference below each other, a column of panels per field.

    In one dimension of space a panel has time to the right; in two it is a row of maps over time; of three the middle
    plane is shown. Truth and prediction share their colours, blue to red around the middle of the truth; those of the
    difference are symmetric around 0. What is not finite is grey.
    """
    columns = []
    for channel in range(truth.shape[1]):
        true, predicted = (_panel(x[:, channel].astype(np.float64)) for x in (truth, prediction))
        finite = true[np.isfinite(true)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        middle, half = (low + high) / 2, (high - low) / 2 or 1.0
        panels = ((true - middle) / half, (predicted - middle) / half, (predicted - true) / half)
        columns.append(np.concatenate([_coloured(panel) for panel in panels]))
    return np.concatenate(columns, 1)


def _panel(field: Float[np.ndarray, "time *space"]) -> Float[np.ndarray, "row column"]:
    if field.ndim == 2:
        panel = field.T
    else:
        while field.ndim > 3:
            field = field[:, field.shape[1] // 2]
        panel = np.concatenate(list(field), 1)
    larger = [max(1, -(-LEAST_PIXELS // count)) for count in panel.shape]
    return panel.repeat(larger[0], 0).repeat(larger[1], 1)


def _coloured(values: Float[np.ndarray, "row column"]) -> Picture:
    """−1 is blue, 0 white, 1 red; with a border below and to the right."""
    level = np.clip(np.where(np.isfinite(values), values, 0), -1, 1)
    fade = 1 - np.abs(level)
    colours = np.stack((np.where(level > 0, 1, fade), fade, np.where(level < 0, 1, fade)), -1)
    colours[~np.isfinite(values)] = 0.5
    return np.pad((255 * colours).astype(np.uint8), ((0, 4), (0, 4), (0, 0)), constant_values=64)
