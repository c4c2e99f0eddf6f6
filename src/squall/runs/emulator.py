"""A trained model on its own: a map from a state to the next one, without data file and run folder.

An exported folder holds

    emulator.json        what the model is, its grid, its training configuration, the checksums of the other files
    model.safetensors    its weights
    model.pt2            one step as a program of `torch.export`, for programs without squall
    data.json, data.npz  the conditions and the mask, where the model has some
    README.md            the model card

`load` reads all but model.pt2 and README.md; they are plain values and tensors. `export.export_run` writes them.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from squall._process.documents import DocumentError, read_json, read_text
from squall._process.files import special_file
from squall._types import State, Trajectories
from squall.data import DataError, Description, InMemory, Normalization, Split, describe
from squall.integrators import IntegratorLike
from squall.models.inputs import Conditions, Held, Inputs, Window, advance, rollout
from squall.models.placement import evaluating, like_model
from squall.runs.build import Experiment, build, condition_channels
from squall.runs.config import ConfigError, from_dict
from squall.runs.description import ARRAYS, read_description
from squall.runs.description import DESCRIPTION as DATA
from squall.runs.folder import RunFolder, RunFolderError
from squall.training.state import load_state, split_state

DESCRIPTION, WEIGHTS, PROGRAM = "emulator.json", "model.safetensors", "model.pt2"

BESIDE = (DATA, ARRAYS)
"""Copied from the run folder where the model has conditions or a mask."""

INPUTS = Inputs()
"""Of a model that sees the present state alone."""

FORMAT = 1
"""Of emulator.json; raised when an older squall could not read a new folder."""


class ExportError(ValueError):
    """A run that cannot be exported, or a folder that is no export or is damaged."""


@final
class Emulator(nn.Module):
    """A trained model with its integrator and its grid: it maps a state to the state one dt later.

    Args:
        model: the rate of a state, or the next state, as its integrator expects.
        integrator: makes the step.
        description: fields, grid and dt of the training data, in whose units states are.
        inputs: history and conditions that the model sees.
        condition_channels: C, of all conditions together.
        mask: False where a point keeps its value.

    Example:
        >>> import squall
        >>> about = squall.data.describe((1, 2, 1, 8), dt=0.5)
        >>> emulator = Emulator(torch.nn.Identity(), squall.euler, about)
        >>> emulator.rollout(torch.ones(1, 1, 8), steps=2)[0, :, 0, 0]
        tensor([1.0000, 1.5000, 2.2500])
    """

    mask: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        integrator: IntegratorLike,
        description: Description,
        inputs: Inputs = INPUTS,
        condition_channels: int = 0,
        mask: Bool[Tensor, "channel *space"] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.integrator, self.description = model, integrator, description
        self.inputs, self.condition_channels = inputs, condition_channels
        self.register_buffer("mask", mask, persistent=False)

    @classmethod
    def of(cls, experiment: Experiment) -> "Emulator":
        """The emulator of a model that was built from a configuration and data."""
        source, inputs = experiment.split.train, experiment.inputs
        count = condition_channels(source, inputs.conditions)
        return cls(experiment.model, experiment.integrator, source.description, inputs, count, source.mask)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(channel, *space) of a state."""
        return len(self.description.fields), *(len(axis) for axis in self.description.coordinates)

    @property
    def initial_shape(self) -> tuple[int, ...]:
        """What a rollout starts from, without its batch: a state, or the states of the history, oldest first."""
        history = self.inputs.history
        return self.state_shape if history == 1 else (history, *self.state_shape)

    def forward(self, u: Float[Tensor, "batch ..."], conditions: Held | None = None) -> State:
        """The states a time dt after u.

        Args:
            u: (batch, channel, *space); of a model with a history the last K states, oldest first,
                (batch, K, channel, *space).
            conditions: at the time of the last state, (batch, C, *space), in the order of `inputs.conditions`.
        """
        if self.inputs.history == 1 and conditions is None and self.mask is None:
            return self.integrator(self.model, u, self.description.dt)
        window = u.unsqueeze(1) if self.inputs.history == 1 else u
        return advance(self.model, self.integrator, window, conditions, self.description.dt, self.mask)

    def rollout(
        self, initial: Float[Tensor, "batch ..."], steps: int, conditions: Conditions | None = None
    ) -> Trajectories:
        """Roll out from given initial states.

        Args:
            initial: as `forward` takes it, on the grid and in the units of the training data.
            steps: how many steps of the data's dt.
            conditions: (batch, steps or 1, C, *space), at the time of the last initial state and on.

        Returns:
            the trajectories, (batch, steps + 1, channel, *space), in the precision of the weights.

        Raises:
            ConfigError: if states or conditions are not on the grid of the training data, or conditions are missing.
            ValueError: if the conditions end before the rollout.
        """
        if tuple(initial.shape[1:]) != self.initial_shape:
            shape = ", ".join(map(str, self.initial_shape))
            raise ConfigError(f"initial states have shape {tuple(initial.shape)}, but must have (batch, {shape})")
        given = None if conditions is None else (conditions.dim(), *conditions.shape[2:])
        space = self.state_shape[1:]
        if given != ((len(space) + 3, self.condition_channels, *space) if self.condition_channels else None):
            names = f" of {', '.join(self.inputs.conditions)}" if self.condition_channels else ": give none"
            shape = ", ".join(map(str, ("batch", f"steps ({steps}) or 1", self.condition_channels, *space)))
            there = "none are given" if conditions is None else f"they have shape {tuple(conditions.shape)}"
            raise ConfigError(f"the model takes conditions ({shape}){names}; {there}")
        return self.roll(initial.unsqueeze(1) if self.inputs.history == 1 else initial, conditions, steps)

    @torch.no_grad()
    def roll(self, window: Window, conditions: Conditions | None, steps: int) -> Trajectories:
        """Roll out from states that were checked, (batch, history, channel, *space), on any grid that the model takes.

        See `squall.models.inputs.rollout`; the model is in evaluation mode meanwhile.
        """
        with evaluating(self.model):
            first = like_model(self.model, window)
            held = None if conditions is None else like_model(self.model, conditions)
            mask = None if self.mask is None else self.mask.to(first.device)
            return rollout(self.model, self.integrator, first, held, self.description.dt, steps, mask)

    def extra_repr(self) -> str:
        return f"dt={self.description.dt}, fields={self.description.fields}, state={self.state_shape}"


