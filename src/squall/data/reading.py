"""Reads HDF5 files in the layout of The Well, a few states at a time."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Int64, Shaped

from squall._process.files import special_file
from squall._process.limits import too_large
from squall._types import Trajectories
from squall.data.arrays import Handle, numpy_type, stamp
from squall.data.conditions import Areas, Condition, ConditionValues, Mask, Valid
from squall.data.description import Description
from squall.data.errors import GAPS, DataError, MissingFileError, NonFinite
from squall.data.hdf5 import open_file, open_hdf5
from squall.data.missing import Screened, refuse_unexpected, whole_only
from squall.data.source import Numbers, Source
from squall.data.structure import StoredField, read_structure

DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What HDF5 and NumPy raise where the structure of a file is scrambled."""


class TrajectoryFile(Source):
    """A file of trajectories in the layout of The Well; `open` makes it.

    Opening reads the structure; states are read when they are asked for. It can be pickled and used by the
    workers of a `DataLoader`: every process opens the file for itself. Vector and matrix fields become one
    channel per component (`velocity_x`, `velocity_y`); what does not vary along an axis is repeated along it.
    Fields that do not change in time are no part of the state: `constant_fields` names them.

    Args:
        path: of the HDF5 file.
        fields: names of those that make the state; the others are then forcings.
        initial: dt of a file that may have one time only.

    Raises:
        DataError: as `open`.
    """

    format = "The Well, HDF5"

    def __init__(
        self, path: str | os.PathLike[str], fields: Sequence[str] | None = None, initial: float | None = None
    ) -> None:
        self.path = Path(path)
        self._place = Path(os.path.abspath(path))  # a worker may have another working folder
        self._process = -1
        self._descriptor: int | None = None
        self._hdf5: h5py.File | None = None
        check_exists(self.path, self._place)
        self._stamp = stamp(self._place)
        self._values = Handle(self._place, open_hdf5, self.path)
        try:
            with open_file(self.path, self._place) as file:
                self._structure = read_structure(file, fields, initial)
        except DataError as error:
            prefix = f"{self.path}: "
            raise DataError(prefix + str(error).removeprefix(prefix)) from None
        except DAMAGE as error:
            raise DataError(damaged(self.path, error)) from error

    @property
    def shape(self) -> tuple[int, ...]:
        return self._structure.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._structure.dtype

    @property
    def description(self) -> Description:
        return self._structure.description

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the file as they stand there."""
        return self._structure.attributes

    @property
    def constant_fields(self) -> tuple[str, ...]:
        """Names of the fields that do not change in time and are left out."""
        return self._structure.constant_fields

    @property
    def mask(self) -> Mask | None:
        return self._structure.mask

    @property
    def valid(self) -> Valid | None:
        return self._structure.valid

    @property
    def measure(self) -> Areas | None:
        return self._structure.measure

    @property
    def conditions(self) -> tuple[Condition, ...]:
        ones = (1,) * len(self.space)
        read = [variable.condition(self.shape, self.description.axes) for variable in self._structure.conditions]
        names = [condition.name for condition in read]
        numbers = [n for n, value in self.parameters.items() if not isinstance(value, str) and n not in names]
        return (*read, *(Condition(name, "parameter", (1, 1, 1, *ones)) for name in numbers))

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        variable = next((v for v in self._structure.conditions if v.name == name), None)
        if variable is None:
            value = float(self.parameters[name])
            return torch.full((1, 1, 1, *(1,) * len(self.space)), value, dtype=self.dtype)
        space = dict(zip(self.description.axes, self.space, strict=True))
        values = variable.read(self._values.array, trajectories.numpy(), starts.numpy(), length, space)
        return torch.from_numpy(values).to(self.dtype)

    def check(self) -> None:
        """Read the whole file once, piece by piece.

        Raises:
            DataError: where the file is damaged, or values are NaN or infinite: how many, where the first is.
        """
        found = NonFinite(self.fields)
        for chosen, start, stop in self.chunks():
            trajectories = torch.tensor(chosen)
            starts = torch.full_like(trajectories, start)
            states = whole_only(self._states(trajectories, starts, stop - start), self.valid, trajectories, starts)
            found.look(states, chosen, [start] * len(chosen))
        found.refuse(str(self.path), GAPS.format("squall.data.open(path, gaps=True)"))

    def close(self) -> None:
        """Close the file; it opens again when it is read."""
        self._values.close()
        if self._process == os.getpid():
            if self._descriptor is not None:
                os.close(self._descriptor)
            if self._hdf5 is not None:
                self._hdf5.close()
        self._descriptor = self._hdf5 = None
        self._process = -1

    def __enter__(self) -> "TrajectoryFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_values"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": -1, "_descriptor": None, "_hdf5": None}

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        states = self._states(trajectories, starts, length)
        refuse_unexpected(self, states, self.valid, trajectories, starts)
        return states

    def _states(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        self._open()
        number = numpy_type(self.dtype)
        stored = self._structure.stored
        try:
            parts = [self._read(field, trajectories.numpy(), starts.numpy(), length) for field in stored]
        except (OSError, LookupError, RuntimeError) as error:
            raise DataError(damaged(self.path, error)) from error
        if len(parts) == 1:
            return torch.from_numpy(np.require(parts[0], number, ["C", "W"]))
        return torch.from_numpy(np.concatenate(parts, axis=2, dtype=number, casting="same_kind"))

    def _read(
        self, field: StoredField, trajectories: Int64[np.ndarray, " n"], starts: Int64[np.ndarray, " n"], length: int
    ) -> Shaped[np.ndarray, "n time component *space"]:
        """Windows of one field (window, length, component, *space)."""
        values = np.empty((len(trajectories), length, *field.block), dtype=field.dtype)
        if not field.sample_varying:
            trajectories = np.zeros_like(trajectories)
        # In the order of the file: the disk reads ahead, and a packed chunk is unpacked once.
        order = np.lexsort((starts, trajectories)).tolist()
        if field.offset is not None and self._descriptor is not None:
            rows = (trajectories * self.shape[1] + starts).tolist()
            _read_in_place(self._descriptor, field.offset, values, rows, order)
        elif self._hdf5 is not None:
            places = list(zip(trajectories.tolist(), starts.tolist(), strict=True))
            _read_through_hdf5(self._hdf5[field.key], field.sample_varying, values, places, order)
        return _spread(values, field, self.space)

    def _open(self) -> None:
        """Open the file, once in every process: what a forked worker inherits is not its own."""
        if self._process == os.getpid():
            return
        self.close()
        check_exists(self.path, self._place)
        if stamp(self._place) != self._stamp:
            raise DataError(f"{self.path}: the file has changed since it was opened; open it again")
        in_place = hasattr(os, "preadv")
        if in_place:
            self._descriptor = os.open(self._place, os.O_RDONLY)
        if not in_place or any(field.offset is None for field in self._structure.stored):
            self._hdf5 = open_file(self.path, self._place, rdcc_nbytes=self._structure.cache_bytes)
        self._process = os.getpid()


class ScreenedTrajectoryFile(Screened, TrajectoryFile):
    """A file in The Well's layout whose NaN stand for missing values."""

    def _raw(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        return self._states(trajectories, starts, length)


def _read_in_place(descriptor: int, offset: int, values: Any, rows: list[int], order: list[int]) -> None:
    """Read windows straight to their places in `values`; each is one piece of the file.

    h5py takes about six times as long for windows of two small states.
    """
    if values.size == 0:
        return
    buffer = memoryview(values.reshape(-1).view(np.uint8))
    window_bytes = len(buffer) // values.shape[0]
    state_bytes = window_bytes // values.shape[1]
    for window in order:
        rest = buffer[window * window_bytes : (window + 1) * window_bytes]
        place = offset + rows[window] * state_bytes
        while (count := os.preadv(descriptor, (rest,), place)) < len(rest):  # nearly always, one call reads all
            if count == 0:
                raise OSError("the file ends before the states do")
            rest, place = rest[count:], place + count


def _read_through_hdf5(
    dataset: Any,
    sample_varying: bool,
    values: Shaped[np.ndarray, "window time *block"],
    places: list[tuple[int, int]],
    order: list[int],
) -> None:
    """The same for what is packed in chunks or lies elsewhere."""
    for window in order:
        trajectory, start = places[window]
        times = slice(start, start + values.shape[1])
        values[window] = dataset[(trajectory, times) if sample_varying else times]


def _spread(
    values: Shaped[np.ndarray, "window time *block"], field: StoredField, space: tuple[int, ...]
) -> Shaped[np.ndarray, "window time component *space"]:
    """Repeat along the space axes that do not vary, and put the components where channels are."""
    stored = (points if varying else 1 for points, varying in zip(space, field.dim_varying, strict=True))
    components = len(field.channels)
    values = values.reshape(*values.shape[:2], *stored, components)
    if not all(field.dim_varying):
        values = np.broadcast_to(values, (*values.shape[:2], *space, components))
    return np.moveaxis(values, -1, 2)


def check_exists(path: Path, place: Path) -> None:
    """Refuse a path at which there is nothing, with the names that come near."""
    if not place.exists():
        raise MissingFileError(_missing(path, place))
    if not place.is_dir() and (special := special_file(place)):
        raise DataError(f"{path}: this is {special}; name a file or a folder of data")
    if place.is_file() and place.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). Let its writer finish, or make or fetch it again")


