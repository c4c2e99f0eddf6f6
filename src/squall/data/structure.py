"""Everything in a file of The Well's layout but the states: what fields lie where, axes, origin."""

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import Bool, Float, Shaped

from squall._process.documents import DocumentError, read_json
from squall.data.arrays import Handle, InPlace, Variable
from squall.data.conditions import Areas, Mask, Valid, as_mask, as_measure, as_valid
from squall.data.description import AXES, Description, equal_step
from squall.data.errors import DataError
from squall.data.hdf5 import dataset_of, in_one_piece, member, members, open_file, small_values
from squall.data.measure import areas
from squall.data.stored import Layout

FIELD_GROUPS = ("t0_fields", "t1_fields", "t2_fields")
"""Scalar, vector and matrix fields; the tensor order is the place in this list."""

GROUPS = ("boundary_conditions", "scalars", *FIELD_GROUPS)
"""The groups that a file of The Well has, even where they are empty."""


class Structure(NamedTuple):
    """What a file holds besides its layout."""

    layout: Layout
    mask: Mask | None
    valid: Valid | None
    constant_fields: tuple[str, ...]
    attributes: dict[str, Any]


class WellFile:
    """The arrays of a file by their paths: the states in one piece are read past HDF5, all others through it.

    Args:
        shown: the name for messages.
        pieces: offset, shape and type of the states in one piece.
        cache_bytes: room for chunks.
        location: the file.
    """

    def __init__(
        self, shown: Path, pieces: Mapping[str, tuple[int, tuple[int, ...], np.dtype]], cache_bytes: int, location: Path
    ) -> None:
        self._shown, self._location, self._pieces, self._cache_bytes = shown, location, pieces, cache_bytes
        self._file: Any = None
        self._descriptor: int | None = None  # for `close`, should the file not open
        self._descriptor = os.open(location, os.O_RDONLY)

    def __getitem__(self, key: str) -> Any:
        if key in self._pieces and self._descriptor is not None and hasattr(os, "preadv"):
            return InPlace(self._descriptor, *self._pieces[key])
        if self._file is None:
            self._file = open_file(self._shown, self._location, rdcc_nbytes=self._cache_bytes)
        return dataset_of(self._file, key, key)

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if self._file is not None:
            self._file.close()

    def __del__(self) -> None:
        self.close()


def read_structure(
    path: Path, location: Path, file: Any, chosen: Sequence[str] | None = None, initial: float | None = None
) -> Structure:
    """Read and check an open `h5py.File`, without its states; `chosen` fields make the state, the others forcings.

    Args:
        path: for messages.
        location: of the file.
        initial: dt of a file that may have one time only.

    Raises:
        DataError: a group missing, no field, one time only, times unequally spaced, shapes that do not fit.
    """
    _check_groups(file)
    dimensions = file["dimensions"]
    axes = _space_axes(dimensions)
    clock, *lines = (dataset_of(dimensions, name, f"dimensions/{name}") for name in ("time", *axes))
    space = tuple(int(line.shape[-1]) for line in lines)
    times = np.atleast_2d(small_values(clock, "dimensions/time"))
    alone = initial if times.shape[1] < 2 else None
    if times.shape[1] < 2 and alone is None:
        raise DataError("it has one time; at least two are needed to learn a step from")
    stored, constant = _fields(file, axes)
    batch = _trajectories(file, stored)
    for variable in stored:
        lengths = {"batch": batch, "time": times.shape[1], "": 1, "channel": len(axes)}
        _check_shape(file, variable, lengths | dict(zip(axes, space, strict=True)))
    varying = {variable.name: variable for variable in stored}
    if chosen is not None and not set(chosen) <= set(varying):
        raise DataError(f"fields: got {', '.join(chosen)}; the file has {', '.join(varying)}")
    names = [n for n, variable in varying.items() if not _role(file[variable.key])] if chosen is None else list(chosen)
    stored = tuple(varying[name] for name in names)
    forcings = tuple(variable for name, variable in varying.items() if name not in names)
    start, dt = _clock(times, clock.attrs) if alone is None else (float(times[0, 0]), alone)
    lattice = [_axis(line) for line in lines]
    fields = tuple(itertools.chain.from_iterable(variable.channels for variable in stored))
    shape = (batch, times.shape[1], len(fields), *space)
    pieces = {str(v.key): (x.id.get_offset(), x.shape, x.dtype) for v in stored if in_one_piece(x := file[v.key])}
    layout = Layout(
        format="The Well, HDF5",
        handle=Handle(location, functools.partial(WellFile, path, pieces, _cache_bytes(file, stored)), path),
        states=stored,
        conditions=_conditions(file, axes, constant, forcings),
        shape=shape,
        measure=_measure(file, constant, axes, [points for points, _ in lattice]),
        description=Description(
            dt=dt,
            fields=fields,
            coordinates=tuple(points for points, _ in lattice),
            spacing=tuple(step for _, step in lattice),
            boundary=tuple(_boundary(file["boundary_conditions"], axis) for axis in axes),
            name=str(_plain(file.attrs.get("dataset_name", "trajectories"))),
            parameters=_parameters(file.attrs),
            provenance=_provenance(file.attrs),
            start=start,
            axes=axes,
            units=_units(file.attrs),
        ),
    )
    return Structure(
        layout=layout,
        mask=as_mask(_mask(file, constant, fields, shape), shape),
        valid=as_valid(_valid(file), shape),
        constant_fields=tuple(key.rpartition("/")[2] for key in constant if not _role(file[key])),
        attributes={name: _plain(value) for name, value in file.attrs.items()},
    )


