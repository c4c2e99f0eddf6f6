"""Everything in a file of The Well's layout but the states: what fields lie where, axes, origin."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from squall._process.documents import DocumentError, read_json
from squall.data.arrays import Variable
from squall.data.conditions import Areas, Mask, Valid, as_mask, as_measure, as_valid
from squall.data.description import AXES, Description, equal_step
from squall.data.errors import DataError
from squall.data.hdf5 import dataset_of, in_one_piece, member, members, small_values
from squall.data.measure import areas

FIELD_GROUPS = ("t0_fields", "t1_fields", "t2_fields")
"""Scalar, vector and matrix fields; the tensor order is the place in this list."""

GROUPS = ("boundary_conditions", "scalars", *FIELD_GROUPS)
"""The groups that a file of The Well has, even where they are empty."""


@dataclass(frozen=True)
class StoredField:
    """How one field lies in the file.

    Attributes:
        key: its path in the file.
        dtype: of the numbers on the disk.
        shape: of the whole.
        order: 0 for a scalar field, 1 for a vector, 2 for a matrix.
        sample_varying: whether each trajectory has its own.
        dim_varying: for each space axis, whether the field varies along it.
        offset: place of the first number in the file where all lie there in one piece, plainly; else `None`.
        channels: names of its components.
    """

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    order: int
    sample_varying: bool
    dim_varying: tuple[bool, ...]
    offset: int | None
    channels: tuple[str, ...]

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of what is stored for one trajectory and time."""
        return self.shape[2 if self.sample_varying else 1 :]


@dataclass(frozen=True)
class Structure:
    """What a file holds: its fields that vary in time, the names of the others, and the rest."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: tuple[StoredField, ...]
    constant_fields: tuple[str, ...]
    conditions: tuple[Variable, ...]
    mask: Mask | None
    valid: Valid | None
    measure: Areas | None
    description: Description
    attributes: dict[str, Any]
    cache_bytes: int


def read_structure(file: Any, chosen: Sequence[str] | None = None, initial: float | None = None) -> Structure:
    """Read and check an open `h5py.File`, without its states; `chosen` fields make the state, the others forcings.

    Args:
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
    batch = _trajectories(stored, file.attrs)
    for field in stored:
        _check_shape(field, batch, times.shape[1], space)
    varying = {field.key.rpartition("/")[2]: field for field in stored}
    if chosen is not None and not set(chosen) <= set(varying):
        raise DataError(f"fields: got {', '.join(chosen)}; the file has {', '.join(varying)}")
    names = [n for n, field in varying.items() if not _role(file[field.key])] if chosen is None else list(chosen)
    stored = tuple(varying[name] for name in names)
    forcings = tuple(field for name, field in varying.items() if name not in names)
    start, dt = _clock(times, clock.attrs) if alone is None else (float(times[0, 0]), alone)
    lattice = [_axis(line) for line in lines]
    fields = tuple(itertools.chain.from_iterable(field.channels for field in stored))
    number = np.result_type(np.float32, *(field.dtype for field in stored))
    shape = (batch, times.shape[1], len(fields), *space)
    return Structure(
        shape=shape,
        dtype=torch.float64 if number == np.float64 else torch.float32,
        stored=stored,
        constant_fields=tuple(key.rpartition("/")[2] for key in constant if not _role(file[key])),
        conditions=_conditions(file, axes, constant, forcings),
        mask=as_mask(_mask(file, constant, fields, shape), shape),
        valid=as_valid(_valid(file), shape),
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
        attributes={name: _plain(value) for name, value in file.attrs.items()},
        cache_bytes=_cache_bytes(file, stored),
    )


