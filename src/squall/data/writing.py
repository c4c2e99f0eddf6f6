"""Writes trajectories as an HDF5 file in the layout of The Well, whole or not at all."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Unpack

import h5py
import numpy as np
import torch
from jaxtyping import Float, Shaped

from squall._process.files import UNSUPPORTED, refuse_existing, sync, sync_descriptor, temporary_name, writing_into
from squall._types import Trajectories
from squall.data.arrays import numpy_type
from squall.data.conditions import (
    Areas,
    Condition,
    ConditionValues,
    Mask,
    Valid,
    as_conditions,
    as_mask,
    as_measure,
    as_valid,
)
from squall.data.description import About, Description, describe
from squall.data.errors import DataError, NonFinite
from squall.data.source import AnyArray, InMemory, Source, as_states

STRUCTURE_BYTES = 2**20
"""Room reserved for the structure of a file: about 1 kB a field. Large masks and areas take theirs when written."""


def write(
    path: str | os.PathLike[str],
    states: AnyArray,
    *,
    gaps: bool = False,
    mask: AnyArray | None = None,
    valid: AnyArray | None = None,
    measure: AnyArray | None = None,
    conditions: Mapping[str, Any] | None = None,
    **about: Unpack[About],
) -> Path:
    """Write trajectories u[batch, time, channel, *space] as an HDF5 file in the layout of The Well.

    The file is written beside its place under a name of its own and then put there, so that it is either
    whole or not there, and an existing file is never touched. The numbers are kept bit for bit.

    Args:
        path: of the new file; its folder is made where there is none. The Well reads `*.hdf5` and `*.h5`.
        states: (batch, time, channel, *space), float32 or float64, in one to three space dimensions.
        gaps: whether NaN means a missing value: a mask where it never changes, a gap where it comes and goes.
        mask: points that count, bool (*space) or (channel, *space).
        valid: states without a gap, bool (trajectory, time).
        measure: relative areas of cells (*space).
        conditions: what the state depends on, by name: (trajectory,), (trajectory, time) or (*space); or in full
            (trajectory or 1, time or 1, channel, *space or 1).
        about: `dt`, the time between two states in the unit of the simulation, and what `describe` takes beside it:
            `fields`, `lengths` or `coordinates`, `axes`, `boundary`, `name`, `parameters`, `provenance`.

    Returns:
        The path of the file.

    Raises:
        DataError: NaN or infinity (where, how many), one time only, wrong rank, an argument that is wrong.
        FileExistsError: where there is such a file already.
        OSError: where the disk is full or the folder cannot be written to; nothing is left behind.

    Example:
        >>> import tempfile, squall.data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write(f"{folder}/waves.hdf5", np.zeros((4, 11, 1, 50)), dt=0.1, lengths=10.0)
        ...     squall.data.open(path)
        TrajectoryFile('trajectories', shape=(4, 11, 1, 50), fields=('u',), dt=0.1)
    """
    tensor = as_states(states)
    describe(tensor.shape, **about)
    refuse_existing(Path(path))
    beside = {"mask": mask, "valid": valid, "measure": measure, "conditions": conditions}
    return convert(InMemory(tensor, gaps=gaps, **beside, **about), path)


def convert(source: Source, path: str | os.PathLike[str]) -> Path:
    """Write all of a source as a file in the layout of The Well, a piece at a time.

    Mask, gaps, areas and conditions are kept: masks and areas as fields that do not change, whole states as the scalar
    `valid`, parameters and forcings as scalars, static fields as fields that do not change. An attribute `role` says
    which is which. States in a gap stay NaN. A condition of several channels that is no vector gets one field each.

    Raises:
        DataError, FileExistsError, OSError: as `write` does.

    Example:
        >>> import tempfile, squall.data
        >>> source = InMemory(torch.zeros(4, 11, 1, 8), dt=0.1, conditions={"viscosity": torch.arange(4.0)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     squall.data.open(convert(source, f"{folder}/waves.hdf5")).conditions
        (Condition(name='viscosity', kind='parameter', shape=(4, 1, 1, 1)),)
    """
    beside = Beside(
        source.mask,
        source.valid,
        source.measure,
        tuple(condition for condition in source.conditions if condition.name not in source.parameters),
    )
    with _writer(Path(path), source.shape, source.dtype, source.description, beside) as writer:
        for chosen, start, stop in source.chunks():
            rows = torch.tensor(chosen)
            starts = torch.full_like(rows, start)
            writer._put(source._gather(rows, starts, stop - start), chosen.start, start)
            for name, _, _, shape in writer._slots:
                if chosen.start * (shape[0] > 1) + start * (shape[1] > 1) == chosen.start + start:
                    values = source._condition(name, rows, starts, stop - start)
                    writer._put_condition(name, values, chosen.start, start)
        writer.written = source.trajectories
    return Path(path)


@contextlib.contextmanager
def create(
    path: str | os.PathLike[str],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    mask: AnyArray | None = None,
    valid: AnyArray | None = None,
    measure: AnyArray | None = None,
    conditions: Mapping[str, Any] | None = None,
    **about: Unpack[About],
) -> "Iterator[Writer]":
    """Write a file piece by piece, for data that do not fit into memory.

    The file appears when the block ends and all `shape[0]` trajectories were appended; an error in the block
    leaves nothing behind. Room on the disk is reserved before the first trajectory is computed.

    Args:
        path: of the new file.
        shape: of the whole, (batch, time, channel, *space).
        dtype: float32 or float64.
        mask, valid, measure, conditions: as for `write`.
        about: as for `write`.

    Yields:
        A `Writer`, whose `append` takes some trajectories at a time.

    Raises:
        DataError, FileExistsError, OSError: as `write` does; and where trajectories are missing at the end.

    Example:
        >>> import tempfile, squall.data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with create(f"{folder}/large.hdf5", (6, 11, 1, 50), dt=0.1) as file:
        ...         for _ in range(3):
        ...             file.append(torch.rand(2, 11, 1, 50, dtype=torch.float64))
        ...     squall.data.open(f"{folder}/large.hdf5").trajectories
        6
    """
    if dtype not in (torch.float32, torch.float64):
        raise DataError(f"dtype: got {dtype}; allowed are torch.float32 and torch.float64")
    description, shape = describe(shape, **about), tuple(shape)
    held = as_conditions(conditions, shape, dtype)
    beside = Beside(
        as_mask(mask, shape),
        as_valid(valid, shape),
        as_measure(measure, shape[3:]),
        tuple(Condition.of(name, values.shape) for name, values in held.items()),
    )
    with _writer(Path(path), shape, dtype, description, beside) as writer:
        for name, values in held.items():
            writer._put_condition(name, values, 0, 0)
        yield writer


@dataclass(frozen=True, eq=False)
class Beside:
    """What is written beside the states."""

    mask: Mask | None = None
    valid: Valid | None = None
    measure: Areas | None = None
    conditions: tuple[Condition, ...] = ()


class Slot(NamedTuple):
    """Room for one component of a condition, or for all of a vector, in the file."""

    name: str
    channel: int | None
    offset: int
    shape: tuple[int, ...]


@dataclass(eq=False)
class Writer:
    """Takes trajectories one batch after the other; `create` makes it."""

    _file: BinaryIO
    path: Path
    shape: tuple[int, ...]
    _dtype: torch.dtype
    _fields: tuple[str, ...]
    _valid: Valid | None
    _offsets: list[int]
    _slots: list[Slot]
    written: int = 0

    def append(self, states: AnyArray) -> None:
        """Write the next trajectories (batch, time, channel, *space).

        Raises:
            DataError: where shape or type differ from what was announced, or values are not finite.
            OSError: where the disk is full.
        """
        tensor = as_states(states)
        if tensor.shape[1:] != self.shape[1:] or tensor.dtype != self._dtype:
            raise DataError(
                f"append: got {tensor.dtype} of shape {tuple(tensor.shape)}; announced was {self._dtype} of "
                f"shape (batch, {', '.join(map(str, self.shape[1:]))})"
            )
        if self.written + len(tensor) > self.shape[0]:
            raise DataError(
                f"append: got {len(tensor)} trajectories after {self.written}; announced were {self.shape[0]}"
            )
        numbers = range(self.written, self.written + len(tensor))
        errors = NonFinite(self._fields)
        looked = tensor
        if self._valid is not None:
            gap = ~self._valid[numbers.start : numbers.stop]
            looked = tensor.masked_fill(gap.reshape(*gap.shape, *(1,) * (tensor.ndim - 2)), 0)
        errors.look(looked, numbers, [0] * len(tensor))
        errors.refuse("append")
        self._put(tensor, self.written, 0)
        self.written += len(tensor)

    def _put(self, states: Trajectories, first: int, start: int) -> None:
        """Write whole trajectories from number `first` on, or some times of one from `start` on."""
        numbers = states.cpu().numpy()
        for channel, offset in enumerate(self._offsets):
            self._place(numbers[:, :, channel], offset, first * self.shape[1] + start)

    def _put_condition(self, name: str, values: ConditionValues, first: int, start: int) -> None:
        numbers = values.to(self._dtype).cpu().numpy()
        for _, channel, offset, shape in (slot for slot in self._slots if slot.name == name):
            part = np.moveaxis(numbers, 2, -1) if channel is None else numbers[:, :, channel]
            self._place(part, offset, first * (shape[0] > 1) * shape[1] + start * (shape[1] > 1))

    def _place(self, numbers: Shaped[np.ndarray, "..."], offset: int, states_before: int) -> None:
        with explained(self.path):
            self._file.seek(offset + states_before * numbers[:1, :1].nbytes)
            write_all(self._file, np.ascontiguousarray(numbers))


@contextlib.contextmanager
def _writer(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, about: Description, beside: Beside
) -> Iterator[Writer]:
    """A writer into a temporary file, which takes its place when all went well and is removed otherwise."""
    refuse_existing(path)
    temporary = temporary_name(path)
    numbers = [shape, *(condition.shape for condition in beside.conditions)]
    data_bytes = sum(int(np.prod(size, dtype=np.int64)) for size in numbers) * dtype.itemsize
    with contextlib.ExitStack() as stack:
        with explained(path):
            stack.enter_context(writing_into(path.parent))
        try:
            with explained(path):
                try_room(temporary, data_bytes)
                offsets, slots = lay_out(temporary, shape, dtype, about, beside)
            with temporary.open("r+b", buffering=0) as raw:
                with explained(path):
                    reserve(raw, temporary.stat().st_size)
                writer = Writer(raw, path, shape, dtype, about.fields, beside.valid, offsets, slots)
                yield writer
                if writer.written != shape[0]:
                    raise DataError(
                        f"{path}: {writer.written} of the {shape[0]} trajectories announced were written; append the "
                        "rest before the block ends, or announce fewer. Nothing was kept"
                    )
                with explained(path):
                    sync_descriptor(raw.fileno())
            with explained(path):
                publish(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def try_room(temporary: Path, data_bytes: int) -> None:
    """A new file as large as the states and all that HDF5 will write beside them.

    HDF5 writes the structure only, and the states are written past it: it cannot close a file, nor give its room back,
    once the disk was full.
    """
    with temporary.open("xb", buffering=0) as file:
        write_all(file, np.zeros(STRUCTURE_BYTES, np.uint8))
        file.truncate(data_bytes + STRUCTURE_BYTES)
        reserve(file, data_bytes + STRUCTURE_BYTES)


def lay_out(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, about: Description, beside: Beside
) -> tuple[list[int], list[Slot]]:
    """Write everything but the states; returns where in the file the states and conditions begin."""
    batch, times, _, *space = shape
    axes = about.axes
    with h5py.File(path, "w", locking=False) as file:  # nobody else knows its name
        file.attrs["dataset_name"] = about.name
        file.attrs["grid_type"] = "cartesian"
        file.attrs["n_spatial_dims"] = len(space)
        file.attrs["n_trajectories"] = batch
        file.attrs["simulation_parameters"] = _words(about.parameters)
        for name, value in about.parameters.items():
            file.attrs[name] = value
        file.attrs["provenance"] = json.dumps(about.provenance)
        file.attrs["units"] = json.dumps(about.units)

        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = _words(axes)
        _axis(dimensions, "time", about.start + about.dt * np.arange(times), about.dt)
        for axis, points, spacing in zip(axes, about.coordinates, about.spacing, strict=True):
            _axis(dimensions, axis, points, spacing)

        conditions = file.create_group("boundary_conditions")
        for axis, points, boundary in zip(axes, space, about.boundary, strict=True):
            _boundary(conditions, axis, points, "open" if boundary == "mixed" else boundary)

        for group in ("scalars", "t0_fields", "t1_fields", "t2_fields"):
            file.create_group(group).attrs["field_names"] = _words(())
        number_type = numpy_type(dtype)
        offsets = [_field(file, f"t0_fields/{name}", (batch, times, *space), number_type) for name in about.fields]
        slots = [slot for condition in beside.conditions for slot in _slots(file, condition, space, number_type)]
        _beside(file, beside, about.fields, number_type)
        return offsets, slots


def _slots(file: Any, condition: Condition, space: list[int], dtype: np.dtype) -> list[Slot]:
    """Room for a condition: a scalar or a field for each channel, or one vector field."""
    name, _, shape = condition
    leading = shape[:1] * (shape[0] > 1) + shape[1:2] * (shape[1] > 1)
    varying: dict[str, Any] = {"sample_varying": shape[0] > 1, "time_varying": shape[1] > 1}
    group = "scalars"
    if max(shape[3:]) > 1:
        group, leading = "t0_fields", (*leading, *shape[3:])
        varying |= {"dim_varying": np.array(shape[3:]) > 1} | ({"role": "forcing"} if shape[1] > 1 else {})
        if shape[2] == len(space) > 1:
            offset = _field(file, f"t1_fields/{name}", (*leading, shape[2]), dtype, **varying)
            return [Slot(name, None, offset, shape)]
    names = [name] if shape[2] == 1 else [f"{name}_{i}" for i in range(shape[2])]
    return [
        Slot(name, channel, _field(file, f"{group}/{key}", leading, dtype, **varying), shape)
        for channel, key in enumerate(names)
    ]


def _beside(file: Any, beside: Beside, fields: Sequence[str], dtype: np.dtype) -> None:
    """Mask, areas and gaps, small enough to be written at once."""
    fixed: dict[str, tuple[np.ndarray, dict[str, str]]] = {}
    if beside.mask is not None:
        shared = bool((beside.mask == beside.mask[0]).all())
        masks = {"": beside.mask[0]} if shared else dict(zip(fields, beside.mask, strict=True))
        for name, mask in masks.items():
            fixed["_".join(filter(None, ["mask", name]))] = mask.numpy().astype(dtype), {"role": "mask", "of": name}
    if beside.measure is not None:
        fixed["measure"] = beside.measure.numpy(), {"role": "measure"}
    for name, (values, attributes) in fixed.items():
        key = f"t0_fields/{name}"
        _announce(file, key)
        file[key] = values
        file[key].attrs.update(sample_varying=False, time_varying=False, dim_varying=np.ones(values.ndim, bool))
        file[key].attrs.update(attributes)
    if beside.valid is not None:
        _announce(file, "scalars/valid")
        file["scalars/valid"] = beside.valid.numpy().astype(dtype)
        file["scalars/valid"].attrs.update(sample_varying=True, time_varying=True, role="valid")


def _axis(group: Any, name: str, points: Float[np.ndarray, " points"], step: float | None) -> None:
    """The layout keeps axes in float32, which blurs the step: it stands beside, exactly."""
    axis = group.create_dataset(name, data=points.astype(np.float32))
    axis.attrs["sample_varying"] = False
    axis.attrs["time_varying"] = False
    if step is not None:
        axis.attrs["step"] = float(np.copysign(step, points[-1] - points[0]))
        axis.attrs["start"] = float(points[0])


def _boundary(group: Any, axis: str, points: int, boundary: str) -> None:
    condition = group.create_group(f"{axis}_{boundary}")
    condition.attrs["associated_dims"] = _words([axis])
    condition.attrs["associated_fields"] = _words([])
    condition.attrs["bc_type"] = boundary.upper()
    condition.attrs["sample_varying"] = False
    condition.attrs["time_varying"] = False
    mask = np.zeros(points, dtype=bool)
    mask[[0, -1]] = True
    condition["mask"] = mask


def _field(file: Any, key: str, shape: tuple[int, ...], dtype: np.dtype, **attributes: Any) -> int:
    """An empty data set in one piece; returns its place in the file."""
    _announce(file, key)
    dataset = in_place(file, key, shape, dtype)
    varying = {"dim_varying": np.ones(max(len(shape) - 2, 0), dtype=bool), "sample_varying": True, "time_varying": True}
    dataset.attrs.update(varying | attributes)
    if not shape:  # h5py drops the properties of a scalar, which then has no place before it is written
        dataset[()] = 0
    return dataset.id.get_offset()


def in_place(file: Any, key: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """A data set in one piece, which has its place in the file before anything is written."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(key, shape, dtype, dcpl=properties)


def _announce(file: Any, key: str) -> None:
    """Add a name to those of its group.

    Raises:
        DataError: where the name is taken.
    """
    group, _, name = key.partition("/")
    if key in file:
        raise DataError(f"the name '{name}' is wanted twice in {group}: a field, a condition or a mask; rename one")
    file[group].attrs["field_names"] = _words([*file[group].attrs["field_names"], name])


def _words(words: Any) -> Shaped[np.ndarray, " word"]:
    """Words as HDF5 text; an empty list keeps its type."""
    return np.array(list(words), dtype=h5py.string_dtype())


def write_all(file: BinaryIO, numbers: Any) -> None:
    rest = memoryview(numbers.reshape(-1).view(np.uint8))
    while rest:
        rest = rest[file.write(rest) :]


def reserve(file: BinaryIO, size: int) -> None:
    """Take the room on the disk now, so that a full disk is known before anything is computed."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def publish(temporary: Path, path: Path) -> None:
    """Give the finished file its name, never that of another file."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        refuse_existing(path)
        temporary.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the system name the file that was wanted, and say that nothing is left of it."""
    try:
        yield
    except FileExistsError as error:
        if error.errno is None:  # of `refuse_existing`
            raise
        refuse_existing(path)
        raise _not_written(path, error) from error
    except (OSError, RuntimeError) as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> OSError:
    code = (error.errno if isinstance(error, OSError) else None) or errno.EIO
    if code == errno.EEXIST:  # mkdir, where the folder's name is that of a file
        code = errno.ENOTDIR
    reason = str(error) if code == errno.EIO else os.strerror(code)
    advice = {
        errno.ENOSPC: "make room or choose another disk",
        errno.EDQUOT: "make room within your quota or choose another disk",
        errno.EFBIG: "the file is larger than this file system or the limit of this process allows",
        errno.EACCES: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
        errno.EROFS: "choose a disk that can be written to",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
    }.get(code, "choose another place")
    return OSError(code, f"cannot write ({reason}); {advice}. Nothing was kept", str(path))
