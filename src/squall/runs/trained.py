"""A trained run, read back from its folder: evaluated, and rolled out. It needs no data file."""

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

import squall.data
from squall._types import Trajectories
from squall.data import Description, Normalization, Source, Split
from squall.data.conditions import as_conditions
from squall.data.errors import check_exists
from squall.models.inputs import Conditions, Inputs, Window
from squall.runs.build import MISFITS, Experiment, build, condition_channels, open_data, output_shape
from squall.runs.config import ConfigError, RunConfig, from_dict
from squall.runs.description import constants, read_description
from squall.runs.emulator import Emulator
from squall.runs.folder import KINDS, Kind, RunFolder, RunFolderError, fingerprint
from squall.runs.record import is_own, recorded
from squall.training.state import load_state

__all__ = ["TrainedRun", "open_run"]


class TrainedRun:
    """A trained run: its model, and what is needed to roll it out. `open_run` makes it.

    Attributes:
        folder: the run folder.
        config: of the training.
        checkpoint: which weights the model has, `best` or `last`; None before any were loaded.
        step: of the training, at which they were saved.
    """

    def __init__(
        self, folder: RunFolder, config: RunConfig, built: Experiment, opened: bool, constants: Collection[str]
    ) -> None:
        self.folder = folder
        self.checkpoint: Kind | None = None
        self.step = 0
        self.config, self._built, self._opened, self._constants = config, built, opened, constants

    @property
    def model(self) -> nn.Module:
        """The model with its best weights (or those that `load` gave it), in units of the data, in evaluation mode."""
        if self.checkpoint is None:
            self.load()
        return self._built.model

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of the fields, which the model applies by itself."""
        return self._built.normalization

    @property
    def inputs(self) -> Inputs:
        """History and conditions that the model sees."""
        return self._built.inputs

    @property
    def source(self) -> Source:
        """The description of the training data, its mask and areas, without its states."""
        return self._built.split.train

    @property
    def description(self) -> Description:
        """Fields, units, axes and time step of the data."""
        return self.source.description

    @cached_property
    def experiment(self) -> Experiment:
        """The run with its data, which are opened here.

        Raises:
            RunFolderError: if the data file is not the one that it was trained on.
        """
        if self._opened:
            return self._built
        _refuse_other_data(self.folder, self.config, self.source)
        return replace(self._built, split=open_data(self.config))

    def load(self, kind: Kind | None = None) -> tuple[Kind, int]:
        """Load a checkpoint into the model: by default the one that rolled out best on the validation trajectories.

        Returns:
            which one it is, and its step.

        Raises:
            CheckpointError: if there is none, or none can be read.
        """
        model = self._built.model
        chosen, checkpoint = self.folder.newest(
            (kind,) if kind else KINDS, lambda checkpoint: load_state(model, checkpoint.model_state)
        )
        model.eval()
        self.checkpoint, self.step = chosen, checkpoint.step
        return chosen, checkpoint.step

    @property
    def emulator(self) -> Emulator:
        """The model with its integrator and its grid, with the weights of `model`."""
        _ = self.model  # loads them
        return Emulator.of(self._built)

    def predict(
        self, u0: Float[Tensor, "batch ..."], steps: int, forcings: Mapping[str, Any] | None = None
    ) -> Trajectories:
        """Roll out from given states, in the units of the data.

        Args:
            u0: the initial states (batch, channel, *space); for a model with a history of K states the last K, oldest
                first, (batch, K, channel, *space).
            steps: how many steps of the data's dt.
            forcings: the conditions that the model sees, by name: (batch,) a parameter, (batch, steps) or
                (batch, steps, channel, *space) a forcing at the time of `u0` and on, (*space) a static field. Static
                fields of the training are known, and may be left out.

        Returns:
            the trajectories (batch, steps + 1, channel, *space), the initial state first, in the precision of the
            weights. Masked points keep their value.

        Raises:
            ConfigError: if states do not fit the model, or a forcing is missing or too short.
        """
        if steps < 1:
            raise ConfigError(f"steps is {steps}, but must be at least 1")
        window = self.window(u0)
        conditions = self.conditions(forcings or {}, len(window), steps, tuple(window.shape[3:]))
        return self.emulator.roll(window, conditions, steps)

    def window(self, states: Float[Tensor, "batch ..."]) -> Window:
        """Initial states as (batch, history, channel, *space), on a grid that the model can take.

        Raises:
            ConfigError: if they have another shape, or the model cannot take another grid than that of the training.
        """
        history, source = self.inputs.history, self.source
        if history == 1 and states.dim() == len(source.space) + 2:
            states = states[:, None]
        given = tuple(states.shape)
        if len(given) != len(source.space) + 3 or given[1:3] != (history, source.channels):
            wanted = (f"{history} states of history",) * (history > 1) + (f"{source.channels} channel(s)",)
            raise ConfigError(
                f"initial states have shape {tuple(states.shape)}, but must have (batch, {', '.join(wanted)}, "
                f"{', '.join(map(str, source.space))}): the fields are {', '.join(source.fields)}"
            )
        if given[3:] != source.space:
            self._try_grid(states[:1])
        return states

    def _try_grid(self, states: Window) -> None:
        space, trained = tuple(states.shape[3:]), self.source.space
        reason = "the run has a mask of its grid" if self.source.mask is not None else None
        if reason is None:
            count = states.shape[1] * states.shape[2] + condition_channels(self.source, self.inputs.conditions)
            try:
                shape = output_shape(self.model, torch.zeros(1, count, *space))
                reason = None if shape == (1, states.shape[2], *space) else f"the model returns the shape {shape}"
            except MISFITS as error:
                reason = str(error)
        if reason is not None:
            raise ConfigError(
                f"initial states are on a grid of {_times(space)} points, but the model was trained on "
                f"{_times(trained)} and cannot take another: {reason}"
            )
        warnings.warn(
            f"initial states are on a grid of {_times(space)} points, the training was on {_times(trained)}: the "
            "model is used as it is, for the same spacing of points",
            stacklevel=4,
        )

    def constant(self, name: str) -> Float[Tensor, "1 1 condition *space"] | None:
        """The values of a condition that the folder holds: one that is the same for all trajectories and times."""
        return self.source.condition(name, [0], [0], 1) if name in self._constants else None

    def conditions(
        self, forcings: Mapping[str, Any], batch: int, steps: int, space: tuple[int, ...]
    ) -> Conditions | None:
        """The conditions of a rollout as one tensor, from what is given by name and what the folder holds.

        Raises:
            ConfigError: if one is missing, is not asked for, or ends before the rollout.
        """
        names, known = self.inputs.conditions, {c.name: c for c in self.source.conditions}
        if unknown := [name for name in forcings if name not in names]:
            sees = f"the conditions {', '.join(names)}" if names else "no conditions"
            raise ConfigError(f"the forcing '{unknown[0]}' is given, but the model sees {sees}")
        given: dict[str, Any] = {}
        for name in names:
            if name in forcings:
                given[name] = _first_steps(name, torch.as_tensor(forcings[name]), batch, steps, space)
            elif space == self.source.space and (constant := self.constant(name)) is not None:
                given[name] = constant
            else:
                raise ConfigError(
                    f"the model sees the {known[name].kind} '{name}', which is missing: give it by name, as "
                    f"forcings={{'{name}': ...}}"
                )
        if not given:
            return None
        values = as_conditions(given, (batch, steps, self.source.channels, *space), self.source.dtype)
        times = max(value.shape[1] for value in values.values())
        return torch.cat([value.expand(batch, times, -1, *space) for value in values.values()], dim=2)


def _times(space: tuple[int, ...]) -> str:
    return " × ".join(map(str, space))


def _first_steps(
    name: str, values: Shaped[Tensor, "..."], batch: int, steps: int, space: tuple[int, ...]
) -> Shaped[Tensor, "..."]:
    """A forcing at the times of the steps."""
    full = values.dim() == len(space) + 3
    forcing = (values.dim() == 2 and tuple(values.shape) != space) or full
    if not forcing or values.shape[1] == 1:
        return values
    if values.shape[1] < steps:
        raise ConfigError(
            f"the forcing '{name}' ends before the rollout: it has {values.shape[1]} time(s), but {steps} steps are "
            "asked for; give it at the time of the initial state and of every step but the last"
        )
    return values[:, :steps]


def open_run(
    path: Path | str, data: str | None = None, *, split: Split | None = None, trust: bool = False
) -> TrainedRun:
    """A trained run, with its model and its normalisation; its data file is opened only if it is asked for.

    Args:
        path: the run folder.
        data: where its data file is now, if it was moved.
        split: its data, where they are open already.
        trust: whether a model may be imported from outside the installed packages, for a run that was trained by
            somebody else or on another machine.

    Raises:
        RunFolderError: if it is no run folder or was edited after the training; for a run of an earlier version also
            if the data file is not the one that it was trained on.
        ConfigError: if its model is code that is not trusted.
        squall.data.MissingFileError: if nothing is at `data`.

    Example:
        >>> run = open_run("runs/ch")  # doctest: +SKIP
        >>> run.predict(u0, steps=100).shape  # doctest: +SKIP
        torch.Size([8, 101, 1, 64])
    """
    folder = RunFolder(path)
    config = from_dict(folder.read_config())
    if data is not None:
        check_exists(Path(data), Path(os.path.abspath(data)))
        config = replace(config, data=replace(config.data, path=data))
    environment = folder.read_json("environment.json")
    if recorded(environment) is None:
        warnings.warn(f"{path} is of an earlier version, without a record: edits of it go unnoticed", stacklevel=2)
    opened = split is not None or "description" not in environment
    known: Collection[str] | None = None
    if not opened:
        states = config.data.history + config.training.unroll
        split, known = read_description(folder, environment["description"], states)
    trusts = partial(is_own, environment)
    built = build(config, folder.read_normalization(), split=split, trusts=(lambda source: True) if trust else trusts)
    if opened:
        _refuse_other_data(folder, config)
    return TrainedRun(folder, config, built, opened, constants(built.split.train) if known is None else known)


def _refuse_other_data(folder: RunFolder, config: RunConfig, trained: Source | None = None) -> None:
    """Refuse a data file that is not the one of the training; `trained` describes that one, where the folder does."""
    path, before = config.data.path, folder.read_json("environment.json").get("data") or {}
    check_exists(Path(path), Path(os.path.abspath(path)))
    now = fingerprint(path)
    if now == before:
        return
    if path == folder.read_config()["data"]["path"]:
        raise RunFolderError(
            f"{path} is not the file that {folder.path} was trained on: it has changed since. If that file is "
            "elsewhere, name it by --data"
        )
    differing = [
        f"{name} {now[name]}, not {before.get(name, 'unknown')}" for name in now if now[name] != before.get(name)
    ]
    if trained is not None:
        differing = _differences(squall.data.open(path), trained) or differing
    raise RunFolderError(
        f"{path}, named by --data, is not the file that {folder.path} was trained on: it has {'; '.join(differing)}. "
        f"Name that file, or a copy of it; to roll out from other data: squall predict {folder.path} --initial {path}"
    )


def _differences(source: Source, trained: Source) -> list[str]:
    """What of a file cannot be that of the training: fields, grid, time step."""
    pairs = {
        "fields": (source.fields, trained.fields),
        "points": (source.space, trained.space),
        "time step": (source.dt, trained.dt),
        "boundary": (source.boundary, trained.boundary),
    }
    return [f"the {name} {here}, not {there}" for name, (here, there) in pairs.items() if here != there]
