"""NetCDF and Zarr files: axes by their names or CF attributes, areas from latitudes, declared fill values."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Shaped

from squall._process.extras import explain_missing_extra
from squall._process.files import special_file
from squall.data.arrays import Handle, Variable
from squall.data.conditions import Areas, as_measure
from squall.data.errors import DataError
from squall.data.formats.bag import parse_axes, read_bag
from squall.data.formats.layout import OneTimeError, Reading, finish
from squall.data.hdf5 import Datasets, dataset_of, members, open_file, open_hdf5
from squall.data.measure import areas, closes, curvilinear_areas, on_sphere
from squall.data.stored import Layout

NAMES = {
    "time": ("time", "t", "valid_time", "timestep", "time_step", "step", "date", "datetime", "time_counter"),
    "batch": (
        "batch",
        "sample",
        "trajectory",
        "member",
        "ensemble",
        "number",
        "realization",
        "run",
        "sim",
        "simulation",
    ),
    "channel": ("channel", "channels", "variable", "component", "feature", "field", "fields"),
    "latitude": ("lat", "latitude", "nav_lat", "rlat", "xlat", "tlat", "lat_rho"),
    "longitude": ("lon", "longitude", "long", "nav_lon", "rlon", "xlong", "tlong", "lon_rho"),
    "level": ("level", "lev", "plev", "pressure_level", "isobaricinhpa", "depth", "height", "deptht", "model_level"),
}
AREAS = ("cell_area", "area", "areacella", "areacello", "tarea", "area_t")
"""Names under which models of ocean and atmosphere keep the areas of cells."""

HOURS = {"day": 24.0, "hour": 1.0, "hr": 1.0, "h": 1.0, "minute": 1 / 60, "min": 1 / 60} | dict.fromkeys(
    ("second", "sec", "s"), 1 / 3600
)
"""Hours in a unit of time; months and years have no fixed length."""


def read_cf(path: Path, location: Path, options: Reading, format_name: str) -> Layout:
    """The layout of a file that xarray opens.

    Args:
        path: for messages.
        location: the file or folder.
        options: of `open`.
        format_name: "NetCDF-3", "NetCDF-4" or "Zarr".

    Raises:
        DataError: no time axis, no field with time and space, times not equally spaced.
        MissingExtraError: where a package of the extra `formats` is missing.
    """
    with explain_missing_extra():
        import xarray
    if format_name == "Zarr":
        _refuse_special(path, location)
    if format_name == "Zarr" and not _named(location):
        arrays = open_zarr(location)
        shapes = {name: (array.shape, array.dtype) for name, array in dict(arrays).items()}
        return read_bag(
            f"{_said(format_name, location)} without names of axes", Handle(location, open_zarr, path), shapes, options
        )
    if format_name == "NetCDF-4":
        with explain_missing_extra():
            import h5netcdf  # noqa: F401 (xarray would list its engines instead)
        with open_file(path, location) as file:
            _refuse_elsewhere(file)
    engine = {"NetCDF-3": "scipy", "NetCDF-4": "h5netcdf", "Zarr": "zarr"}[format_name]
    more = {"Zarr": {"consolidated": False}, "NetCDF-4": {"phony_dims": "access"}}.get(format_name, {})
    try:
        # decode_times=False: a calendar that pandas lacks must not fail here; chunks=None: no dask.
        with xarray.open_dataset(
            location, engine=engine, mask_and_scale=False, decode_times=False, chunks=None, **more
        ) as data:
            return _read(path, location, options, format_name, data)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise DataError(f"{path}: not read as {format_name} ({error}); make or fetch it again") from error


def _read(path: Path, location: Path, options: Reading, format_name: str, data: Any) -> Layout:
    notes: list[str] = []
    roles = {dim: role_of(dim, data.variables.get(dim)) for dim in data.sizes}
    timed = options.get("initial") is None
    series, fixed = _sorted_variables(path, location, format_name, data, roles, notes, timed=timed)
    chosen = list(options.get("fields") or _most_common(series, roles))
    missing = [name for name in chosen if name not in series]
    if missing:
        raise DataError(
            f"{path}: fields: no {', '.join(missing)}; the fields in time and space are {', '.join(series)}"
        )
    roles = {dim: "channel" if role == "level" else role for dim, role in roles.items()}
    fields = {name: series[name] for name in chosen}
    if options.get("axes"):
        widest = max(fields.values(), key=lambda v: len(v.dims))
        words = parse_axes(str(options.get("axes")), widest.shape, chosen[0], timed=options.get("initial") is None)
        known = ("time", "batch", "channel")
        roles |= {d: w if w in known else str(d) for d, w in zip(widest.dims, words, strict=True)}
    frame, space = _frame(path, fields, roles), _common_space(path, fields, roles)
    if not 1 <= len(space) <= 3:
        raise DataError(f"{path}: '{chosen[0]}' has {len(space)} space axes {space}; expected one to three")
    states = tuple(_variable(name, field, roles, space, data, location) for name, field in fields.items())
    conditions, cells, clock = [], {}, _clock(next((d for d in frame if roles[d] == "time"), None), data)
    declared = {str(f.attrs.get("cell_measures", "")).rpartition("area:")[2].strip() for f in fields.values()}
    for name, variable in {**fixed, **series}.items():
        if name in fields or name == clock:
            continue
        others = [dim for dim in variable.dims if dim not in (*frame, *space) and roles[dim] != "channel"]
        if others:
            notes.append(f"left out '{name}': its axes {variable.dims} are not those of the fields {space}")
            continue
        known = _variable(name, variable, roles, space, data, location)
        cell = _cell_role(name, variable, declared) if variable.dims == space else ""
        if cell:
            cells[cell] = known.decode(np.asarray(variable.values)).astype(np.float64)
        if cell != "area":
            conditions.append(known)
    sizes = {roles[dim]: data.sizes[dim] for dim in frame}
    channels = sum(len(variable.channels) for variable in states)
    times, dates, unit = _times(clock, data)
    points = [np.array(data.variables[dim].values) if dim in data.variables else None for dim in space]
    kinds = [role_of(dim, data.variables.get(dim)) for dim in space]
    measure, boundary, points = _cells(points, kinds, cells, notes)
    units = {c: u for v in states if (u := data.variables[v.name].attrs.get("units")) for c in v.channels}
    return finish(
        _said(format_name, location),
        Handle(location, OPENERS[format_name], path),
        states,
        conditions,
        (sizes.get("batch", 1), sizes.get("time", 1), channels, *(data.sizes[dim] for dim in space)),
        options,
        times=times,
        coordinates=points,
        notes=notes,
        measure=measure,
        axes=space,
        boundary=boundary,
        name=str(data.attrs.get("title") or path.name),
        units=units | ({"time": unit} if unit else {}),
        provenance=dates,
    )


def _sorted_variables(
    path: Path, location: Path, format_name: str, data: Any, roles: Mapping[Any, str], notes: list[str], *, timed: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables in time and space, and the others; initial states may lack the time.

    Raises:
        DataError: where none has a time and a space axis.
    """
    bounds = {v.attrs[key] for v in data.variables.values() for key in ("bounds", "climatology") if key in v.attrs}
    series: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    # Zarr lists its arrays in the order of the disk, which is no order: channels must not depend on it.
    for name, variable in sorted(data.variables.items()) if format_name == "Zarr" else data.variables.items():
        if name in data.sizes or name in bounds or name == "Times":
            continue
        if variable.dtype.kind not in "iuf" or "grid_mapping_name" in variable.attrs:
            notes.append(f"left out '{name}': it holds {variable.dtype}, on {variable.dims}")
            continue
        space = [dim for dim in variable.dims if roles[dim] not in ("time", "batch", "channel")]
        clock = next((dim for dim in variable.dims if roles[dim] == "time"), None)
        if clock is not None and role_of(name, variable) in ("latitude", "longitude"):
            ends = [variable.isel({clock: index}) for index in (0, -1)]
            variable, clock = (ends[0], None) if np.array_equal(*(end.values for end in ends)) else (variable, clock)
        moves = clock is not None
        (series if moves and space else fixed)[str(name)] = variable
    if not series and not timed:
        series = {name: variable for name, variable in fixed.items() if variable.ndim}
        fixed = {name: variable for name, variable in fixed.items() if name not in series}
    if not series and _date(data):
        raise OneTimeError(f"{path}: it has one time; at least two are needed to learn a step from")
    if not series:
        raise _no_series(path, location, format_name, fixed)
    return series, fixed


