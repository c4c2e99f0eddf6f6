"""Pieces of trajectories as trajectories: windows to start a rollout from, and a split in time."""

import dataclasses

import torch
from jaxtyping import Bool
from torch import Tensor

from squall._types import Trajectories
from squall.data.conditions import Condition, ConditionValues, Valid
from squall.data.description import Description
from squall.data.errors import DataError
from squall.data.source import Indices, Numbers, Source, View, as_indices, check_range, share


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
        common = self.starts.unique()
        return dataclasses.replace(about, start=about.start + about.dt * int(common[0])) if len(common) == 1 else about

    @property
    def valid(self) -> Valid | None:
        return self._cut(self.source.valid)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        lengths = {True: (len(self.rows), self.length), False: (1, 1)}
        return tuple(
            Condition(
                c.name, c.kind, (lengths[c.shape[0] > 1 or c.shape[1] > 1][0], lengths[c.shape[1] > 1][1], *c.shape[2:])
            )
            for c in self.source.conditions
        )

    def _cut(self, valid: Bool[Tensor, "trajectories times"] | None) -> Valid | None:
        return None if valid is None else valid[self.rows[:, None], self.starts[:, None] + torch.arange(self.length)]

    def _known_valid(self) -> Valid | None:
        return self._cut(self.source._known_valid())

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        return self.source._gather(self.rows[trajectories], self.starts[trajectories] + starts, length)

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        return self.source._condition(name, self.rows[trajectories], self.starts[trajectories] + starts, length)


def whole_windows(source: Source, length: int) -> Bool[Tensor, "trajectory start"] | None:
    """Which windows of `length` states have no gap: bool (trajectory, start); `None` where all have none."""
    valid = source.valid
    return None if valid is None else valid.unfold(1, length, 1).all(-1)


def windows(source: Source, length: int, stride: int | None = None) -> Windows:
    """Pieces of `length` states without gaps as trajectories, to start rollouts from many times.

    Args:
        source: of one or more trajectories.
        length: states in each piece: the first and the steps of the rollout.
        stride: distance of their starts in states; `length` (they do not overlap) if left out.

    Raises:
        DataError: where a trajectory is shorter, or no piece is without gaps.

    Example:
        >>> from squall.data import InMemory
        >>> source = InMemory(torch.arange(10.0).reshape(1, 10, 1, 1), dt=1.0)
        >>> windows(source, length=4, stride=3).read()[:, 0].flatten()
        tensor([0., 3., 6.])
    """
    stride = length if stride is None else stride
    if not 2 <= length <= source.shape[1] or stride < 1:
        raise DataError(
            f"windows: got length {length} and stride {stride}; allowed are lengths 2 ... {source.shape[1]} (the "
            "trajectory has no more states) and strides from 1"
        )
    whole = whole_windows(source, length)
    grid = torch.zeros(source.trajectories, source.shape[1] - length + 1, dtype=torch.bool)
    grid[:, ::stride] = True
    chosen = (grid if whole is None else grid & whole).nonzero()
    if len(chosen) == 0:
        raise DataError(
            f"windows: none of {int(grid.sum())} pieces of {length} states is without gaps; make them shorter"
        )
    return Windows(source, chosen[:, 0], chosen[:, 1], length)


def split_times(source: Source, validation: int | float, test: int | float, gap: int) -> tuple[Source, Source, Source]:
    """Train, validation and test follow each other in time, `gap` states apart; see `squall.data.split`."""
    total = source.shape[1]
    asked = {"validation": validation, "test": test}
    sizes = [max(2 * isinstance(n, float), share(n, total, name)) if n else 0 for name, n in asked.items()]
    apart = gap * sum(size > 0 for size in sizes)
    left = total - sum(sizes) - apart
    if left < 2 or 1 in sizes or min(sizes) < 0 or gap < 0:
        raise DataError(
            f"split in time: {sizes[0]} states for validation, {sizes[1]} for test and {apart} between the parts leave "
            f"{max(left, 0)} of {total} to train on; every part needs two states or none, as validation=0.1, test=0.2"
        )
    parts, start = [], 0
    for size in (left, *sizes):
        rows = range(source.trajectories) if size else []
        parts.append(Windows(source, rows, [start] * len(rows), max(size, 2)))
        start += size + gap if size else 0
    return parts[0], parts[1], parts[2]
