"""PDEBench's layouts: arrays (sample, time, *space) side by side, or one group a trajectory."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from squall.data.arrays import Handle, Variable
from squall.data.errors import DataError
from squall.data.formats.bag import read_bag
from squall.data.formats.layout import Reading, finish
from squall.data.hdf5 import dataset_of, members, open_file, open_hdf5, small_values
from squall.data.stored import Layout


def side_by_side(file: Any) -> bool:
    """Whether it has `tensor` or fields such as `density`, with the points beside them."""
    return {"x-coordinate", "t-coordinate"} <= set(file)


def by_groups(file: Any) -> list[str]:
    """The groups of trajectories, in their order."""
    return sorted(
        name for name, item in members(file).items() if isinstance(item, h5py.Group) and {"data", "grid"} <= set(item)
    )


def read_side_by_side(path: Path, location: Path, options: Reading) -> Layout:
    """`tensor` (sample, time, *space) or one array a field; numbers among the attributes are kept as parameters."""
    handle = Handle(location, open_hdf5, path)
    with open_file(path, location) as file:
        items = members(file)
        shapes = {name: (item.shape, item.dtype) for name, item in items.items() if isinstance(item, h5py.Dataset)}
        parameters = {
            name: float(v) for name, v in file.attrs.items() if np.ndim(v) == 0 and not isinstance(v, str | bytes)
        }
        axes = ("batch", "time", *(axis for axis in "xyz" if f"{axis}-coordinate" in items))
    return read_bag(
        "PDEBench, one array a field",
        handle,
        shapes,
        options,
        axes=axes,
        name=path.stem,
        parameters=parameters,
    )


def read_groups(path: Path, location: Path, options: Reading) -> Layout:
    """`/0000/data` (time, *space, field), with `/0000/grid/{x,y,t}`.

    Raises:
        DataError: where the groups differ in shape, points or times.
    """
    with open_file(path, location) as file:
        groups = by_groups(file)
        data = dataset_of(file, f"{groups[0]}/data", f"{groups[0]}/data")
        shape, dtype = data.shape, data.dtype
        points = _grid(file, groups[0])
        for name in groups:
            other = dataset_of(file, f"{name}/data", f"{name}/data").shape
            if other != shape:
                raise DataError(
                    f"{path}: trajectories differ in shape: {groups[0]} {shape}, {name} {other}; keep those of one "
                    "shape in a file"
                )
            grid = _grid(file, name)
            for axis, values in points.items():
                if axis not in grid or not np.array_equal(grid[axis], values):
                    raise DataError(f"{path}: trajectories differ in grid/{axis}: {groups[0]} and {name}")
        times = points.pop("t", None)
        provenance = {"config": str(text)} if (text := file[groups[0]].attrs.get("config")) is not None else {}
        notes = [f"left out '{name}'" for name in file if name not in groups]
    axes = tuple(axis for axis in "xyz" if axis in points)
    if len(shape) != len(axes) + 2:
        raise DataError(f"{path}: '{groups[0]}/data' has the shape {shape}; expected (time, {', '.join(axes)}, field)")
    names = options.get("fields") or (["u"] if shape[-1] == 1 else [f"u{i}" for i in range(shape[-1])])
    if len(names) != shape[-1]:
        raise DataError(f"fields: got {len(names)} names {tuple(names)} for {shape[-1]} channels of data")
    keys = tuple(f"{name}/data" for name in groups)
    return finish(
        "PDEBench, one group a trajectory",
        Handle(location, open_hdf5, path),
        [Variable("data", keys, ("time", *axes, "channel"), tuple(names), dtype)],
        [],
        (len(groups), shape[0], shape[-1], *shape[1:-1]),
        options,
        times=times,
        coordinates=[points[axis] for axis in axes],
        notes=notes,
        axes=axes,
        name=path.stem,
        provenance=provenance,
    )


def _grid(file: Any, group: str) -> dict[str, Any]:
    """The points of each axis, and the times, of a trajectory."""
    keys = {name: f"{group}/grid/{name}" for name in members(file[group])["grid"]}
    return {name: small_values(dataset_of(file, key, key), key) for name, key in keys.items()}