def _check_groups(file: Any) -> None:
    wanted = ("dimensions", *GROUPS)
    missing = [group for group in wanted if not isinstance(member(file, group), h5py.Group)]
    if missing:
        there = ", ".join(list(file)[:8]) or "nothing"
        raise DataError(
            f"the group(s) {', '.join(missing)} are missing; found: {there}. The layout of The Well has "
            f"{', '.join(wanted)}, also where they are empty: `squall.data.write` writes it"
        )


def _space_axes(dimensions: Any) -> tuple[str, ...]:
    named = dimensions.attrs.get("spatial_dims")
    axes = (
        tuple(axis for axis in AXES if member(dimensions, axis) is not None)
        if named is None
        else tuple(map(str, _plain(named)))
    )
    if not 1 <= len(axes) <= 3:
        raise DataError(f"dimensions@spatial_dims names {len(axes)} space axes {axes}; expected one to three")
    missing = [name for name in ("time", *axes) if member(dimensions, name) is None]
    if missing:
        raise DataError(f"the axes {', '.join(missing)} are missing in the group dimensions; found: {list(dimensions)}")
    return axes


def _fields(file: Any, axes: tuple[str, ...]) -> tuple[tuple[Variable, ...], tuple[str, ...]]:
    """The fields that vary in time, and the keys of the others."""
    stored: list[Variable] = []
    constant: list[str] = []
    for order, group in enumerate(FIELD_GROUPS):
        for name in map(str, _plain(file[group].attrs.get("field_names", list(file[group])))):
            if member(file[group], name) is None:
                raise DataError(f"the field '{name}' is named in {group}@field_names but is not there")
            if "/" in name:
                raise DataError(f"the field '{name}' of {group}@field_names has a '/' in its name")
            if member(file[group], name).attrs.get("time_varying", True):
                stored.append(_variable(file, f"{group}/{name}", order, axes))
            else:
                constant.append(f"{group}/{name}")
    if not stored:
        only = f" (constant ones: {', '.join(key.rpartition('/')[2] for key in constant)})" if constant else ""
        raise DataError(
            f"there is no field that varies in time in {', '.join(FIELD_GROUPS)}{only}; a trajectory needs "
            "at least one: `squall.data.write` writes a file from an array"
        )
    return tuple(stored), tuple(constant)


def _variable(file: Any, key: str, order: int, axes: tuple[str, ...]) -> Variable:
    """A field of the tensor order 0, 1 or 2, with a channel for each component."""
    dataset = dataset_of(file, key, key)
    if dataset.dtype.kind != "f" or dataset.dtype.itemsize > 8:
        raise DataError(
            f"the field '{key}' holds {dataset.dtype}; expected floats of up to 64 bits. In a copy, write complex "
            "numbers as two fields, of the real and the imaginary parts, and whole numbers as float64"
        )
    varying = tuple(map(bool, dataset.attrs.get("dim_varying", [True] * len(axes))))
    if len(varying) != len(axes):
        raise DataError(f"the field '{key}' has {len(varying)} dim_varying for {len(axes)} space axes {axes}")
    leads = {"batch": "sample_varying", "time": "time_varying"}
    leading = [axis for axis, attribute in leads.items() if dataset.attrs.get(attribute, True)]
    # The Well's own readers differ: an axis that does not vary is dropped for one, of length 1 for the other.
    kept = dataset.ndim - len(leading) - order == len(axes)
    space = [axis if vary else "" for axis, vary in zip(axes, varying, strict=True) if vary or kept]
    name = key.rpartition("/")[2]
    parts = map("".join, itertools.product(axes, repeat=order))
    channels = tuple(f"{name}_{part}" if part else name for part in parts)
    return Variable(name, key, (*leading, *space, *("channel",) * order), channels, dataset.dtype)