@dataclass(frozen=True)
class Contents:
    """What an exported folder says about its model, as plain values.

    Args:
        config: of the training, without the folder of the data.
        normalization: as `Normalization.to_dict` gives it.
        data: fields, grid and dt.
        state: the part of the model's state that no tensor holds.
    """

    config: dict[str, Any]
    normalization: dict[str, Any]
    data: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def of(
        cls, emulator: Emulator, config: Mapping[str, Any], normalization: Normalization
    ) -> tuple["Contents", bytes]:
        """The contents, and the bytes of model.safetensors.

        Raises:
            ExportError: if the state of the model holds more than tensors and plain values.
        """
        weights, state = split_state(emulator.model.state_dict())
        try:
            same = json.loads(json.dumps(state, allow_nan=False)) == state
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ExportError(
                f"the state of the model holds more than safetensors and JSON can: {', '.join(state)}. Keep tensors, "
                "numbers and text in its state dict"
            )
        about = dataclasses.asdict(emulator.description)
        about["coordinates"] = [axis.tolist() for axis in emulator.description.coordinates]
        name = Path(config["data"]["path"]).name
        config = {**config, "data": {**config["data"], "path": name}}
        return cls(config, normalization.to_dict(), about, state), tensor_bytes(weights)

    def emulator(
        self, weights: dict[str, Shaped[Tensor, "..."]], path: Path, beside: Mapping[str, str], *, trust: bool
    ) -> Emulator:
        """The model with its weights, built as for the training, on a grid without data.

        `beside` has the checksums of the files in `path` that describe conditions and mask, if there are some.
        """
        config, description = from_dict(self.config), _description(self.data)
        states = max(2, config.data.history + config.training.unroll)
        if beside:
            split, _ = read_description(RunFolder(path), beside, states)
        else:
            shape = (1, states, len(description.fields), *(len(axis) for axis in description.coordinates))
            split = Split(*[InMemory.described(torch.zeros(shape), description)] * 3)
        normalization = Normalization.from_dict(self.normalization)
        experiment = build(config, normalization, split=split, trusts=lambda source: trust)
        load_state(experiment.model, weights | self.state)
        return Emulator.of(experiment).eval()


