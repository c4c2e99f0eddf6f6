"""One interface for trajectories in memory and in a file, pieces of them, and the split for an experiment."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from squall._types import Trajectories
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
    known,
    pick,
)
from squall.data.description import About, Description, describe
from squall.data.errors import GAPS, DataError, NonFinite

AnyArray = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."]
"""What a user gives, before it is checked."""

AnyFloats = Float[Tensor, "..."]
Numbers = Int64[Tensor, " n"]

Indices = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."] | Sequence[int]
"""Whole numbers that choose trajectories or times: a list, a range, an array or a tensor."""

CHUNK_BYTES = 16 * 2**20
"""Read at a time: large enough that a read costs more than its call, small beside the memory."""


class Source(abc.ABC):
    """Trajectories of equal length on one grid: u[trajectory, time, channel, *space].

    `TrajectoryFile` and `InMemory` are sources, and so is every `subset` of one. Whoever reads cannot tell
    them apart.
    """

    _statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    _own_parts: Mapping[str, range] = {}

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
        """`windows` after its arguments were checked; refuses what is not finite, except NaN in gaps."""

    @property
    def mask(self) -> Mask | None:
        """Points that count, bool (channel, *space); `None` where all do. Masked points hold finite numbers."""
        return None

    @property
    def valid(self) -> Valid | None:
        """States without a gap, bool (trajectory, time); `None` where all are."""
        return None

    @property
    def measure(self) -> Areas | None:
        """Relative areas of the cells, float64 (*space), mean 1; `None` where all are equal."""
        return None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Parameters, static fields and forcings, which `condition` gives by name."""
        return ()

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Means and standard deviations of the channels, where the data bring them along."""
        return self._statistics

    @property
    def parts(self) -> "Split | None":
        """Train, validation and test, where the data bring them along."""
        if not self._own_parts:
            return None
        train, validation, test = (subset(self, self._own_parts[part]) for part in ("train", "valid", "test"))
        train._statistics = self._statistics
        return Split(train, validation, test)

    def condition(self, name: str, trajectories: Indices, starts: Indices, length: int) -> ConditionValues:
        """A condition at the times of `windows`: (window or 1, length or 1, channel, *space or 1).

        Raises:
            DataError: where there is no condition of this name, with the names that there are.
            IndexError: where a window reaches beyond the data.
        """
        known(name, self.conditions)
        return self._condition(name, *self._checked(trajectories, starts, length), length)

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        """`condition` after its arguments were checked."""
        raise NotImplementedError

    def _known_valid(self) -> Valid | None:
        """`valid` as far as it is known without reading."""
        return self.valid

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
        chosen, begin = self._checked(trajectories, starts, length)
        states = self._gather(chosen, begin, length)
        valid = self._known_valid()
        if valid is not None:
            whole = valid[chosen[:, None], begin[:, None] + torch.arange(length)]
            if not whole.all():
                row, time = (~whole).nonzero()[0].tolist()
                raise DataError(
                    f"{self.name}: the state of trajectory {int(chosen[row])} at time index {int(begin[row]) + time} "
                    "has a gap (missing values). `Transitions` and `squall.data.windows` leave gaps out; "
                    "`source.valid` says where they are"
                )
        return states

    def _checked(self, trajectories: Indices, starts: Indices, length: int) -> tuple[Numbers, Numbers]:
        chosen, begin = as_indices(trajectories, "trajectories"), as_indices(starts, "starts")
        if chosen.shape != begin.shape:
            raise IndexError(f"starts: {len(begin)} given for {len(chosen)} trajectories; give one for each")
        if not 1 <= length <= self.shape[1]:
            raise IndexError(f"length: got {length}; a trajectory has {self.shape[1]} states")
        check_range(chosen, self.trajectories, "trajectories")
        check_range(begin, self.shape[1] - length + 1, "starts")
        return chosen, begin

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

    def __init__(
        self,
        states: AnyArray,
        *,
        gaps: bool = False,
        mask: AnyArray | None = None,
        valid: AnyArray | None = None,
        measure: AnyArray | None = None,
        conditions: Mapping[str, Any] | None = None,
        **about: Unpack[About],
    ) -> None:
        tensor = as_states(states)
        self._hold(tensor, describe(tensor.shape, **about), mask, valid, measure, conditions, gaps=gaps)

    @classmethod
    def described(
        cls, states: AnyFloats, description: Description, like: Source | None = None, **beside: Any
    ) -> "InMemory":
        """States with the description of those that they were read or computed from, and what stands beside them.

        What stands beside them is that of another source, or given: `mask`, `valid`, `measure`, `conditions`.
        """
        source = cls.__new__(cls)
        if like is None:
            source._hold(as_states(states), description, **beside)
            return source
        every, zeros = torch.arange(like.trajectories), torch.zeros(like.trajectories, dtype=torch.int64)
        conditions = {c.name: like._condition(c.name, every, zeros, like.shape[1]) for c in like.conditions}
        source._hold(as_states(states), description, like.mask, like.valid, like.measure, conditions)
        source._statistics, source._own_parts = like._statistics, like._own_parts
        return source

    def _hold(
        self,
        states: Trajectories,
        description: Description,
        mask: Any = None,
        valid: Any = None,
        measure: Any = None,
        conditions: Mapping[str, Any] | None = None,
        gaps: bool = False,
    ) -> None:
        self._description = description
        self._states = states.contiguous()
        self._mask, self._valid = as_mask(mask, self.shape), as_valid(valid, self.shape)
        self._measure = as_measure(measure, self.space)
        self._held = as_conditions(conditions, self.shape, states.dtype)
        if gaps:
            from squall.data.missing import fill_missing

            self._states, self._mask, self._valid = fill_missing(self)
        errors = NonFinite(self.fields)
        for chosen, start, stop in self.chunks():
            piece = self._states[chosen.start : chosen.stop, start:stop]
            if self._valid is not None:
                piece = piece[self._valid[chosen.start : chosen.stop, start:stop]][None]
            errors.look(piece, chosen, [start] * len(chosen))
        errors.refuse("states", GAPS.format("gaps=True"))

    @property
    def mask(self) -> Mask | None:
        return self._mask

    @property
    def valid(self) -> Valid | None:
        return self._valid

    @property
    def measure(self) -> Areas | None:
        return self._measure

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(Condition.of(name, values.shape) for name, values in self._held.items())

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        return pick(self._held[name], trajectories, starts, length)

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


class View(Source):
    """Another look at a source: what a subclass does not say is that of the source."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def description(self) -> Description:
        return self.source.description

    @property
    def mask(self) -> Mask | None:
        return self.source.mask

    @property
    def measure(self) -> Areas | None:
        return self.source.measure