def _role(dataset: Any) -> str:
    """What squall wrote the array for: "mask", "valid", "measure" or "forcing"; nothing in files of others."""
    return str(_plain(dataset.attrs.get("role", "")))


def _conditions(
    file: Any, axes: tuple[str, ...], constant: tuple[str, ...], forcings: tuple[Variable, ...]
) -> tuple[Variable, ...]:
    """Fields that do not change in time, scalars, and fields that are not part of the state."""
    roles = ("mask", "valid", "measure")
    keys = [key for key in constant if dataset_of(file, key, key).dtype.kind == "f"]
    fixed = [_variable(file, key, FIELD_GROUPS.index(key.partition("/")[0]), axes) for key in keys]
    variables = [variable for variable in (*fixed, *forcings) if _role(file[variable.key]) not in roles]
    scalars = members(file["scalars"])
    first = [name for name in map(str, _plain(file["scalars"].attrs.get("field_names", []))) if name in scalars]
    for name in dict.fromkeys([*first, *scalars]):
        scalar = scalars[name]
        if not isinstance(scalar, h5py.Dataset) or scalar.dtype.kind not in "iuf" or _role(scalar) in roles:
            continue
        varying = {"batch": "sample_varying", "time": "time_varying"}
        leading = tuple(axis for axis, attribute in varying.items() if scalar.attrs.get(attribute, False))
        variables.append(Variable(name, f"scalars/{name}", leading, (name,), scalar.dtype))
    return tuple(variables)


def _mask(
    file: Any, constant: tuple[str, ...], fields: tuple[str, ...], shape: tuple[int, ...]
) -> Bool[np.ndarray, "channel *space"] | None:
    """Valid points (channel, *space): one array for all fields, or one for each."""
    stored = [dataset_of(file, key, key) for key in constant if _role(file[key]) == "mask"]
    masks = {_plain(mask.attrs.get("of", "")): small_values(mask, mask.name) > 0 for mask in stored}
    if not masks:
        return None
    return np.stack([masks.get(name, masks.get("", np.ones(shape[3:], bool))) for name in fields])


def _valid(file: Any) -> Bool[np.ndarray, "trajectory time"] | None:
    names = [name for name, scalar in members(file["scalars"]).items() if _role(scalar) == "valid"]
    return small_values(dataset_of(file["scalars"], names[0], f"scalars/{names[0]}"), names[0]) > 0 if names else None


def _measure(
    file: Any, constant: tuple[str, ...], axes: tuple[str, ...], coordinates: list[Float[np.ndarray, " _points"]]
) -> Areas | None:
    key = next((key for key in constant if _role(file[key]) == "measure"), None)
    if key is not None:
        stored = small_values(dataset_of(file, key, key), key)
        return as_measure(stored, stored.shape)
    spherical = _plain(file.attrs.get("grid_type", "")) == "spherical"
    roles = {"theta": "colatitude", "latitude": "latitude", "lat": "latitude"} if spherical else {}
    return areas(coordinates, [roles.get(axis, axis) for axis in axes]) if spherical else None


def _trajectories(file: Any, stored: tuple[Variable, ...]) -> int:
    counts = {variable.key: file[variable.key].shape[0] for variable in stored if variable.by_trajectory}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{key}' {count}" for key, count in counts.items())
        raise DataError(f"the fields differ in the number of trajectories: {listed}")
    batch = next(iter(counts.values())) if counts else int(file.attrs.get("n_trajectories", 1))
    if batch < 1:
        raise DataError("it has no trajectory")
    return batch


def _check_shape(file: Any, variable: Variable, lengths: Mapping[str, int]) -> None:
    expected, shape = tuple(lengths[axis] for axis in variable.axes), file[variable.key].shape
    if shape != expected:
        raise DataError(
            f"the field '{variable.key}' has the shape {shape}; by the axes in dimensions and its attributes "
            f"sample_varying, time_varying and dim_varying it should have {expected}"
        )


