"""One interface for trajectories in memory and in a file, parts of them, and the split for an experiment."""

import abc
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from squall._types import Trajectories
from squall.data.description import About, Description, describe
from squall.data.errors import DataError, NonFinite

AnyArray = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."]
"""What a user gives, before it is checked."""

AnyFloats = Float[Tensor, "..."]
Numbers = Int64[Tensor, " n"]

Indices = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."] | Sequence[int]
"""Whole numbers that choose trajectories or times: a list, a range, an array or a tensor."""

CHUNK_BYTES = 16 * 2**20


class Source(abc.ABC):
    """Trajectories of equal length on one grid: u[trajectory, time, channel, *space].

    `TrajectoryFile` and `InMemory` are sources, and so is every `subset` of one. Whoever reads cannot tell
    them apart.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(batch, time, channel, *space)."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the numbers, as they are kept: float32 or float64."""

    @property
    @abc.abstractmethod
    def description(self) -> Description:
        """Names, axes, parameters and provenance."""

    @abc.abstractmethod
    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        """`windows` after its arguments were checked; refuses what is not finite."""

    def windows(self, trajectories: Indices, starts: Indices, length: int) -> Trajectories:
        """States u[trajectories[i], starts[i] : starts[i] + length], one window per i.

        Args:
            trajectories: number of the trajectory, one per window, in any order.
            starts: time index of the first state, one per window.
            length: number of states in each window.

        Returns:
            A tensor (window, length, channel, *space), in the order asked for.

        Raises:
            IndexError: where a window reaches beyond the data.
            DataError: where the states read are not finite or the file is damaged.
        """
        chosen, begin = as_indices(trajectories, "trajectories"), as_indices(starts, "starts")
        if chosen.shape != begin.shape:
            raise IndexError(f"starts: {len(begin)} given for {len(chosen)} trajectories; give one for each")
        if not 1 <= length <= self.shape[1]:
            raise IndexError(f"length: got {length}; a trajectory has {self.shape[1]} states")
        check_range(chosen, self.trajectories, "trajectories")
        check_range(begin, self.shape[1] - length + 1, "starts")
        return self._gather(chosen, begin, length)

    def read(self, trajectories: Indices | None = None, start: int = 0, stop: int | None = None) -> Trajectories:
        """States at the times start ... stop − 1 of some trajectories (all of them where `None`).

        Raises:
            IndexError: where trajectories or times are beyond the data.
            DataError: where the states read are not finite or the file is damaged.
        """
        chosen = as_indices(range(self.trajectories) if trajectories is None else trajectories, "trajectories")
        stop = self.shape[1] if stop is None else stop
        return self.windows(chosen, torch.full_like(chosen, start), stop - start).contiguous()

    def chunks(self, limit_bytes: int = CHUNK_BYTES) -> Iterator[tuple[range, int, int]]:
        """Pieces (trajectories, start, stop) of about `limit_bytes` at most, which together are the whole."""
        state_bytes = self.nbytes // max(1, self.shape[0] * self.shape[1])
        times = min(self.shape[1], max(1, limit_bytes // max(1, state_bytes)))
        together = max(1, limit_bytes // max(1, state_bytes * self.shape[1]))
        for first in range(0, self.trajectories, together):
            chosen = range(first, min(first + together, self.trajectories))
            for start in range(0, self.shape[1], times):
                yield chosen, start, min(start + times, self.shape[1])

    @property
    def trajectories(self) -> int:
        """Number of trajectories."""
        return self.shape[0]

    @property
    def steps(self) -> int:
        """Number of steps in a trajectory: one less than its times."""
        return self.shape[1] - 1

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[2]

    @property
    def space(self) -> tuple[int, ...]:
        """Number of points along each space axis."""
        return self.shape[3:]

    @property
    def nbytes(self) -> int:
        """Bytes that all states take in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def fields(self) -> tuple[str, ...]:
        """One name per channel."""
        return self.description.fields

    @property
    def dt(self) -> float:
        """Time between two states."""
        return self.description.dt

    @property
    def times(self) -> Float[np.ndarray, " time"]:
        """The times of the states (time,), float64."""
        return self.description.start + self.dt * np.arange(self.shape[1])

    @property
    def coordinates(self) -> tuple[Float[np.ndarray, " points"], ...]:
        """The points of each space axis, float64."""
        return self.description.coordinates

    @property
    def spacing(self) -> tuple[float | None, ...]:
        """Distance of neighbouring points of each axis; `None` where they are unequally spaced."""
        return self.description.spacing

    @property
    def boundary(self) -> tuple[str, ...]:
        """ "periodic", "wall", "open" or "mixed" for each axis."""
        return self.description.boundary

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.description.name

    @property
    def parameters(self) -> dict[str, float | str]:
        """Coefficients of the simulation."""
        return self.description.parameters

    @property
    def provenance(self) -> dict[str, object]:
        """Who made the data, and how."""
        return self.description.provenance

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, shape={self.shape}, fields={self.fields}, dt={self.dt:g})"


class InMemory(Source):
    """Trajectories held in memory; a tensor or array that is contiguous is shared, not copied.

    Args:
        states: (batch, time, channel, *space), float32 or float64.
        about: `dt` and the other arguments of `describe`.

    Raises:
        DataError: wrong rank or type, one time only, NaN or infinity (where, and how many).

    Example:
        >>> source = InMemory(torch.zeros(3, 11, 1, 50), dt=0.1)
        >>> source.trajectories, source.steps, source.channels, source.space
        (3, 10, 1, (50,))
    """

    def __init__(self, states: AnyArray, **about: Unpack[About]) -> None:
        tensor = as_states(states)
        self._hold(tensor, describe(tensor.shape, **about))

    @classmethod
    def described(cls, states: Tensor, description: Description) -> "InMemory":
        """States with the description of those that they were read or computed from."""
        source = cls.__new__(cls)
        source._hold(as_states(states), description)
        return source

    def _hold(self, states: Trajectories, description: Description) -> None:
        self._description = description
        self._states = states.contiguous()
        found = NonFinite(self.fields)
        for chosen, start, stop in self.chunks():
            piece = self._states[chosen.start : chosen.stop, start:stop]
            found.look(piece, chosen, [start] * len(chosen))
        found.refuse("states")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._states.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._states.dtype

    @property
    def description(self) -> Description:
        return self._description

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        # Time first in memory: all first and all second states of pairs are then contiguous, and not copied again.
        rows = trajectories * self.shape[1] + starts + torch.arange(length)[:, None]
        flat = self._states.flatten(0, 1)
        picked = flat.index_select(0, rows.flatten().to(flat.device))
        return picked.unflatten(0, (length, len(trajectories))).transpose(0, 1)


class Subset(Source):
    """Some trajectories of a source, in the order given; nothing is copied or read."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.source = source
        self.indices = as_indices(indices, "indices")
        check_range(self.indices, source.trajectories, "indices")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def description(self) -> Description:
        return self.source.description

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        return self.source._gather(self.indices[trajectories], starts, length)


def subset(source: Source, indices: Indices) -> Subset:
    """A view of some trajectories of `source`, in the order of `indices`.

    Raises:
        IndexError: where an index is beyond the data.
    """
    return Subset(source, indices)


class Split(NamedTuple):
    """The three parts of an experiment's data; `validation` and `test` may be empty."""

    train: Source
    validation: Source
    test: Source


def split(source: Source, *, validation: int | float = 0, test: int | float = 0) -> Split:
    """Cut trajectories into train, validation and test: the last ones test, the last of the rest validate.

    Nothing is drawn by chance, so that a file says by itself which of its trajectories were never trained on.

    Args:
        source: all trajectories.
        validation: how many trajectories, or a fraction of all (a float below 1), at least one unless 0.
        test: the same.

    Raises:
        DataError: where a number is negative or nothing is left to train on.

    Example:
        >>> parts = split(InMemory(torch.zeros(10, 2, 1, 8), dt=1.0), validation=0.2, test=1)
        >>> [part.trajectories for part in parts]
        [7, 2, 1]
    """
    total = source.trajectories
    held_out, tested = _count(validation, total, "validation"), _count(test, total, "test")
    left = total - held_out - tested
    if left < 1:
        raise DataError(
            f"split: {held_out} for validation and {tested} for test leave none of {total} to train on; "
            f"together they may take at most {total - 1}"
        )
    return Split(
        subset(source, range(left)),
        subset(source, range(left, left + held_out)),
        subset(source, range(left + held_out, total)),
    )


def load(source: Source, limit_bytes: int = 2 * 2**30) -> Source:
    """The source itself, or a copy of it in memory where that takes no more than `limit_bytes`.

    Raises:
        DataError: where the states are not finite or the file is damaged.
    """
    if isinstance(source, InMemory) or source.nbytes > limit_bytes or source.trajectories == 0:
        return source
    states = torch.empty(source.shape, dtype=source.dtype)
    for chosen, start, stop in source.chunks():
        states[chosen.start : chosen.stop, start:stop] = source.read(chosen, start, stop)
    return InMemory.described(states, source.description)


def as_states(states: AnyArray) -> AnyFloats:
    """The states as a tensor outside the graph of gradients.

    Raises:
        DataError: where the numbers are neither float32 nor float64.
    """
    if isinstance(states, np.ndarray):
        native = states.dtype.newbyteorder("=")
        if native not in (np.float32, np.float64):
            raise DataError(_wrong_type(states.dtype))
        return torch.from_numpy(np.ascontiguousarray(states.astype(native, copy=not states.flags.writeable)))
    if states.dtype not in (torch.float32, torch.float64):
        raise DataError(_wrong_type(states.dtype))
    return states.detach()


def as_indices(indices: Indices, argument: str) -> Numbers:
    """Whole numbers as an int64 tensor (n,) on the CPU."""
    tensor = torch.as_tensor(indices).cpu()
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise IndexError(f"{argument}: got {tensor.dtype} of shape {tuple(tensor.shape)}; give a list of whole numbers")
    return tensor.to(torch.int64)


def check_range(indices: Numbers, size: int, argument: str) -> None:
    """Refuse what is not in 0 ... size − 1."""
    if len(indices) == 0:
        return
    low, high = (int(end) for end in torch.aminmax(indices))
    if low < 0 or high >= size:
        raise IndexError(f"{argument}: got {low if low < 0 else high}; allowed are 0 ... {size - 1}")


def _count(share: int | float, total: int, argument: str) -> int:
    if isinstance(share, float) and 0 < share < 1:
        return max(1, round(share * total))
    if not (share >= 0 and share % 1 == 0):
        raise DataError(f"{argument}: got {share}; give a number of trajectories, or a fraction between 0 and 1")
    return int(share)


def _wrong_type(found: object) -> str:
    return (
        f"states: got {found}; float32 and float64 are kept as they are. Give half precision as float32, whole numbers "
        "as float64, and complex numbers as two channels, the real and the imaginary parts"
    )
