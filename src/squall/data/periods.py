"""Pieces of trajectories as trajectories: windows to start a rollout from, and a split in time."""

import torch
from jaxtyping import Bool
from torch import Tensor

from squall.data.errors import DataError
from squall.data.source import Source, Windows, share


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
    requested = {"validation": validation, "test": test}
    sizes = [max(2 * isinstance(n, float), share(n, total, name)) if n else 0 for name, n in requested.items()]
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
