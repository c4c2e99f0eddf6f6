"""A rollout of a trained run from a file of initial states into a file, some times after the other."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import squall
import squall.data
from squall._process.files import read_array
from squall.data import Description, Source
from squall.data.description import equal_step
from squall.data.streaming import stream
from squall.models.inputs import Conditions, Window, read_conditions
from squall.models.placement import like_model
from squall.runs.config import ConfigError
from squall.runs.trained import TrainedRun
from squall.training.state import split_state

ConditionsAt = Callable[[int, int], Conditions | None]
"""Conditions of some steps: of the first of them, and how many."""


@dataclass(frozen=True)
class Start:
    """From where a rollout starts.

    Attributes:
        window: the initial states (batch, history, channel, *space).
        conditions: gives the conditions of some steps.
        coordinates: the points of each axis.
        time: of the initial state.
        dates: what the file says about the date of its time 0.
    """

    window: Window
    conditions: ConditionsAt
    coordinates: tuple[Float[np.ndarray, " _points"], ...]
    time: float
    dates: Mapping[str, Any]


def read_start(
    run: TrainedRun,
    path: Path,
    steps: int,
    *,
    start: int = 0,
    axes: str | None = None,
    fields: Sequence[str] = (),
    forcings: Path | None = None,
) -> Start:
    """Initial states and conditions from files.

    Args:
        run: the trained run.
        path: of the initial states, in any format that `squall.data.open` reads; one time suffices. Without `axes`, a
            `.npy` file is an array (trajectory, channel, *space), or (trajectory, history, channel, *space).
        steps: of the rollout.
        start: time index in the file of the first state that is read; the rollout starts from the last of the history.
        axes: one word for each axis of the stored fields, where the file cannot say it: "batch x y".
        fields: what fields and conditions of the run are called in the files, as "temperature=t2m", where it differs.
        forcings: a file of any format with the conditions; by default that of the initial states.

    Raises:
        ConfigError: if fields or grid do not match those of the run, or a condition is missing or ends too early.
        squall.data.DataError: if a file cannot be read.
    """
    names = _names(run, fields)
    source, channels = (None, []) if path.suffix == ".npy" and axes is None else _matching(run, path, axes, names)
    history, about = run.inputs.history, run.description
    if source is None:
        window = run.window(_array(path, run))
        coordinates, time, first = _points(about, tuple(window.shape[3:])), 0.0, 0
        dates: Mapping[str, Any] = {}
    else:
        if start + history > source.shape[1] or start < 0:
            raise ConfigError(
                f"--start {start}: the model sees {history} state(s), but {path} has {source.shape[1]} times"
            )
        window = run.window(source.read(None, start, start + history)[:, :, channels])
        _refuse_masked(run, source, channels, path)
        first = start + history - 1
        coordinates, time = source.coordinates, float(source.times[first])
        said = source.description.provenance
        dates = {name: said[name] for name in ("first_time", "calendar") if name in said}
    if forcings is not None and not run.inputs.conditions:
        raise ConfigError(f"--forcings {forcings}: the run was trained without conditions, and needs none")
    given, name = (source, path) if forcings is None else (squall.data.open(forcings), forcings)
    if forcings is not None:
        first = history - 1 if source is None else first
    return Start(window, _conditions(run, given, name, names, window, first, steps), coordinates, time, dates)


def _names(run: TrainedRun, fields: Sequence[str]) -> dict[str, str]:
    """What the fields and conditions of a run are called in the files."""
    names = {name: name for name in (*run.source.fields, *run.inputs.conditions)}
    for pair in fields:
        own, equals, other = pair.partition("=")
        if not (own and equals and other) or own not in names:
            raise ConfigError(
                f"--fields {pair}: expected NAME=NAME_IN_THE_FILE, where NAME is a field or condition of the run: "
                + ", ".join(names)
            )
        names[own] = other
    return names


def _array(path: Path, run: TrainedRun) -> Float[Tensor, "batch *shape"]:
    """States from a .npy file; one channel may be left out."""
    states = read_array(path, "--initial")
    if run.source.channels == 1 and run.inputs.history == 1 and states.ndim == len(run.source.space) + 1:
        states = states[:, None]
    values, mask = torch.from_numpy(states), run.source.mask
    if mask is not None and values.shape[-mask.ndim :] == mask.shape:
        means = torch.tensor(run.normalization.mean, dtype=values.dtype).reshape(-1, *(1,) * (mask.ndim - 1))
        values = torch.where(torch.isfinite(values) | mask, values, means)
    if missing := int((~torch.isfinite(values)).sum()):
        raise ConfigError(f"--initial {path} holds {missing} numbers that are not finite")
    return values


def _matching(run: TrainedRun, path: Path, axes: str | None, names: Mapping[str, str]) -> tuple[Source, list[int]]:
    """The source at a path, and which of its channels are the fields of the run."""
    fields, dt = [names[name] for name in run.source.fields], run.description.dt
    source = squall.data.open(path, axes=axes, initial=dt)
    beside = {names[name] for name in run.inputs.conditions}
    if not set(fields) <= set(source.fields) or beside & set(source.fields):
        there = (*source.fields, *(c.name for c in source.conditions))
        if missing := [name for name in fields if name not in there]:
            raise ConfigError(
                f"{path} has no field '{missing[0]}': the run was trained on {', '.join(run.source.fields)}, and the "
                f"file has {', '.join(there)}. If it is called otherwise there: --fields "
                f"{next(own for own, other in names.items() if other == missing[0])}={there[0]}"
            )
        layout = getattr(source, "layout", None)  # a variable with levels has a channel for each
        owners = {channel: v.name for v in layout.states for channel in v.channels} if layout else {}
        wanted = list(dict.fromkeys(owners.get(name, name) for name in fields))
        source = squall.data.open(path, fields=wanted, axes=axes, initial=dt)
        if not set(fields) <= set(source.fields):
            raise ConfigError(f"{path} gives the fields {', '.join(source.fields)}; wanted are {', '.join(fields)}")
    return source, [source.fields.index(name) for name in fields]


def _refuse_masked(run: TrainedRun, source: Source, channels: list[int], path: Path) -> None:
    """Refuse initial states that lack values at points which the model was trained on."""
    mask, known = source.mask, run.source.mask
    if mask is None:
        return
    lacking = ~mask[channels] if known is None or known.shape != mask[channels].shape else ~mask[channels] & known
    if count := int(lacking.sum()):
        raise ConfigError(
            f"{path} has no value at {count} points that the model was trained on: fill them, or train with this mask"
        )


def _points(about: Description, space: tuple[int, ...]) -> tuple[Float[np.ndarray, " _points"], ...]:
    """The points of a grid of the same spacing as that of the training."""
    pairs = zip(space, about.coordinates, about.spacing, strict=True)
    return tuple(
        points if n == len(points) else points[0] + (1.0 if step is None else step) * np.arange(n)
        for n, points, step in pairs
    )


def _conditions(
    run: TrainedRun,
    source: Source | None,
    path: Path,
    called: Mapping[str, str],
    window: Window,
    first: int,
    steps: int,
) -> ConditionsAt:
    """How the conditions of the model are read, checked before anything is computed."""
    held = {} if source is None else {c.name: c for c in source.conditions}
    there = {name: held[other] for name, other in called.items() if other in held}
    names, batch, space = run.inputs.conditions, len(window), tuple(window.shape[3:])
    fixed = {name: run.constant(name) for name in names if name not in there and space == run.source.space}
    if missing := [name for name in names if name not in there and fixed.get(name) is None]:
        raise ConfigError(
            f"the model sees the condition '{missing[0]}', which {path} does not have"
            + (f" (it has {', '.join(held)})" if held else "")
            + ": name a file that has it by --forcings, or what it is called there by --fields"
        )
    used = [there[name] for name in names if name in there]
    moving = [condition.name for condition in used if condition.shape[1] > 1]
    # Read from times of another precision, dt may differ in its last digits.
    if source is not None and moving and abs(source.dt / run.description.dt - 1) > 1e-6:
        raise ConfigError(
            f"the forcing '{moving[0]}' of {path} has the time step {source.dt:g}, but the run predicts by "
            f"{run.description.dt:g}: give it at the times of the prediction"
        )
    if source is not None and used:
        if source.trajectories not in (1, batch):
            raise ConfigError(f"{path} has conditions of {source.trajectories} trajectories for {batch} initial states")
        for condition in used:
            left = condition.shape[1] - first
            if condition.shape[1] > 1 and left < steps:
                raise ConfigError(
                    f"the forcing '{condition.name}' of {path} ends before the rollout: {steps} steps need it at "
                    f"{steps} times from the initial state on, but there are {max(left, 0)}: give fewer steps"
                )
    rows = torch.zeros(batch, dtype=torch.int64) if source is None or source.trajectories == 1 else torch.arange(batch)

    def at(step: int, count: int) -> Conditions | None:
        if not names:
            return None
        values = []
        for name in names:
            if name in there and source is not None:
                varies = there[name].shape[1] > 1
                starts = torch.full_like(rows, first + step if varies else 0)
                value = read_conditions(source, [called[name]], rows, starts, count if varies else 1)
            else:
                value = fixed[name]
            assert value is not None
            values.append(value.expand(batch, -1, -1, *space))
        times = max(value.shape[1] for value in values)
        return torch.cat([value.expand(-1, times, *value.shape[2:]) for value in values], 2)

    return at


def predict_to_file(
    run: TrainedRun,
    start: Start,
    steps: int,
    out: Path,
    *,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Roll out into a file, block by block; the same call goes on where one was cut off.

    Args:
        run: the trained run.
        start: as `read_start` gives it.
        steps: how many.
        out: the file: `.hdf5` or `.h5` (The Well's layout), `.nc` or `.zarr`. While it grows, its name has `.part`.
        about: more for its provenance.
        progress: told how many steps are done.

    Raises:
        FileExistsError: if the file is there already.
        squall.data.DataError: if the part that is there is of another prediction.
    """
    window = like_model(run.model, start.window)
    batch, history, channels, *space = window.shape
    shape = (batch, steps + 1, channels, *space)
    same_grid = tuple(space) == run.source.space
    mask = run.source.mask
    shown = None if out.suffix in WELL else mask
    provenance = {
        **(about or {}),
        **start.dates,
        "checkpoint": run.checkpoint,
        "step": run.step,
        "steps": steps,
        "weights": _digest(*(x for part in split_state(run.model.state_dict()) for x in part.values())),
        "initial": _digest(window, start.conditions(0, 1), start.conditions(steps - 1, 1)),
        "squall": squall.__version__,
    }
    description = _description(run.description, start, provenance)
    measure = run.source.measure if same_grid else None
    emulator = run.emulator
    dtype = torch.float64 if window.dtype == torch.float64 else torch.float32  # files know no bfloat16
    with stream(out, shape, dtype, description, mask, measure) as file:
        done = file.written // file.block * file.block
        states = _last(file, window, done)
        finite = True
        while done <= steps:
            count = min(file.block, steps + 1 - done)
            computed = count if done else count - 1
            conditions = start.conditions(max(done - 1, 0), max(computed, 1))
            block = emulator.roll(states, conditions, computed)[:, 1 if done else 0 :]
            states = torch.cat([states, block if done else block[:, 1:]], 1)[:, -history:]
            finite, block = finite and bool(torch.isfinite(block).all()), block.to(dtype)
            file.write(done, block if shown is None else block.masked_fill(~shown.to(block.device), torch.nan))
            done += count
            progress(done - 1)
    if not finite:
        warnings.warn(f"a rollout became NaN or infinite: {out} holds what was predicted before", stacklevel=2)
    return out


WELL = (".hdf5", ".h5")
"""Suffixes of the layout that keeps a mask beside the states; in the others masked points are NaN."""


def _last(file: Any, window: Window, done: int) -> Window:
    """The states that a rollout goes on from, of which the newest are in the file."""
    history = window.shape[1]
    if done == 0:
        return window
    there = file.read(max(0, done - history), done).to(window)
    if file.mask is not None:
        there = torch.where(file.mask.to(there.device), there, window[:, -1:])
    return torch.cat([window[:, :-1], there], 1)[:, -history:]


def _description(about: Description, start: Start, provenance: Mapping[str, Any]) -> Description:
    spacing = tuple(
        step if len(points) == len(old) and np.array_equal(points, old) else equal_step(points)
        for points, old, step in zip(start.coordinates, about.coordinates, about.spacing, strict=True)
    )
    return replace(
        about,
        coordinates=start.coordinates,
        spacing=spacing,
        name=f"{about.name}-prediction",
        parameters={},
        provenance=json.loads(json.dumps(provenance)),
        start=start.time,
    )


def _digest(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):  # as bytes: NumPy knows no bfloat16
            plain = value.detach().cpu().to_dense().flatten().view(torch.uint8)
            digest.update(plain.numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
