"""A file of any other layout as a source; what its reader understood, completed by what the user says."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Shaped

from squall._types import Trajectories
from squall.data.arrays import Handle, Variable
from squall.data.conditions import Areas, ConditionValues
from squall.data.description import describe, equal_step
from squall.data.errors import DataError
from squall.data.missing import Screened
from squall.data.source import Numbers
from squall.data.stored import Layout, Stored


class Reading(TypedDict, total=False):
    """The options of `open`, for what a file does not say."""

    dt: float | None
    axes: str | None
    fields: Sequence[str] | None
    lengths: float | Sequence[float] | None
    coordinates: Sequence[Any] | None
    boundary: str | Sequence[str] | None
    fill: float | None
    gaps: bool
    initial: float | None


class OneTimeError(DataError):
    """A file of a single time: no step can be learned from it alone."""


class ArrayFile(Screened, Stored):
    """Trajectories in a file of another layout; `squall.data.open` makes it.

    NaN and declared fill values are missing values (`mask`, `valid`).
    """

    def __init__(self, path: Path, layout: Layout, fill: float | None = None) -> None:
        self.path = path
        if fill is not None:
            states = (dataclasses.replace(v, fills=(*v.fills, float(fill))) for v in layout.states)
            layout = dataclasses.replace(layout, states=tuple(states))
        self.layout = layout
        self._means: dict[str, float] = {}

    @property
    def piece_bytes(self) -> int:
        """What has to be unpacked for one state, where the arrays lie in chunks along trajectories and times."""
        states = 1
        for variable in self.layout.states:
            chunks = (
                getattr(self.layout.handle.array(variable.key), "chunks", None)
                if isinstance(variable.key, str)
                else None
            )
            along = [n for n, axis in zip(chunks or (), variable.axes, strict=False) if axis in ("batch", "time")]
            states = max(states, int(np.prod(along)))
        return states * (self.nbytes // (self.shape[0] * self.shape[1]))

    def _raw(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        return self._states(trajectories, starts, length)

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        """Missing values of a condition are its mean: a model cannot be told NaN."""
        values = super()._condition(name, trajectories, starts, length)
        if torch.isnan(values).any():
            variable = next(v for v in self.layout.conditions if v.name == name)
            values = torch.where(torch.isnan(values), self._mean(variable), values)
        return values

    def _mean(self, variable: Variable) -> float:
        if variable.name not in self._means:
            total, count = 0.0, 0
            for chosen, start, stop in self.chunks():
                rows = torch.tensor(chosen if variable.by_trajectory else chosen[:1])
                length = stop - start if variable.by_time else 1
                piece = self._read(variable, rows, torch.full_like(rows, start), length)
                total += float(piece.nansum(dtype=torch.float64))
                count += int((~torch.isnan(piece)).sum())
                if not (variable.by_time or variable.by_trajectory):
                    break
            self._means[variable.name] = total / max(1, count)
        return self._means[variable.name]


def finish(
    format: str,
    handle: Handle,
    states: Sequence[Variable],
    conditions: Sequence[Variable],
    shape: tuple[int, ...],
    options: Reading,
    *,
    times: Shaped[np.ndarray, " time"] | None,
    coordinates: Sequence[Shaped[np.ndarray, " _"] | None],
    notes: list[str],
    measure: Areas | None = None,
    **about: Any,
) -> Layout:
    """A layout with its description: the step from `times`, the points from the file, what the options say instead.

    Raises:
        DataError: where the time step is not known, or times are not equally spaced.
    """
    path, initial = handle.shown, options.get("initial")
    if shape[1] < 2 and initial is None:
        raise OneTimeError(f"{path}: it has one time; at least two are needed to learn a step from")
    about.setdefault("name", path.stem)
    alone = initial is not None and (times is None or len(times) < 2)
    dt = options.get("dt") or (initial if alone else time_step(path, times))
    about["boundary"] = options.get("boundary") or about.get("boundary")
    if about["boundary"] is None:
        about["boundary"] = "periodic"
        notes.append("boundary: the file does not say it; taken as periodic (boundary= says otherwise)")
    points, lengths = options.get("coordinates"), options.get("lengths")
    extra = {key: about.pop(key) for key in ("units", "start") if key in about}
    if points is None and lengths is None and any(axis is not None for axis in coordinates):
        points = [np.arange(n) if p is None else p for p, n in zip(coordinates, shape[3:], strict=True)]
    elif points is None and lengths is None:
        notes.append(
            "coordinates: the file has none; the domain is taken as 1 long (lengths= or coordinates= say otherwise)"
        )
    span = None if times is None or len(times) == 0 else (float(times[0]), float(times[-1]))
    if span is not None and "first_time" not in about.get("provenance", {}):
        extra.setdefault("start", span[0])
    names = [channel for variable in states for channel in variable.channels]
    at_least_two = (shape[0], max(2, shape[1]), *shape[2:])
    description = describe(at_least_two, dt=dt or 0.0, fields=names, lengths=lengths, coordinates=points, **about)
    return Layout(
        format,
        handle,
        tuple(states),
        tuple(conditions),
        shape,
        dataclasses.replace(description, **extra),
        measure,
        tuple(notes),
        span,
    )


def time_step(path: Path, times: Shaped[np.ndarray, " time"] | None) -> float:
    """The step of equally spaced times.

    Raises:
        DataError: where there are none, or they are not equally spaced.
    """
    if times is None or len(times) < 2:
        raise DataError(f"{path}: the file does not say the time between two states; give dt=...")
    step = equal_step(np.asarray(times))
    if step is None or step <= 0:
        exact = np.asarray(times, dtype=np.float64)
        if equal_step(np.sort(exact)) is not None:
            raise DataError(
                f"{path}: the times are not in order: sort the states by time, as by xarray's sortby('time')"
            )
        gaps = np.diff(exact)
        raise DataError(
            f"{path}: the times are not equally spaced: neighbours are {gaps.min():g} to {gaps.max():g} apart. "
            "Interpolate the states to equal times (missing times may be NaN), or give dt=... to take them as equal"
        )
    return step