def _missing(path: Path, place: Path) -> str:
    if address := re.search(r"(^|/)(https?|s3|gs|gcs|ftp|abfs):/", str(path)):
        return f"{path}: '{address[2]}:' begins an address, and only files of this machine are read: fetch it first"
    if place.is_symlink():
        return f"{path}: this is a link that leads nowhere (to {os.readlink(place)})"
    folder = next(parent for parent in place.parents if parent.is_dir())
    if folder != place.parent:
        return f"{path}: there is no such file; of its path, {folder} is there and the rest is not"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    data = [name for name in names if name.endswith((".hdf5", ".h5"))]
    near = difflib.get_close_matches(place.name, names, n=3) or data[:3]
    return f"{path}: there is no such file" + (f"; the folder has {', '.join(near)}" if near else "")


def damaged(path: Path, error: Exception) -> str:
    """What to say about a file that cannot be read."""
    reason = str(error).strip("'\"")
    if too_large(error):
        return f"{path}: the memory does not suffice to read it ({reason})"
    advice = "Compare its checksum with that of its source; make or fetch it again if they differ"
    if "truncated" in reason or "ends before" in reason:
        return f"{path}: the file is truncated ({reason}). Let its writer finish, or make or fetch it again"
    return f"{path}: the file cannot be read and may be damaged ({reason}). {advice}"