def _no_series(path: Path, location: Path, format_name: str, fixed: Mapping[str, Any]) -> DataError:
    listed = ", ".join(f"{name} {variable.dims}" for name, variable in fixed.items()) or "no number at all"
    if groups := _groups(format_name, location):
        return DataError(
            f"{path}: the fields lie in groups ({', '.join(groups)}), which are not read: save one of "
            "them by xarray's open_dataset(path, group=...).to_netcdf(...), or give the folder of the group in Zarr"
        )
    return DataError(
        f"{path}: no variable with a time and a space axis; found: {listed}. A time axis is called "
        f"{', '.join(NAMES['time'][:4])} or has units such as 'hours since 2000-01-01': rename it"
    )


def role_of(dim: Any, variable: Any) -> str:
    """What a dimension is: by CF attributes, else by name; its own name for any other space axis."""
    attributes: Mapping[str, Any] = {} if variable is None else variable.attrs
    units, name = str(attributes.get("units", "")), str(dim).lower()
    if " since " in units or attributes.get("axis") == "T":
        return "time"
    for role, unit in (("latitude", "north"), ("longitude", "east")):
        plain = units.lower().replace("_", "").replace("degrees", "degree")
        if attributes.get("standard_name") == role or plain in (f"degree{unit}", f"degree{unit[0]}"):
            return role
    if attributes.get("axis") == "Z" or "positive" in attributes:
        return "level"
    return next((role for role, names in NAMES.items() if name in names), str(dim))