def _clock(times: Shaped[np.ndarray, "row time"], attributes: Any) -> tuple[float, float]:
    """Time of the first state and the step; `times` has one row, or one per trajectory."""
    if "step" in attributes:
        step = float(attributes["step"])
        if step <= 0 or not all(_explains(row, float(row[0]), step) for row in times):
            raise DataError(
                f"the times do not fit the step {step:g} in the attribute dimensions/time@step: correct the "
                "one or remove the other"
            )
        return float(attributes.get("start", times[0, 0])), step
    steps = [step for step in map(equal_step, times) if step is not None and step > 0]
    if len(steps) < len(times) or max(steps) - min(steps) > 1e-3 * min(steps):
        gaps = np.diff(times.astype(np.float64), axis=1)
        raise DataError(
            f"the times are not equally spaced: neighbours are {gaps.min():g} to {gaps.max():g} apart. One "
            "step of fixed size is learned: interpolate the states to equal times, or cut the file where the "
            "step changes"
        )
    return float(times[0, 0]), steps[0]


def _axis(dataset: Any) -> tuple[Shaped[np.ndarray, " points"], float | None]:
    """Points and spacing of a space axis; of the first trajectory where each has its own."""
    points = np.atleast_2d(small_values(dataset, dataset.name))[0]
    if "step" in dataset.attrs and "start" in dataset.attrs:
        start, step = float(dataset.attrs["start"]), float(dataset.attrs["step"])
        if _explains(points, start, step):
            return start + step * np.arange(len(points)), abs(step)
    step = equal_step(points)
    return points.astype(np.float64), None if step is None else abs(step)


def _explains(points: Shaped[np.ndarray, " points"], start: float, step: float) -> bool:
    """Whether the points are start + i·step, to the rounding of float32."""
    line = start + step * np.arange(len(points))
    tolerance = 4 * float(np.finfo(np.float32).eps) * max(abs(line[0]), abs(line[-1]))
    return bool(np.abs(points.astype(np.float64) - line).max() <= tolerance)


def _boundary(conditions: Any, axis: str) -> str:
    """As The Well reads it: an end without a condition is open."""
    ends = ["open", "open"]
    for name in conditions:
        condition = member(conditions, name)
        if condition is None:
            continue
        touched = [str(name) for name in _plain(condition.attrs.get("associated_dims", []))]
        if axis not in touched or "bc_type" not in condition.attrs or member(condition, "mask") is None:
            continue
        key = f"boundary_conditions/{name}/mask"
        mask = np.moveaxis(small_values(dataset_of(condition, "mask", key), key), touched.index(axis), 0)
        for end, index in enumerate((0, -1)):
            if mask[index].any():
                ends[end] = str(_plain(condition.attrs["bc_type"])).lower()
    return ends[0] if ends[0] == ends[1] else "mixed"


def _parameters(attributes: Any) -> dict[str, float | str]:
    names = map(str, _plain(attributes.get("simulation_parameters", [])))
    values = {name: _plain(attributes[name]) for name in names if name in attributes}
    return {name: float(v) if isinstance(v, int | float) else str(v) for name, v in values.items()}


def _units(attributes: Any) -> dict[str, str]:
    units = _json(attributes, "units")
    return {str(name): str(unit) for name, unit in units.items()} if isinstance(units, dict) else {}


def _provenance(attributes: Any) -> dict[str, Any]:
    provenance = _json(attributes, "provenance")
    return provenance if isinstance(provenance, dict) else {"provenance": provenance}


def _json(attributes: Any, name: str) -> Any:
    """An attribute that squall writes as JSON; in a file of others it may be anything."""
    value = _plain(attributes.get(name, "{}"))
    try:
        return read_json(value) if isinstance(value, str) else value
    except DocumentError:
        return value


def _cache_bytes(file: Any, stored: tuple[Variable, ...]) -> int:
    """Room for two chunks: HDF5 unpacks a chunk anew at every read where it does not fit into its cache."""
    chunks = (np.prod(file[variable.key].chunks or 0) * variable.dtype.itemsize for variable in stored)
    return max(2**20, 2 * int(max(chunks)))


def _plain(value: Any) -> Any:
    """An attribute as Python's own text, number or list."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value
