"""Trajectories written some times after the other, for rollouts: HDF5 in The Well's layout, NetCDF-4 or Zarr.

A file that grows is beside its place under a name with `.part`. It is whole at any moment, with NaN where nothing is
written yet, so that it can be read after a kill or a full disk, and the same call goes on. The last block gives it its
name. Room on the disk is taken before the first block.
"""

import abc
import bisect
import contextlib
import errno
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Shaped

from squall._process.extras import explain_missing_extra
from squall._process.files import refuse_existing, sync, sync_descriptor, temporary_name, writing_into
from squall._types import Trajectories
from squall.data.arrays import numpy_type
from squall.data.conditions import Areas, Mask
from squall.data.description import DEGREES, Description
from squall.data.errors import DataError
from squall.data.writing import (
    Beside,
    explained,
    in_place,
    lay_out,
    publish,
    try_room,
    write_all,
)

FILL_BYTES = 2**24
"""Of NaN written at a time, small beside the memory."""

BLOCK_BYTES = 2**26
"""Bytes of a block of times, and of a chunk of Zarr, at most (one time at least): small beside the memory, and few
enough chunks that their files are no burden to the disk."""


class Stream(abc.ABC):
    """States u[trajectory, time, channel, *space] in a file, of which the first times are written.

    Args:
        path: of the file in progress.
        shape: of the whole.
        mask: points that are always there.

    Attributes:
        written: how many times are there.
        block: how many times are best written at once; starts of blocks are multiples of it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, mask: Mask | None) -> None:
        self.path, self.shape, self.mask = path, shape, mask
        self.dtype = numpy_type(dtype)
        self.block = block_of(shape, self.dtype)
        self.written = 0

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> Trajectories:
        """The states at some times."""

    @abc.abstractmethod
    def write(self, start: int, states: Trajectories) -> None:
        """Write states from a time on."""

    @abc.abstractmethod
    def close(self) -> None:
        """Wait until everything is on the disk."""

    def find_end(self) -> None:
        """How many times are whole: no NaN at points that are not masked."""

        def missing(time: int) -> bool:
            bad = torch.isnan(self.read(time, time + 1))
            return bool((bad if self.mask is None else bad & self.mask).any())

        self.written = bisect.bisect_left(range(self.shape[1]), True, key=missing)


def block_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    state = int(np.prod(shape, dtype=np.int64)) // shape[1] * dtype.itemsize
    return min(shape[1], max(1, BLOCK_BYTES // max(1, state)))


class _Raw(Stream):
    """An HDF5 file with every field in one piece, written past HDF5: after a full disk it could not close a file."""

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, mask: Mask | None, offsets: list[int]
    ) -> None:
        super().__init__(path, shape, dtype, mask)
        self.file, self.offsets = path.open("r+b", buffering=0), offsets

    def _place(self, channel: int, trajectory: int, time: int) -> int:
        points = int(np.prod(self.shape[3:], dtype=np.int64))
        return self.offsets[channel] + (trajectory * self.shape[1] + time) * points * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Trajectories:
        batch, _, channels, *space = self.shape
        states = np.empty((batch, stop - start, channels, *space), self.dtype)
        for channel in range(channels):
            for trajectory in range(batch):
                self.file.seek(self._place(channel, trajectory, start))
                data = self.file.read((stop - start) * states[0, 0, 0].nbytes)
                states[trajectory, :, channel] = np.frombuffer(data, self.dtype).reshape(stop - start, *space)
        return torch.from_numpy(states)

    def write(self, start: int, states: Trajectories) -> None:
        numbers = states.cpu().numpy().astype(self.dtype, copy=False)
        for channel in range(self.shape[2]):
            for trajectory in range(self.shape[0]):
                self.file.seek(self._place(channel, trajectory, start))
                write_all(self.file, np.ascontiguousarray(numbers[trajectory, :, channel]))
        self.written = start + numbers.shape[1]

    def fill(self) -> None:
        """NaN everywhere, so that what is not written yet is known as such."""
        empty = np.full(FILL_BYTES // self.dtype.itemsize, np.nan, self.dtype)
        size = int(np.prod(self.shape, dtype=np.int64)) // self.shape[2]
        for offset in self.offsets:
            self.file.seek(offset)
            for start in range(0, size, len(empty)):
                write_all(self.file, empty[: size - start])
        sync_descriptor(self.file.fileno())

    def close(self) -> None:
        try:
            sync_descriptor(self.file.fileno())
        finally:
            self.file.close()


class _Zarr(Stream):
    """A Zarr store, with a chunk of each field for every block of times; chunks that are not there read as NaN."""

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, mask: Mask | None, fields: tuple[str, ...]
    ) -> None:
        import zarr

        super().__init__(path, shape, dtype, mask)
        group = zarr.open_group(path, mode="r+")
        self.arrays: list[Any] = [group[name] for name in fields]

    def read(self, start: int, stop: int) -> Trajectories:
        return torch.from_numpy(np.stack([np.asarray(array[:, start:stop]) for array in self.arrays], axis=2))

    def write(self, start: int, states: Trajectories) -> None:
        numbers = states.cpu().numpy().astype(self.dtype, copy=False)
        for channel, array in enumerate(self.arrays):
            array[:, start : start + numbers.shape[1]] = numbers[:, :, channel]
        self.written = start + numbers.shape[1]

    def close(self) -> None:
        """Chunks are files of their own."""


def _lay_out_netcdf(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, about: Description, beside: Beside
) -> list[int]:
    """A NetCDF-4 file: HDF5 with dimension scales."""
    dims, coordinates = _axes(about, shape)
    number_type = numpy_type(dtype)
    offsets = []
    with h5py.File(path, "w", locking=False, track_order=True) as file:
        file.attrs.update({name: np.bytes_(text) for name, text in _attributes(about).items()})
        for dim, values in coordinates.items():
            scale = file.create_dataset(dim, data=values)
            scale.make_scale(dim)
            scale.attrs.update(_coordinate_attributes(about, dim))
        for name in about.fields:
            variable = in_place(file, name, (shape[0], shape[1], *shape[3:]), number_type)
            variable.attrs["_FillValue"] = np.array([np.nan], number_type)
            if name in about.units:
                variable.attrs["units"] = np.bytes_(about.units[name])
            offsets.append(variable.id.get_offset())
            _attach(file, variable, dims)
        if beside.measure is not None:
            file["cell_area"] = beside.measure.numpy()
            _attach(file, file["cell_area"], dims[2:])
    return offsets


def _attach(file: Any, variable: Any, dims: tuple[str, ...]) -> None:
    for axis, dim in enumerate(dims):
        variable.dims[axis].attach_scale(file[dim])


def _lay_out_zarr(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, about: Description, beside: Beside
) -> list[int]:
    import zarr

    dims, coordinates = _axes(about, shape)
    number_type = numpy_type(dtype)
    group = zarr.open_group(path, mode="w-", attributes=_attributes(about))
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, Any]]]
    arrays = {dim: ((dim,), values, _coordinate_attributes(about, dim)) for dim, values in coordinates.items()}
    if beside.measure is not None:
        arrays["cell_area"] = (dims[2:], beside.measure.numpy(), {})
    for name, (axes, values, attributes) in arrays.items():
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, dimension_names=axes, attributes=attributes
        )
        array[...] = values
    for name in about.fields:
        group.create_array(
            name,
            shape=(shape[0], shape[1], *shape[3:]),
            dtype=number_type,
            chunks=(shape[0], block_of(shape, number_type), *shape[3:]),
            fill_value=np.nan,
            dimension_names=dims,
            attributes={"units": about.units[name]} if name in about.units else {},
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not in the specification yet, but xarray asks for it
        zarr.consolidate_metadata(path)
    return []


def _axes(about: Description, shape: tuple[int, ...]) -> tuple[tuple[str, ...], dict[str, Shaped[np.ndarray, " n"]]]:
    times = _clock(about)[0] + about.dt * np.arange(shape[1])
    dims = ("trajectory", "time", *about.axes)
    coordinates = dict(zip(dims, (np.arange(shape[0]), times, *about.coordinates), strict=True))
    if taken := set(dims) & set(about.fields):
        raise DataError(f"the field '{taken.pop()}' has the name of an axis: choose The Well's layout, *.hdf5")
    return dims, coordinates


def _clock(about: Description) -> tuple[float, dict[str, Any]]:
    """The first time and the CF attributes of the time axis: dates where the initial states have them."""
    first, _, date = str(about.provenance.get("first_time", "")).partition(" hours since ")
    unit = about.units.get("time", "")
    if date and unit == "hours":
        calendar = {"calendar": str(about.provenance["calendar"])} if "calendar" in about.provenance else {}
        return float(first) + about.start, {"units": f"hours since {date}", **calendar}
    return about.start, {"units": unit} if unit and "since" not in unit else {}


def _coordinate_attributes(about: Description, dim: str) -> dict[str, Any]:
    if dim == "time":
        return _clock(about)[1]
    units = {**DEGREES, **about.units}
    return {"units": units[dim]} if dim in units else {}


def _attributes(about: Description) -> dict[str, Any]:
    return {"Conventions": "CF-1.8", "title": about.name, "provenance": json.dumps(about.provenance)}


def _read_provenance(path: Path) -> Mapping[str, Any] | None:
    """What a file in progress says it is of; None where it says nothing."""
    with contextlib.suppress(OSError, KeyError, ValueError, TypeError):
        if path.is_dir():
            text: Any = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]["provenance"]
        else:
            with h5py.File(path, "r", locking=False) as file:
                text = file.attrs["provenance"]
        return json.loads(text)
    return None


def _offsets(path: Path, fields: tuple[str, ...], group: str) -> list[int]:
    with h5py.File(path, "r", locking=False) as file:
        return [file[f"{group}{name}"].id.get_offset() for name in fields]


SUFFIXES = (".hdf5", ".h5", ".nc", ".zarr")


def part_of(path: Path) -> Path:
    """The name of a file in progress."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