def load(path: Path | str, *, trust: bool = False) -> Emulator:
    """The emulator of a folder that `squall export` wrote.

    Only emulator.json, model.safetensors, data.json and data.npz are read, after their checksum. model.pt2 is never
    opened.

    Args:
        path: the folder.
        trust: whether its model may be imported from outside the installed packages.

    Raises:
        ExportError: if it is no exported folder, or damaged.
        ConfigError: if its model is unknown, or code that is not trusted.
    """
    path = Path(path)
    if not (path / DESCRIPTION).exists():
        raise ExportError(f"{path} is not an exported model: it has no {DESCRIPTION}. `squall export` writes one")
    try:
        about = read_json(read_text(path / DESCRIPTION))
        if about["format"] != FORMAT:
            raise ExportError(
                f"{path} has format {about['format']!r}, but this squall reads {FORMAT}: install a newer one"
            )
        contents = Contents(**{field.name: about[field.name] for field in dataclasses.fields(Contents)})
        weights = _read_weights(path / WEIGHTS, about["files"][WEIGHTS])
        beside = {name: about["files"][name] for name in BESIDE if name in about["files"]}
    except (DocumentError, KeyError, TypeError, OSError) as error:
        raise ExportError(f"{path} is damaged: {type(error).__name__}: {error}. Export the run again") from error
    try:
        return contents.emulator(weights, path, beside, trust=trust)
    except (DataError, RunFolderError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ExportError(f"{path} is damaged: {' '.join(str(error).split())}. Export the run again") from error


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def describe_export(contents: Contents, files: Mapping[str, bytes], **more: Any) -> str:
    """The text of emulator.json."""
    checksums = {name: checksum(content) for name, content in files.items()}
    values = {"format": FORMAT, **more, "files": checksums, **dataclasses.asdict(contents)}
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _read_weights(path: Path, recorded: str) -> dict[str, Shaped[Tensor, "..."]]:
    if special := special_file(path):
        raise ExportError(f"{path} is {special}, not a file")
    content = path.read_bytes()
    if checksum(content) != recorded:
        raise ExportError(f"{path} is damaged: it does not match its checksum. Copy or export it again")
    try:
        return read_tensors(content)
    except Exception as error:  # safetensors has errors of its own
        raise ExportError(f"{path} is damaged: {error}. Export the run again") from error


def _description(values: Mapping[str, Any]) -> Description:
    """A description from plain values; what `describe` checks is checked."""
    coordinates = tuple(np.asarray(axis, dtype=np.float64) for axis in values["coordinates"])
    ends = tuple(map(str, values["boundary"]))
    names = ("dt", "fields", "name", "parameters", "provenance")
    checked = describe(
        (1, 2, len(values["fields"]), *(len(axis) for axis in coordinates)),
        coordinates=coordinates,
        boundary=["open" if end == "mixed" else end for end in ends],
        **{name: values[name] for name in names},
    )
    spacing = tuple(None if step is None else float(step) for step in values["spacing"])
    if len(spacing) != len(coordinates) or not math.isfinite(float(values["start"])):
        raise DataError(f"spacing is {spacing} for {len(coordinates)} axes")
    return dataclasses.replace(
        checked,
        spacing=spacing,
        boundary=ends,
        axes=tuple(map(str, values["axes"])),
        units={str(name): str(unit) for name, unit in values["units"].items()},
        start=float(values["start"]),
    )
