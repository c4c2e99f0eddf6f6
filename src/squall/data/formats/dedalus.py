"""Output of Dedalus: fields in `tasks`, (time, *component, *space), their times and points in `scales`."""

import itertools
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Shaped

from squall.data.arrays import Handle, Variable
from squall.data.description import equal_step
from squall.data.errors import DataError
from squall.data.formats.layout import Reading, finish
from squall.data.hdf5 import dataset_of, member, members, open_file, open_hdf5, small_values
from squall.data.measure import areas
from squall.data.stored import Layout

TIMES = "scales/sim_time"


def is_dedalus(file: Any) -> bool:
    """Whether an HDF5 file has the groups of Dedalus, and times."""
    return isinstance(member(file, "tasks"), h5py.Group) and member(file, TIMES) is not None


def read_dedalus(path: Path, location: Path, options: Reading) -> Layout:
    """The layout of the output of a handler; the fields on the grid that most of them have make the state.

    Raises:
        DataError: where no field has a space axis, or one that is asked for is not there or lies on another grid.
    """
    notes: list[str] = []
    with open_file(path, location) as file:
        tasks = {name: dataset_of(file, f"tasks/{name}", f"tasks/{name}") for name in members(file["tasks"])}
        grids = {name: _grid(task) for name, task in tasks.items()}
        real = [name for name, task in tasks.items() if task.dtype.kind in "iuf" and grids[name]]
        chosen = list(options.get("fields") or _on_one_grid(real, grids))
        if not chosen or not set(chosen) <= set(real):
            raise DataError(f"{path}: fields: got {', '.join(chosen) or 'none'}; on a grid are {', '.join(real)}")
        space = grids[chosen[0]]
        if different := [name for name in chosen if grids[name] != space]:
            raise DataError(f"{path}: '{different[0]}' lies on {grids[different[0]]}, '{chosen[0]}' on {space}")
        known = {name: _variable(name, tasks[name], tuple(space)) for name in real if grids[name] == space}
        notes += [f"left out '{name}': it holds {t.dtype} {t.shape}" for name, t in tasks.items() if name not in known]
        times = small_values(dataset_of(file, TIMES, TIMES), TIMES)
        points = [_points(file, tasks[chosen[0]], axis) for axis in space]
    ends = ["wall" if p is not None and equal_step(p) is None else "periodic" for p in points]
    notes.append(
        "boundary: axes of equally spaced points are taken as periodic, others as walls (boundary= says otherwise)"
    )
    states = [known[name] for name in chosen]
    uneven = "wall" in ends and all(p is not None for p in points)
    return finish(
        "Dedalus, HDF5",
        Handle(location, open_hdf5, path),
        states,
        [variable for name, variable in known.items() if name not in chosen],
        (1, len(times), sum(len(variable.channels) for variable in states), *space.values()),
        options,
        times=times,
        coordinates=points,
        notes=notes,
        axes=tuple(space),
        boundary=ends,
        measure=areas([p for p in points if p is not None], list(space)) if uneven else None,
    )


def _labels(task: Any) -> list[str]:
    """What the axes after the time are; components have no name."""
    return [dim.label for dim in task.dims][1:]


def _grid(task: Any) -> dict[str, int]:
    """The length of each space axis."""
    return {label: n for label, n in zip(_labels(task), task.shape[1:], strict=True) if label}


def _on_one_grid(names: list[str], grids: dict[str, dict[str, int]]) -> list[str]:
    """Of the fields on the largest grid: averages over an axis have one point there."""
    largest = max((math.prod(grids[name].values()) for name in names), default=0)
    first = next((grids[name] for name in names if math.prod(grids[name].values()) == largest), {})
    return [name for name in names if grids[name] == first]


def _variable(name: str, task: Any, space: tuple[str, ...]) -> Variable:
    axes = tuple(label or "channel" for label in _labels(task))
    sizes = [n for axis, n in zip(axes, task.shape[1:], strict=True) if axis == "channel"]
    named = all(n == len(space) for n in sizes)
    parts = itertools.product(*(space if named else map(str, range(n)) for n in sizes))
    channels = tuple("_".join((name, *(["".join(part)] if part else []))) for part in parts)
    return Variable(name, f"tasks/{name}", ("time", *axes), channels, task.dtype)


def _points(file: Any, task: Any, axis: str) -> Shaped[np.ndarray, " _"] | None:
    """The scale of an axis, which the file attaches to the field."""
    number = _labels(task).index(axis) + 1
    names = [scale.name for scale in task.dims[number].values()]
    return small_values(dataset_of(file, names[0], names[0]), names[0]) if names else None
