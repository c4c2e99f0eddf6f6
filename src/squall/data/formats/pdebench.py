"""PDEBench's layouts: arrays (sample, time, *space) side by side, or one group a trajectory."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from squall.data.arrays import Handle, Variable, open_hdf5
from squall.data.errors import DataError
from squall.data.formats.bag import read_bag
from squall.data.formats.layout import Layout, Reading, finish

COORDINATES = {"time": "t-coordinate", "x": "x-coordinate", "y": "y-coordinate", "z": "z-coordinate"}


def side_by_side(file: Any) -> bool:
    """Whether it has `tensor` or fields such as `density`, with the points beside them."""
    return "x-coordinate" in file and "t-coordinate" in file


def by_groups(file: Any) -> list[str]:
    """The groups of trajectories, in their order."""
    return sorted(
        name for name, item in file.items() if isinstance(item, h5py.Group) and "data" in item and "grid" in item
    )


def read_side_by_side(path: Path, place: Path, options: Reading) -> Layout:
    """`tensor` (sample, time, *space) or one array a field; numbers among the attributes are kept as parameters."""
    handle = Handle(place, open_hdf5, path)
    with open_hdf5(place) as file:
        shapes = {name: (item.shape, item.dtype) for name, item in file.items() if isinstance(item, h5py.Dataset)}
        parameters = {
            name: float(v) for name, v in file.attrs.items() if np.ndim(v) == 0 and not isinstance(v, str | bytes)
        }
        axes = ("batch", "time", *(axis for axis in "xyz" if f"{axis}-coordinate" in file))
    return read_bag(
        "PDEBench, one array a field",
        handle,
        shapes,
        options,
        axes=axes,
        coordinates=COORDINATES,
        name=path.stem,
        parameters=parameters,
    )


def read_groups(path: Path, place: Path, options: Reading) -> Layout:
    """`/0000/data` (time, *space, field), with `/0000/grid/{x,y,t}`.

    Raises:
        DataError: where the groups differ in shape, points or times.
    """
    with open_hdf5(place) as file:
        groups = by_groups(file)
        first = file[groups[0]]
        shape, kind = first["data"].shape, first["data"].dtype
        points = {name: item[()] for name, item in first["grid"].items()}
        times = points.pop("t", None)
        for name in groups:
            if file[name]["data"].shape != shape:
                raise DataError(
                    f"{path}: trajectories differ in shape: {groups[0]} {shape}, {name} {file[name]['data'].shape}; "
                    "keep those of one shape in a file"
                )
            for axis, values in {**points, "t": times}.items():
                if values is not None and not np.array_equal(file[name]["grid"][axis][()], values):
                    raise DataError(f"{path}: trajectories differ in grid/{axis}: {groups[0]} and {name}")
        provenance = {"config": str(text)} if (text := first.attrs.get("config")) is not None else {}
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
        Handle(place, open_hdf5, path),
        [Variable("data", keys, ("time", *axes, "channel"), tuple(names), kind)],
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