class Windows(View):
    """Pieces of equal length of a source as trajectories of their own; nothing is copied or read.

    Args:
        source: where they are cut from.
        trajectories: number of the trajectory, one per piece.
        starts: time index of the first state, one per piece.
        length: number of states in each.

    Raises:
        IndexError: where a piece reaches beyond the data.
    """

    def __init__(self, source: Source, trajectories: Indices, starts: Indices, length: int) -> None:
        super().__init__(source)
        self.length = length
        self.rows, self.starts = as_indices(trajectories, "trajectories"), as_indices(starts, "starts")
        check_range(self.rows, source.trajectories, "trajectories")
        check_range(self.starts, source.shape[1] - length + 1, "starts")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), self.length, *self.source.shape[2:])

    @property
    def description(self) -> Description:
        """That of the source; `start` is the time of the first state where all pieces share it."""
        about = self.source.description
        later = self._common_start()
        return replace(about, start=about.start + about.dt * later) if later else about

    def _common_start(self) -> int | None:
        starts = self.starts.unique()
        return None if len(starts) > 1 else int(starts.sum())

    @property
    def valid(self) -> Valid | None:
        return self._cut(self.source.valid)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        apart = self._common_start() is None  # then the pieces differ where the trajectories do not
        rows = (
            (c, len(self.rows) if c.shape[0] > 1 or (apart and c.shape[1] > 1) else 1) for c in self.source.conditions
        )
        return tuple(
            Condition(c.name, c.kind, (count, self.length if c.shape[1] > 1 else 1, *c.shape[2:])) for c, count in rows
        )

    def _cut(self, valid: Bool[Tensor, "trajectories times"] | None) -> Valid | None:
        return None if valid is None else valid[self.rows[:, None], self.starts[:, None] + torch.arange(self.length)]

    def _known_valid(self) -> Valid | None:
        return self._cut(self.source._known_valid())

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        return self.source._gather(self.rows[trajectories], self.starts[trajectories] + starts, length)

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        return self.source._condition(name, self.rows[trajectories], self.starts[trajectories] + starts, length)