def _most_common(series: Mapping[str, Any], roles: Mapping[Any, str]) -> list[str]:
    """The fields on the space axes that most fields have."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    real = {name: v for name, v in series.items() if v.dtype.kind == "f" or "scale_factor" in v.attrs}
    for name, variable in (real or series).items():  # whole numbers are flags rather than states
        space = tuple(dim for dim in variable.dims if roles[dim] not in ("time", "batch", "channel", "level"))
        groups.setdefault(space, []).append(name)
    return max(groups.values(), key=len)


def _frame(path: Path, fields: Mapping[str, Any], roles: Mapping[Any, str]) -> tuple[str, ...]:
    """The time axis of the fields, and the axis of trajectories if there is one."""
    frame = []
    for role in ("time", "batch"):
        same = list(dict.fromkeys(str(d) for field in fields.values() for d in field.dims if roles[d] == role))
        if len(same) > 1:
            dims = " ".join(map(str, max((field.dims for field in fields.values()), key=len)))
            raise DataError(
                f"{path}: two axes look like {role}: {' and '.join(same)}; say what the axes {dims} are by axes=..., "
                "as 'batch time y x', or choose fields=[...]"
            )
        frame += same
    return tuple(frame)


def _common_space(path: Path, fields: Mapping[str, Any], roles: Mapping[Any, str]) -> tuple[str, ...]:
    spaces = {n: tuple(d for d in v.dims if roles[d] not in ("time", "batch", "channel")) for n, v in fields.items()}
    if len(set(spaces.values())) > 1:
        raise DataError(f"{path}: the fields lie on different space axes: {spaces}; choose some by fields=[...]")
    return tuple(map(str, next(iter(spaces.values()))))


def _variable(
    name: str, variable: Any, roles: Mapping[Any, str], space: tuple[str, ...], data: Any, location: Path
) -> Variable:
    stored = data.variables[name].dims  # with the time of what repeats at every time
    known = {dim: str(dim) if dim in space else roles[dim] for dim in variable.dims}
    axes = tuple(known.get(dim, "") for dim in stored)
    channels = [name]
    for dim in variable.dims:
        if roles[dim] == "channel":
            labels = data.variables[dim].values.tolist() if dim in data.variables else range(data.sizes[dim])
            channels = [f"{stem}_{f'{x:g}' if isinstance(x, float) else x}" for stem in channels for x in labels]
    attributes = {**variable.encoding, **variable.attrs}
    fills = [np.ravel(attributes[key]) for key in ("_FillValue", "missing_value") if attributes.get(key) is not None]
    values = {float(fill) for fill in (np.concatenate(fills) if fills else [])}
    if (location / ".zgroup").exists():
        values -= {0.0}  # Zarr v2 gives every array a fill value for chunks that were never written: 0 by default
    return Variable(
        name,
        name,
        axes,
        tuple(channels),
        variable.dtype,
        tuple(sorted(fill for fill in values if fill == fill)),
        float(attributes.get("scale_factor", 1.0)),
        float(attributes.get("add_offset", 0.0)),
    )


def _date(data: Any) -> str | None:
    """The variable that holds the date of a single state."""
    single = (n for n, v in data.variables.items() if v.ndim == 0 and " since " in str(v.attrs.get("units", "")))
    return next(single, None)


def _clock(dim: str | None, data: Any) -> str | None:
    """The variable that holds the times: that of the axis, one with dates along it, as in WRF, or that of one state."""
    if dim is None or dim in data.variables:
        return dim or _date(data)
    along = {str(n): v for n, v in data.variables.items() if v.dims == (dim,)}
    dated = (
        n for n, v in along.items() if " since 1" in (units := str(v.attrs.get("units", ""))) or " since 2" in units
    )
    return next(dated, "Times" if "Times" in along else None)


def _times(dim: str | None, data: Any) -> tuple[Shaped[np.ndarray, " time"] | None, dict[str, str], str]:
    """Times in the unit of the file or, for dates, in hours; the first date and its calendar; the unit."""
    if dim not in data.variables:
        return None, {}, ""
    variable = data.variables[dim]
    if variable.dtype.kind in "SU":  # WRF: 2005-08-28_12:00:00
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in np.atleast_1d(variable.values)]
        moments = np.array([text.replace("_", "T") for text in texts], dtype="datetime64[s]")
        hours = (moments - moments[0]) / np.timedelta64(3600, "s")
        return hours, {"first_time": f"0 hours since {texts[0].replace('_', ' ')}"}, "hours"
    units = str(variable.attrs.get("units", ""))
    unit, _, first = units.partition(" since ")
    values = np.atleast_1d(np.asarray(variable.values))
    if not first:
        return (values if values.dtype.kind in "iuf" else None), {}, units
    unit = unit.strip().lower()
    factor = HOURS.get(unit, HOURS.get(unit.removesuffix("s")))
    if factor is None:
        return values, {"first_time": first}, unit
    dates = {"first_time": f"{values[0] * factor:.15g} hours since {first.strip()}"}
    if calendar := str(variable.attrs.get("calendar", "")):
        dates["calendar"] = calendar
    return (values - values[0]) * factor, dates, "hours"


def _cell_role(name: str, variable: Any, declared: set[str]) -> str:
    """What a field that does not change says about the cells: "area", "latitude", "longitude", "pm" or "pn"; or ""."""
    if name in AREAS or name in declared or variable.attrs.get("standard_name") == "cell_area":
        return "area"
    if name in ("pm", "pn"):  # ROMS: 1 / width of a cell along each axis
        return name
    role = role_of(name, variable)
    return role if role in ("latitude", "longitude") else ""


def _cells(
    points: list[Any], kinds: list[str], cells: Mapping[str, Shaped[np.ndarray, "..."]], notes: list[str]
) -> tuple[Areas | None, list[str] | None, list[Any]]:
    """Areas of the cells, the ends of the axes where they are known, and the points of the axes.

    Args:
        points, kinds: of the axes.
        cells: what fields of the file say, by `_cell_role`.
        notes: what is assumed is added.
    """
    space, boundary, total = [0 if p is None else len(p) for p in points], None, cells.get("area")
    if total is None and {"pm", "pn"} <= cells.keys():
        total = 1 / (cells["pm"] * cells["pn"])
        notes.append("areas: 1 / (pm · pn)")
    if {"latitude", "longitude"} & set(kinds):
        boundary = [_end(*pair) for pair in zip(points, kinds, strict=True)]
    elif {"latitude", "longitude"} <= cells.keys() and len(points) == 2:
        vectors = on_sphere(cells["latitude"], cells["longitude"])
        if np.isfinite(vectors).all():
            boundary = ["periodic" if closes(vectors, axis) else "open" for axis in (0, 1)]
            total = curvilinear_areas(vectors) if total is None else total
        else:
            boundary = ["open", "open"]
            notes.append("areas: taken as equal, because latitudes or longitudes are missing at some points")
        notes.append("curvilinear: latitude and longitude vary along both axes, which are counted in points")
        counted = [np.arange(n, dtype=np.float64) for n in vectors.shape[1:]]
        points = [n if p is None else p for n, p in zip(counted, points, strict=True)]
    if total is not None:
        total = np.where(np.isfinite(total), total, np.nanmean(total))  # areas are often missing on land
        return as_measure(torch.from_numpy(total), total.shape), boundary, points
    return (areas(points, kinds) if min(space) > 1 else None), boundary, points


def _end(points: Shaped[np.ndarray, " points"] | None, role: str) -> str:
    """A circle of longitude closes; all other edges of a map are open."""
    if role != "longitude" or points is None or len(points) < 2:
        return "open"
    turn = abs(float(points[1]) - float(points[0])) * len(points)
    return "periodic" if abs(turn - 360) < 0.1 * abs(float(points[1]) - float(points[0])) else "open"


def _named(location: Path) -> bool:
    """Whether the arrays of a Zarr group have named axes, as xarray needs them.

    Raises:
        DataError: where numbers are stored otherwise than zarr reads them.
    """
    arrays, named = open_zarr(location), False
    for name, array in () if isinstance(arrays, dict) else arrays.arrays():
        if getattr(array.metadata, "storage_transformers", ()):
            raise DataError(f"'{name}' is stored through a storage transformer, which zarr does not apply")
        given = array.attrs.get("_ARRAY_DIMENSIONS") if array.metadata.zarr_format == 2 else None
        named |= any(getattr(array.metadata, "dimension_names", given) or ())
    return named


def _groups(format_name: str, location: Path) -> list[str]:
    """Names of the groups in a file."""
    opened: Any = OPENERS[format_name](location)
    items = members(opened.file) if isinstance(opened, Datasets) else dict(opened.items())
    return [name for name, item in items.items() if hasattr(item, "keys")]


def _refuse_elsewhere(file: Any) -> None:
    """Check all that xarray will read from an HDF5 file: the points of the axes."""
    for name, item in members(file).items():
        bare = str(item.attrs.get("NAME", b"")).find("This is a netCDF dimension but not a netCDF variable") >= 0
        if isinstance(item, h5py.Dataset) and not bare:
            dataset_of(file, name, name)


def _refuse_special(path: Path, folder: str | Path, root: str = "") -> None:
    """Refuse pipes and links out of the folder: only what was named is read.

    Raises:
        DataError: with the first of them.
    """
    root = root or os.path.realpath(folder)
    with os.scandir(folder) as entries:
        for entry in entries:  # no call to the file system for a plain file
            if entry.is_dir(follow_symlinks=False):
                _refuse_special(path, entry.path, root)
            elif entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                raise DataError(f"{path}: '{entry.name}' is a link to a file elsewhere; only the folder named is read")
            elif not entry.is_file() and not entry.is_symlink():
                raise DataError(f"{path}: '{entry.name}' is {special_file(Path(entry.path))}, not a file")


def _said(format_name: str, location: Path) -> str:
    return f"Zarr v{2 if (location / '.zgroup').exists() else 3}" if format_name == "Zarr" else format_name


# Reading goes past xarray, whose indexing takes longer than a small state.


def open_zarr(location: Path) -> Any:
    """The arrays of a group by name; an array alone is called "array"."""
    with explain_missing_extra():
        import zarr
    opened: Any = zarr.open(location, mode="r", use_consolidated=False)  # a copy of what the arrays say of themselves
    return {"array": opened} if hasattr(opened, "shape") else opened


def open_netcdf3(location: Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The variables, mapped into memory; SciPy finds where they are."""
    from scipy.io import netcdf_file

    with location.open("rb") as raw:  # closed by us: SciPy would warn that its map is still in use
        file = netcdf_file(raw, "r", mmap=True)
        return {name: variable.data for name, variable in file.variables.items()}


OPENERS = {"NetCDF-3": open_netcdf3, "NetCDF-4": open_hdf5, "Zarr": open_zarr}