def _check_groups(file: Any) -> None:
    wanted = ("dimensions", *GROUPS)
    missing = [group for group in wanted if not isinstance(member(file, group), h5py.Group)]
    if missing:
        found = ", ".join(list(file)[:8]) or "nothing"
        raise DataError(
            f"the group(s) {', '.join(missing)} are missing; found: {found}. The layout of The Well has "
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


def _fields(file: Any, axes: tuple[str, ...]) -> tuple[tuple[StoredField, ...], tuple[str, ...]]:
    """The fields that vary in time, and the keys of the others."""
    stored: list[StoredField] = []
    constant: list[str] = []
    for order, group in enumerate(FIELD_GROUPS):
        for name in map(str, _plain(file[group].attrs.get("field_names", list(file[group])))):
            if member(file[group], name) is None:
                raise DataError(f"the field '{name}' is named in {group}@field_names but is not there")
            if "/" in name:
                raise DataError(f"the field '{name}' of {group}@field_names has a '/' in its name")
            if member(file[group], name).attrs.get("time_varying", True):
                stored.append(_stored_field(file, f"{group}/{name}", order, axes))
            else:
                constant.append(f"{group}/{name}")
    if not stored:
        only = f" (constant ones: {', '.join(key.rpartition('/')[2] for key in constant)})" if constant else ""
        raise DataError(
            f"there is no field that varies in time in {', '.join(FIELD_GROUPS)}{only}; a trajectory needs "
            "at least one: `squall.data.write` writes a file from an array"
        )
    return tuple(stored), tuple(constant)


def _stored_field(file: Any, key: str, order: int, axes: tuple[str, ...]) -> StoredField:
    dataset = dataset_of(file, key, key)
    if dataset.dtype.kind != "f" or dataset.dtype.itemsize > 8:
        raise DataError(
            f"the field '{key}' holds {dataset.dtype}; expected floats of up to 64 bits. In a copy, write complex "
            "numbers as two fields, of the real and the imaginary parts, and whole numbers as float64"
        )
    varying = tuple(map(bool, dataset.attrs.get("dim_varying", [True] * len(axes))))
    if len(varying) != len(axes):
        raise DataError(f"the field '{key}' has {len(varying)} dim_varying for {len(axes)} space axes {axes}")
    name = key.rpartition("/")[2]
    parts = map("".join, itertools.product(axes, repeat=order))
    return StoredField(
        key=key,
        dtype=dataset.dtype,
        shape=tuple(dataset.shape),
        order=order,
        sample_varying=bool(dataset.attrs.get("sample_varying", True)),
        dim_varying=varying,
        offset=dataset.id.get_offset() if in_one_piece(dataset) else None,
        channels=tuple(f"{name}_{part}" if part else name for part in parts),
    )


def _role(dataset: Any) -> str:
    """What squall wrote the array for: "mask", "valid", "measure" or "forcing"; nothing in files of others."""
    return str(_plain(dataset.attrs.get("role", "")))


def _conditions(
    file: Any, axes: tuple[str, ...], constant: tuple[str, ...], forcings: tuple[StoredField, ...]
) -> tuple[Variable, ...]:
    """Fields that do not change in time, scalars, and fields that are not part of the state."""
    found = []
    roles = ("mask", "valid", "measure")
    keys = [key for key in constant if dataset_of(file, key, key).dtype.kind == "f"]
    fields = [_stored_field(file, key, FIELD_GROUPS.index(key.partition("/")[0]), axes) for key in keys]
    for field in (*fields, *forcings):
        dataset = file[field.key]
        if _role(dataset) in roles:
            continue
        leading = ("batch",) * field.sample_varying + ("time",) * bool(dataset.attrs.get("time_varying", True))
        kept = dataset.ndim - len(leading) - field.order == len(axes)  # an axis that does not vary may have length 1
        space = [axis if vary else "" for axis, vary in zip(axes, field.dim_varying, strict=True) if vary or kept]
        name = field.key.rpartition("/")[2]
        found.append(
            Variable(name, field.key, (*leading, *space, *("channel",) * field.order), field.channels, field.dtype)
        )
    scalars = members(file["scalars"])
    first = [name for name in map(str, _plain(file["scalars"].attrs.get("field_names", []))) if name in scalars]
    for name in dict.fromkeys([*first, *scalars]):
        scalar = scalars[name]
        if not isinstance(scalar, h5py.Dataset) or scalar.dtype.kind not in "iuf" or _role(scalar) in roles:
            continue
        varying = {"batch": "sample_varying", "time": "time_varying"}
        leading = tuple(axis for axis, attribute in varying.items() if scalar.attrs.get(attribute, False))
        found.append(Variable(name, f"scalars/{name}", leading, (name,), scalar.dtype))
    return tuple(found)


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


def _trajectories(stored: tuple[StoredField, ...], attributes: Any) -> int:
    found = {field.key: field.shape[0] for field in stored if field.sample_varying}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"'{key}' {count}" for key, count in found.items())
        raise DataError(f"the fields differ in the number of trajectories: {listed}")
    batch = next(iter(found.values())) if found else int(attributes.get("n_trajectories", 1))
    if batch < 1:
        raise DataError("it has no trajectory")
    return batch


def _check_shape(field: StoredField, batch: int, times: int, space: tuple[int, ...]) -> None:
    # The Well's own readers differ: an axis that does not vary is dropped for one, of length 1 for the other.
    axes = list(zip(space, field.dim_varying, strict=True))
    leading = (batch, times) if field.sample_varying else (times,)
    kept = [points if varying else 1 for points, varying in axes]
    dropped = [points for points, varying in axes if varying]
    dropped, kept = ((*leading, *points, *(len(space),) * field.order) for points in (dropped, kept))
    if field.shape not in (dropped, kept):
        raise DataError(
            f"the field '{field.key}' has the shape {field.shape}; by the axes in dimensions and its "
            f"attributes sample_varying, time_varying and dim_varying it should have {dropped}"
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
        for end, place in enumerate((0, -1)):
            if mask[place].any():
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


def _cache_bytes(file: Any, stored: tuple[StoredField, ...]) -> int:
    """Room for two chunks: HDF5 unpacks a chunk anew at every read where it does not fit into its cache."""
    chunks = (np.prod(file[field.key].chunks or 0) * field.dtype.itemsize for field in stored)
    return max(2**20, 2 * int(max(chunks)))


def _plain(value: Any) -> Any:
    """An attribute as Python's own text, number or list."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value