@contextlib.contextmanager
def stream(
    path: Path,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    about: Description,
    mask: Mask | None = None,
    measure: Areas | None = None,
) -> Iterator[Stream]:
    """A file that takes states some times after the other; it goes on where the same call was cut off.

    Args:
        path: of the finished file, `.hdf5` or `.h5` (The Well's layout), `.nc` (NetCDF-4) or `.zarr`.
        shape: of the whole, (batch, time, channel, *space).
        dtype: of the states.
        about: names, axes, and a provenance that tells one file from another.
        mask, measure: of the points.

    Raises:
        DataError: at another suffix, or where the file in progress is of something else.
        FileExistsError: where there is such a file already.
        OSError: where there is no room on the disk; nothing is left behind. In the middle of a Zarr store, what is
            written stays.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the suffix '{path.suffix}' is none of {', '.join(SUFFIXES)}")
    refuse_existing(path)
    part = part_of(path)
    if part.exists():
        if _read_provenance(part) != about.provenance:
            raise DataError(
                f"{part} is the unfinished part of another prediction: finish it by its own command, or move it away"
            )
    else:
        with explained(path), writing_into(path.parent):
            _make(part, shape, dtype, about, Beside(mask, None, measure))
    with contextlib.closing(_opened(part, shape, dtype, about, mask)) as file:
        file.find_end()
        yield file
    if path.suffix == ".zarr":
        refuse_existing(path)
        part.rename(path)
        sync(path.parent)
    else:
        publish(part, path)
        part.unlink(missing_ok=True)


def _make(part: Path, shape: tuple[int, ...], dtype: torch.dtype, about: Description, beside: Beside) -> None:
    """Lay the file out under another name, so that a part that is there is whole."""
    temporary = temporary_name(part)
    numbers = int(np.prod(shape, dtype=np.int64)) * torch.empty((), dtype=dtype).element_size()
    try:
        if part.suffix == ".zarr":
            if shutil.disk_usage(part.parent).free < numbers:
                raise OSError(errno.ENOSPC, f"there is no room for {numbers / 2**30:.3g} GiB", str(part))
            with explain_missing_extra():
                _lay_out_zarr(temporary, shape, dtype, about, beside)
        else:
            netcdf = part.suffix == ".nc"
            lay: Callable[..., Any] = _lay_out_netcdf if netcdf else lay_out
            try_room(temporary, numbers)
            lay(temporary, shape, dtype, about, beside)
            with contextlib.closing(_opened(temporary, shape, dtype, about, None)) as raw:
                assert isinstance(raw, _Raw)
                raw.fill()
        temporary.rename(part)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _opened(part: Path, shape: tuple[int, ...], dtype: torch.dtype, about: Description, mask: Mask | None) -> Stream:
    if ".zarr" in part.suffixes:
        return _Zarr(part, shape, dtype, mask, about.fields)
    group = "" if ".nc" in part.suffixes else "t0_fields/"
    return _Raw(part, shape, dtype, mask, _offsets(part, about.fields, group))
