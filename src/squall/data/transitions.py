"""Short windows of states: what a one-step or an unrolled model learns from."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from squall._types import Trajectories
from squall.data.conditions import ConditionValues
from squall.data.errors import DataError
from squall.data.periods import whole_windows
from squall.data.source import AnyFloats, Indices, Numbers, Source, as_indices, check_range


class Transitions(Dataset[tuple[Tensor, Tensor]]):
    """All one-step pairs (u_i, u_{i+1}) of a source, or all windows of `history` states and `unroll` next ones.

    Windows that touch a gap are left out. Without gaps, number k is start k mod n of trajectory k div n, with n starts
    in a trajectory. From a file, only the states asked for are read. A list of numbers gives a batch, so that a batch
    is read at once by `DataLoader(transitions, sampler=batch_sampler, batch_size=None)`.

    Args:
        source: the trajectories.
        unroll: number of next states.
        history: number of states up to and including the present one.

    Raises:
        DataError: where no trajectory is long enough, or every window touches a gap.

    Example:
        >>> from squall.data import InMemory
        >>> u = torch.arange(12.0).reshape(2, 6, 1, 1)
        >>> transitions = Transitions(InMemory(u, dt=0.5))
        >>> len(transitions)
        10
        >>> before, after = transitions.fetch([0, 5, 9])
        >>> before.flatten().tolist(), after.flatten().tolist()
        ([0.0, 6.0, 10.0], [1.0, 7.0, 11.0])
    """

    def __init__(self, source: Source, unroll: int = 1, history: int = 1) -> None:
        self.source, self.unroll, self.history = source, unroll, history
        if unroll < 1 or history < 1 or self.length > source.shape[1]:
            raise DataError(
                f"transitions: {history} state(s) of history and {unroll} next one(s) do not fit into the "
                f"{source.shape[1]} states of a trajectory; each is at least 1"
            )
        self._starts = source.shape[1] - self.length + 1
        whole = whole_windows(source, self.length) if source.trajectories else None
        self._whole = None if whole is None else whole.flatten().nonzero().flatten()
        if self._whole is not None and len(self._whole) == 0:
            raise DataError(
                f"{source.name}: every window of {self.length} states touches a gap; use fewer steps, or fill "
                "small gaps"
            )

    @property
    def dt(self) -> float:
        """Time between two states."""
        return self.source.dt

    @property
    def length(self) -> int:
        """Number of states in a window."""
        return self.history + self.unroll

    def __len__(self) -> int:
        return self.source.trajectories * self._starts if self._whole is None else len(self._whole)

    def locate(self, indices: Indices) -> tuple[Numbers, Numbers]:
        """Trajectory and time index of the first state of each window.

        Raises:
            IndexError: where a number is not in 0 ... len − 1.
        """
        numbers = as_indices(indices, "indices")
        check_range(numbers, len(self), "indices")
        if self._whole is not None:
            numbers = self._whole[numbers]
        return torch.div(numbers, self._starts, rounding_mode="floor"), numbers % self._starts

    def evenly(self, most: int) -> Numbers:
        """The numbers of at most so many windows, at least one, spread evenly over all."""
        return torch.linspace(0, len(self) - 1, max(1, min(most, len(self)))).round().long()

    def windows(self, indices: Indices) -> Trajectories:
        """The windows with these numbers (batch, history + unroll, channel, *space), in the order asked for."""
        return self.source.windows(*self.locate(indices), self.length)

    def condition(self, name: str, indices: Indices) -> ConditionValues:
        """A condition at the times of `windows`: (batch or 1, history + unroll or 1, channel, *space or 1)."""
        return self.source.condition(name, *self.locate(indices), self.length)

    def fetch(self, indices: Indices) -> tuple[AnyFloats, AnyFloats]:
        """The present state u (batch, channel, *space) and the next one, in the order asked for.

        They have the type of the data: a trainer casts. With more than one state of history or next state, the
        first or second is (batch, history, channel, *space) or (batch, unroll, channel, *space).

        Raises:
            IndexError: where a number is not in 0 ... len − 1.
            DataError: where the states read are not finite or the file is damaged.
        """
        states = self.windows(indices)
        past, future = states[:, : self.history], states[:, self.history :]
        past = past[:, 0] if self.history == 1 else past
        future = future[:, 0] if self.unroll == 1 else future
        return past.contiguous(), future.contiguous()

    def __getitem__(self, index: int | Indices) -> tuple[AnyFloats, AnyFloats]:
        if isinstance(index, int):
            before, after = self.fetch([index])
            return before[0], after[0]
        return self.fetch(index)
