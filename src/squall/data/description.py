"""What a set of trajectories is, apart from its numbers: fields, axes, parameters, where it comes from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Required, TypedDict

import numpy as np
from jaxtyping import Float, Shaped

from squall.data.errors import DataError

AXES = ("x", "y", "z")
"""The names of the space axes, in the order in which a state has them."""

DEGREES: Mapping[str, str] = MappingProxyType(
    {"lat": "degrees_north", "latitude": "degrees_north", "lon": "degrees_east", "longitude": "degrees_east"}
)
"""Units of axes on the sphere by their names, as CF writes them."""

BOUNDARIES = ("periodic", "wall", "open")

ROOT_ATTRIBUTES = (
    "dataset_name",
    "grid_type",
    "n_spatial_dims",
    "n_trajectories",
    "simulation_parameters",
    "provenance",
)
"""Names that a parameter cannot have: they are attributes of the file with a meaning of their own."""


class About(TypedDict, total=False):
    """The keyword arguments of `describe`, which `write`, `create` and `InMemory` share."""

    dt: Required[float]
    fields: Sequence[str] | str | None
    lengths: float | Sequence[float] | None
    coordinates: Sequence[Any] | Shaped[np.ndarray, "..."] | None
    axes: Sequence[str] | None
    boundary: str | Sequence[str]
    name: str
    parameters: Mapping[str, Any] | None
    provenance: Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class Description:
    """Names, axes and origin of trajectories of one kind.

    Attributes:
        dt: time between two states, in the unit of the simulation.
        fields: one name per channel.
        coordinates: the points of each space axis, float64.
        spacing: distance of neighbouring points of each axis, `None` where they are unequally spaced.
        boundary: "periodic", "wall" or "open" for each axis; "mixed" where the two ends differ.
        name: name of the data set.
        parameters: coefficients of the simulation.
        provenance: who made the data, and how: version, seed, protocol.
        start: time of the first state.
        axes: names of the space axes, such as ("latitude", "longitude"); x, y, z by default.
        units: of the fields by name, and of "time", where they are known.
    """

    dt: float
    fields: tuple[str, ...]
    coordinates: tuple[np.ndarray, ...]
    spacing: tuple[float | None, ...]
    boundary: tuple[str, ...]
    name: str = "trajectories"
    parameters: dict[str, float | str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    start: float = 0.0
    axes: tuple[str, ...] = ()
    units: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes) or AXES[: len(self.coordinates)])


def describe(
    shape: Sequence[int],
    *,
    dt: float,
    fields: Sequence[str] | str | None = None,
    lengths: float | Sequence[float] | None = None,
    coordinates: Sequence[Any] | Shaped[np.ndarray, "..."] | None = None,
    axes: Sequence[str] | None = None,
    boundary: str | Sequence[str] = "periodic",
    name: str = "trajectories",
    parameters: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Description:
    """Check the description of states of `shape` (batch, time, channel, *space), and fill in the defaults.

    Args:
        shape: of the states: at least one trajectory, two times, one channel, one to three space axes.
        dt: time between two states.
        fields: a name per channel; `None`: "u", or "u0", "u1", ...
        lengths: of the domain, one number for all axes or one per axis; 1 by default. Point i of
            N lies at i·length/N on a periodic axis, at i·length/(N − 1) otherwise.
        coordinates: the points of each axis instead of `lengths`.
        axes: names of the space axes; x, y, z by default. Latitude and longitude, in this order and in
            degrees, are those of a sphere.
        boundary: "periodic", "wall" or "open", for all axes or one per axis.
        name: name of the data set.
        parameters: numbers and words by name, such as the coefficients of the equation.
        provenance: anything that JSON can hold: version, seed, protocol.

    Raises:
        DataError: where an argument does not fit, with the argument, what came and what is allowed.

    Example:
        >>> about = describe((8, 101, 2, 50), dt=1e-3, fields=("u", "v"), lengths=10.0)
        >>> about.spacing, about.fields, about.boundary
        ((0.2,), ('u', 'v'), ('periodic',))
    """
    shape = tuple(shape)
    _check_shape(shape)
    channels, *space = shape[2:]
    if not (math.isfinite(dt) and dt > 0):
        raise DataError(f"dt: got {dt}; it has to be a positive number, the time between two states")
    # Fields have seldom 16 channels, and axes of space more than four points.
    if fields is None and len(space) > 1 and space[-1] <= 4 and channels >= 16:
        raise DataError(
            f"states: the shape {shape} looks like channels last, (batch, time, *space, channel); expected (batch, "
            f"time, channel, *space): np.moveaxis(states, -1, 2). If there are {channels} channels, name them by fields"
        )
    names, ends = _axis_names(axes, len(space)), _per_axis(boundary, len(space), "boundary")
    for end in ends:
        if end not in BOUNDARIES:
            raise DataError(f"boundary: got {end!r}; allowed: {', '.join(BOUNDARIES)}, for all axes or one per axis")
    if coordinates is None:
        points, spacing = _lattice(
            tuple(space), _per_axis(1.0 if lengths is None else lengths, len(space), "lengths"), ends
        )
    elif lengths is None:
        points, spacing = _given(tuple(space), coordinates, names)
    else:
        raise DataError("lengths and coordinates: both were given; give one of them")
    return Description(
        dt=float(dt),
        fields=_names(fields, channels),
        coordinates=points,
        spacing=spacing,
        boundary=ends,
        axes=names,
        name=str(name),
        parameters=_parameters(parameters or {}),
        provenance=_provenance(provenance or {}),
    )


def equal_step(points: Shaped[np.ndarray, " points"]) -> float | None:
    """The step h of points p₀ + i h, or `None` where they are not equally spaced.

    The rounding of the points' own type is allowed for, and a thousandth of the step. An axis in float32
    knows its step to few digits: where a round number (of up to six digits) explains the points as well, it
    is taken.

    Example:
        >>> equal_step(np.arange(501, dtype=np.float32) * np.float32(1e-4))
        0.0001
        >>> equal_step(np.array([0.0, 1.0, 3.0])) is None
        True
    """
    exact = points.astype(np.float64)
    count = len(exact) - 1
    if count < 1 or not np.isfinite(exact).all():
        return None
    number_type = points.dtype if points.dtype.kind == "f" else np.dtype(np.float64)
    rounding = float(np.finfo(number_type).eps) * float(np.abs(exact).max())

    def error(step: float) -> float:
        return float(np.abs(exact - (exact[0] + step * np.arange(count + 1))).max())

    step = float(exact[-1] - exact[0]) / count
    if step == 0 or error(step) > 4 * rounding + 1e-3 * abs(step):
        return None
    round_numbers = (float(f"{step:.{digits}g}") for digits in range(1, 7))
    return next((number for number in round_numbers if error(number) <= rounding), step)


def _check_shape(shape: tuple[int, ...]) -> None:
    if not 4 <= len(shape) <= 6:
        raise DataError(
            f"states: got shape {shape}, {len(shape)} axes; expected (batch, time, channel, *space) with one "
            "to three space axes: add the missing ones, as by states[:, :, None] for a single channel"
        )
    if shape[1] < 2:
        raise DataError(f"states: got shape {shape}, {shape[1]} time(s); at least two are needed to learn a step from")
    if min(shape) < 1:
        raise DataError(f"states: got shape {shape}; no axis may be empty")


def _axis_names(axes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = AXES[:count] if axes is None else tuple(axes)
    if isinstance(axes, str) or len(names) != count or len(set(names)) != count:
        raise DataError(f"axes: got {axes!r}; expected {count} different names, one for each space axis")
    return names


def _per_axis(value: Any, axes: int, argument: str) -> tuple[Any, ...]:
    if isinstance(value, str) or np.ndim(value) == 0:
        return (value,) * axes
    if len(value) != axes:
        raise DataError(f"{argument}: got {len(value)} for {axes} space axes; give one for all, or one per axis")
    return tuple(value)


def _lattice(
    space: tuple[int, ...], lengths: tuple[float, ...], ends: tuple[str, ...]
) -> tuple[tuple[Float[np.ndarray, " _points"], ...], tuple[float | None, ...]]:
    if not all(math.isfinite(length) and length > 0 for length in lengths):
        raise DataError(f"lengths: got {lengths}; each has to be a positive number")
    gaps = [points if end == "periodic" else max(points - 1, 1) for points, end in zip(space, ends, strict=True)]
    spacing = tuple(float(length) / gap for length, gap in zip(lengths, gaps, strict=True))
    return tuple(np.arange(points) * step for points, step in zip(space, spacing, strict=True)), spacing


def _given(
    space: tuple[int, ...], coordinates: Sequence[Any] | Shaped[np.ndarray, "..."], names: Sequence[str]
) -> tuple[tuple[Float[np.ndarray, " _points"], ...], tuple[float | None, ...]]:
    if isinstance(coordinates, np.ndarray) and coordinates.ndim == 1 and len(space) == 1:
        coordinates = [coordinates]
    points = tuple(np.asarray(axis, dtype=np.float64) for axis in coordinates)
    expected = tuple((length,) for length in space)
    shapes = tuple(axis.shape for axis in points)
    if shapes != expected:
        raise DataError(f"coordinates: got arrays of shapes {shapes}; the states need {expected}, one array per axis")
    for name, axis in zip(names, points, strict=True):
        steps = np.diff(axis)
        if not np.isfinite(axis).all() or not ((steps > 0).all() or (steps < 0).all()):
            wrong = int(np.argmax(~(steps * (1 if np.nanmedian(steps) > 0 else -1) > 0)))
            raise DataError(
                f"coordinates: the points of axis {name} have to be finite and in order, but {axis[wrong + 1]:g} comes "
                f"after {axis[wrong]:g}: sort them, and the fields with them"
            )
    return points, tuple(None if (step := equal_step(axis)) is None else abs(step) for axis in points)


def _names(fields: Sequence[str] | str | None, channels: int) -> tuple[str, ...]:
    if fields is None:
        return ("u",) if channels == 1 else tuple(f"u{channel}" for channel in range(channels))
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    if len(names) != channels:
        raise DataError(f"fields: got {len(names)} names {names} for {channels} channels; give one per channel")
    if len(set(names)) != channels or not all(isinstance(n, str) and n.strip(".") and "/" not in n for n in names):
        raise DataError(f"fields: got {names}; the names have to be different, not empty, and without '/'")
    return names


def _parameters(parameters: Mapping[str, Any]) -> dict[str, float | str]:
    checked: dict[str, float | str] = {}
    for name, value in parameters.items():
        if name in ROOT_ATTRIBUTES:
            raise DataError(f"parameters: the name {name!r} is taken by the file layout; choose another")
        if not isinstance(value, str | int | float | np.integer | np.floating):
            raise DataError(f"parameters: {name} is {value!r}; allowed are numbers and text, the rest is provenance")
        checked[str(name)] = value if isinstance(value, str) else float(value)
    return checked


def _provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(provenance)))
    except TypeError as error:
        raise DataError(f"provenance: {error}; it is kept as JSON: numbers, text, lists and dicts of them") from None
