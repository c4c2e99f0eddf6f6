"""Pairs of a state and the next one: what a one-step model learns from."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from squall._types import State
from squall.data.source import Indices, Numbers, Source, as_indices, check_range


class Transitions(Dataset[tuple[Tensor, Tensor]]):
    """All one-step pairs (u_i, u_{i+1}) of a source: trajectories × steps of them.

    Transition number k is step k mod steps of trajectory k div steps. From a file, only the states asked for
    are read. A list of numbers gives a batch, so that a batch is read at once by
    `DataLoader(transitions, sampler=batch_sampler, batch_size=None)`.

    Args:
        source: the trajectories.

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

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def dt(self) -> float:
        """Time between the two states of a pair."""
        return self.source.dt

    def __len__(self) -> int:
        return self.source.trajectories * self.source.steps

    def locate(self, indices: Indices) -> tuple[Numbers, Numbers]:
        """Trajectory and time index of the first state of each transition.

        Raises:
            IndexError: where a number is not in 0 ... len − 1.
        """
        numbers = as_indices(indices, "indices")
        check_range(numbers, len(self), "indices")
        return torch.div(numbers, self.source.steps, rounding_mode="floor"), numbers % self.source.steps

    def fetch(self, indices: Indices) -> tuple[State, State]:
        """The pairs (u, u_next) with these numbers, each (batch, channel, *space), in the order asked for.

        They have the type of the data: a trainer casts.

        Raises:
            IndexError: where a number is not in 0 ... len − 1.
            DataError: where the states read are not finite or the file is damaged.
        """
        trajectories, starts = self.locate(indices)
        pairs = self.source.windows(trajectories, starts, 2)
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()

    def __getitem__(self, index: int | Indices) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            before, after = self.fetch([index])
            return before[0], after[0]
        return self.fetch(index)