class Subset(Windows):
    """Whole trajectories of a source, in the order given."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self.indices = as_indices(indices, "indices")
        check_range(self.indices, source.trajectories, "indices")
        super().__init__(source, self.indices, torch.zeros_like(self.indices), source.shape[1])


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


def split(
    source: Source,
    *,
    validation: int | float = 0,
    test: int | float = 0,
    gap: int = 0,
    by: str | None = None,
) -> Split:
    """Cut into train, validation and test: the last ones test, the last of the rest validate.

    Nothing is drawn by chance, so that a file says by itself what of it was never trained on.

    Args:
        source: all trajectories.
        validation: how many trajectories, or a fraction of all (a float below 1), at least one unless 0; in time: how
            many states.
        test: the same.
        gap: states left out between the parts in time: as many as the steps that are unrolled.
        by: "trajectory", whole ones; "time", each cut in time, the default of a single trajectory; "parts", those of
            a folder with train, valid and test, its default.

    Raises:
        DataError: where a number is negative or nothing is left to train on.

    Example:
        >>> parts = split(InMemory(torch.zeros(10, 2, 1, 8), dt=1.0), validation=0.2, test=1)
        >>> [part.trajectories for part in parts]
        [7, 2, 1]
        >>> one = InMemory(torch.zeros(1, 100, 1, 8), dt=1.0)
        >>> [part.shape[1] for part in split(one, validation=0.1, test=0.2, gap=4)]
        [62, 10, 20]
    """
    if by not in (None, "trajectory", "time", "parts"):
        raise DataError(f"by: got {by!r}; allowed are 'trajectory', 'time', 'parts'")
    if by == "parts" and source.parts is None:
        raise DataError("by='parts': the data have no parts of their own; a folder with train, valid and test has")
    if source.parts is not None and by in (None, "parts"):
        return source.parts
    if by == "time" or (by is None and source.trajectories == 1 and (validation or test)):
        from squall.data.periods import split_times

        return Split(*split_times(source, validation, test, gap))
    total = source.trajectories
    held_out, tested = share(validation, total, "validation"), share(test, total, "test")
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
    beside = sum(int(np.prod(condition.shape, dtype=np.int64)) for condition in source.conditions)
    size = source.nbytes + beside * source.dtype.itemsize
    if isinstance(source, InMemory) or size > limit_bytes or source.trajectories == 0:
        return source
    states = torch.empty(source.shape, dtype=source.dtype)
    for chosen, start, stop in source.chunks():
        trajectories = torch.tensor(chosen)
        piece = source._gather(trajectories, torch.full_like(trajectories, start), stop - start)
        states[chosen.start : chosen.stop, start:stop] = piece
    return InMemory.described(states, source.description, source)


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


def share(size: int | float, total: int, argument: str) -> int:
    """A number, or a fraction of all below 1."""
    if isinstance(size, float) and 0 < size < 1:
        return max(1, round(size * total))
    if not (size >= 0 and size % 1 == 0):
        raise DataError(f"{argument}: got {size}; give a number of trajectories, or a fraction between 0 and 1")
    return int(size)


def _wrong_type(dtype: object) -> str:
    return (
        f"states: got {dtype}; float32 and float64 are kept as they are. Give half precision as float32, whole numbers "
        "as float64, and complex numbers as two channels, the real and the imaginary parts"
    )
