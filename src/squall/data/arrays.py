"""Arrays in a file: where their axes are, which numbers mean a missing value, and how a few windows are read."""

import contextlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Int64, Shaped

from squall.data.conditions import Condition
from squall.data.errors import DataError, check_exists
from squall.data.hdf5 import in_one_piece

MAPPED_BYTES = 2**28
"""Of mapped files that may be in the memory of a process; to map them again costs a tenth of reading them."""


@dataclass(frozen=True)
class Variable:
    """One array of a file, or one array per trajectory.

    Attributes:
        name: what it is called.
        key: its place in the file; a tuple of places, one per trajectory.
        axes: what each stored axis is: "batch", "time", "channel" (several are flattened), the name of a space
            axis, or "" for an axis of length one that is dropped.
        channels: names of its components.
        dtype: of the stored numbers.
        fills: stored numbers that mean a missing value.
        scale, offset: the value is stored·scale + offset.
    """

    name: str
    key: str | tuple[str, ...]
    axes: tuple[str, ...]
    channels: tuple[str, ...]
    dtype: np.dtype
    fills: tuple[float, ...] = ()
    scale: float = 1.0
    offset: float = 0.0

    @property
    def by_trajectory(self) -> bool:
        return "batch" in self.axes or isinstance(self.key, tuple)

    @property
    def by_time(self) -> bool:
        return "time" in self.axes

    @property
    def number(self) -> np.dtype:
        """The type of the values: float32 or float64."""
        return np.dtype(np.float64 if np.result_type(self.dtype, np.float32).itemsize > 4 else np.float32)

    def condition(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> Condition:
        """It as a condition of states of `shape` on space axes of these names."""
        space = (points if axis in self.axes else 1 for points, axis in zip(shape[3:], axes, strict=True))
        batch, times = shape[0] if self.by_trajectory else 1, shape[1] if self.by_time else 1
        return Condition.of(self.name, (batch, times, len(self.channels), *space))

    def read(
        self,
        array: Callable[[str], Any],
        trajectories: Int64[np.ndarray, " n"],
        starts: Int64[np.ndarray, " n"],
        length: int,
        space: Mapping[str, int],
    ) -> Shaped[np.ndarray, "window length part *space"]:
        """Windows (window, length, channel, *space), missing values as NaN; length 1 along what does not vary.

        Args:
            array: gives the stored array at a key.
            trajectories, starts: one per window.
            length: times in a window.
            space: length of each space axis, in the order of the state.
        """
        lengths = {**space, "time": length, "channel": len(self.channels)}
        kept = [axis for axis in self.axes if axis not in ("", "batch")]
        stored = array(self.key) if isinstance(self.key, str) else None
        if not (self.by_trajectory or self.by_time):
            trajectories, starts = np.zeros((2, 1), dtype=np.int64)
        if len(trajectories) == 0:
            values = np.empty((0, *(lengths[axis] for axis in kept)), self.dtype)
        elif type(stored) is np.ndarray and self.axes[:2] == ("batch", "time") and stored.flags.c_contiguous:
            # Time first in memory, so that all first and all second states of pairs are contiguous.
            numbers = trajectories * stored.shape[1] + starts + np.arange(length)[:, None]
            values = stored.reshape(-1, *stored.shape[2:])[numbers].swapaxes(0, 1)
        elif isinstance(stored, InPlace):
            first = trajectories * stored.shape[1] + starts if self.by_trajectory else starts
            values = stored.windows(first.tolist(), length, 1 + self.by_trajectory)
            values = values.squeeze(tuple(i + 1 - self.by_trajectory for i, axis in enumerate(self.axes) if axis == ""))
        else:
            rows = list(zip(trajectories.tolist(), starts.tolist(), strict=True))
            values = self._one_by_one(array if stored is None else lambda _: stored, rows, length)
        order = [i for name in ("time", "channel", *space) for i, axis in enumerate(kept, 1) if axis == name]
        shape = (length if self.by_time else 1, len(self.channels), *(n if a in kept else 1 for a, n in space.items()))
        return self.decode(values.transpose(0, *order).reshape(len(values), *shape))

    def _one_by_one(
        self, array: Callable[[Any], Any], rows: list[tuple[int, int]], length: int
    ) -> Shaped[np.ndarray, "window *stored"]:
        """Windows of arrays that are not in memory as they are in the file."""
        index: list[Any] = [0 if axis == "" else slice(None) for axis in self.axes]
        batch = self.axes.index("batch") if "batch" in self.axes else None
        time = self.axes.index("time") if self.by_time else None
        values: Any = None
        for row in sorted(range(len(rows)), key=rows.__getitem__):  # the disk reads ahead
            trajectory, start = rows[row]
            if batch is not None:
                index[batch] = trajectory
            if time is not None:
                index[time] = slice(start, start + length)
            block = array(self.key if isinstance(self.key, str) else self.key[trajectory])[tuple(index)]
            if values is None:
                values = np.empty((len(rows), *np.shape(block)), self.dtype)
            values[row] = block
        return values

    def decode(self, stored: Shaped[np.ndarray, "*axes"]) -> Shaped[np.ndarray, "*axes"]:
        """The values of stored numbers, NaN where one is missing."""
        values = stored.astype(self.number, copy=False)
        if self.scale != 1 or self.offset != 0:
            values = values * self.number.type(self.scale) + self.number.type(self.offset)
        for fill in self.fills:
            missing = stored == np.asarray(fill).astype(stored.dtype)
            if missing.any():
                values = np.where(missing, self.number.type(np.nan), values)
        return values


class InPlace:
    """An array of a file whose numbers lie there one after the other: (trajectory, time, ...) or (time, ...).

    It is read past HDF5, which takes about six times as long for windows of two small states.
    """

    def __init__(self, descriptor: int, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.descriptor, self.offset, self.shape, self.dtype = descriptor, offset, shape, dtype

    def windows(self, first: list[int], length: int, lead: int) -> Shaped[np.ndarray, "window _length *_state"]:
        """Windows from states on that are counted over all trajectories; `lead` axes come before those of a state."""
        values = np.empty((len(first), length, *self.shape[lead:]), self.dtype)
        if values.size == 0:
            return values
        numbers: Any = values.reshape(-1).view(np.uint8)
        buffer = memoryview(numbers)
        window_bytes, state_bytes = values[0].nbytes, values[0, 0].nbytes
        for window in sorted(range(len(first)), key=first.__getitem__):  # the disk reads ahead
            rest = buffer[window * window_bytes : (window + 1) * window_bytes]
            position = self.offset + first[window] * state_bytes
            # nearly always, one call reads all
            while (count := os.preadv(self.descriptor, (rest,), position)) < len(rest):
                if count == 0:
                    raise OSError("the file ends before the states do")
                rest, position = rest[count:], position + count
        return values


class Handle:
    """The arrays of a file, opened once in every process: what a forked worker inherits is not its own.

    Args:
        location: the file or folder.
        opener: a function of a module, so that it can be pickled, from the place to arrays by key.
        shown: the name for messages.
    """

    def __init__(self, location: Path, opener: Callable[[Path], Any], shown: Path) -> None:
        self.location, self.shown = Path(os.path.abspath(location)), shown
        self._opener = opener
        self._stamp = stamp(self.location)
        self._process = -1
        self._file: Any = None
        self._arrays: dict[str, Any] = {}
        self._read = 0

    def array(self, key: str) -> Any:
        """The array at `key`, not yet read.

        Raises:
            DataError: where the file has changed since it was opened, or was cut since.
        """
        if self._process != os.getpid():
            self.close()
            check_exists(self.shown, self.location)
            if stamp(self.location) != self._stamp:
                raise DataError(f"{self.shown}: the file has changed since it was opened; open it again")
            self._file = self._opener(self.location)
            self._process = os.getpid()
        if key not in self._arrays:  # a look-up in HDF5 or Zarr takes longer than the reading of a small state
            array = self._file[key]
            if isinstance(array, h5py.Dataset) and array.size and array.dtype.kind in "iuf" and in_one_piece(array):
                array = np.memmap(self.location, array.dtype, "r", array.id.get_offset(), array.shape)  # 5 × faster
            if isinstance(array, np.memmap):
                array = array.view(np.ndarray)  # whose slices are views without a call of Python
            self._arrays[key] = array
        # The numbers of a mapped file that was cut are zeros, or end the process.
        with contextlib.suppress(FileNotFoundError):  # removed, and still whole for this process
            status = self.location.stat()
            if S_ISREG(status.st_mode) and status.st_size < self._stamp[0]:
                raise DataError(
                    f"{self.shown}: the file is truncated: it was longer when it was opened. Let its writer finish, or "
                    "make or fetch it again"
                )
        return self._arrays[key]

    def forget(self, read: int) -> None:
        """Now and then hand back the pages of mapped files; they stay in the page cache.

        A pass over a large file would otherwise count all of it as memory of this process.

        Args:
            read: bytes that were read since the last call.
        """
        self._read += read
        if self._read < MAPPED_BYTES or not hasattr(mmap, "MADV_DONTNEED"):
            return
        self._read = 0
        for mapping in filter(None, map(_mapping, self._arrays.values())):
            mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the file; it opens again when it is read."""
        self._arrays = {}
        if self._process == os.getpid() and hasattr(self._file, "close"):
            self._file.close()
        self._file, self._process = None, -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_process": -1, "_arrays": {}}


class Joined:
    """Arrays one after the other along a time axis, which parts may lack: a pair, or a first state and the rest."""

    def __init__(self, parts: list[Any], axis: int, ndim: int) -> None:
        self.parts, self.axis = parts, axis
        self.counts = [part.shape[axis] if part.ndim == ndim else 0 for part in parts]  # 0: one state, no axis
        first = parts[0].shape
        rest = (*first[axis + 1 :],) if parts[0].ndim == ndim else (*first[axis:],)
        self.shape, self.ndim = (*first[:axis], sum(max(1, count) for count in self.counts), *rest), ndim
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __getitem__(self, index: tuple[Any, ...]) -> Shaped[np.ndarray, "..."]:
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        position = sum(not isinstance(i, int) for i in index[: self.axis])
        pieces, first = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            low, high = max(start - first, 0), min(stop - first, max(1, count))
            first += max(1, count)
            if low >= high:
                continue
            rest = (*index[: self.axis], *((slice(low, high),) if count else ()), *index[self.axis + 1 :])
            piece = np.asarray(part[rest])
            pieces.append(piece if count else np.expand_dims(piece, position))
        return np.concatenate(pieces, axis=position)


def _mapping(array: Any) -> mmap.mmap | None:
    """The map of a file that an array looks into, if there is one."""
    while isinstance(array, np.ndarray):
        array = array.base
    array = array.obj if isinstance(array, memoryview) else array
    return array if isinstance(array, mmap.mmap) else None


def stamp(location: Path) -> tuple[int, int]:
    """Size and time of change of a file."""
    status = location.stat()
    return status.st_size, status.st_mtime_ns


def numpy_type(dtype: torch.dtype) -> np.dtype:
    """NumPy's type of the same numbers."""
    return np.dtype(str(dtype).removeprefix("torch."))
