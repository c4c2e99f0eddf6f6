"""Which transitions make the minibatch of a step.

A sampler is a pure function of the step: it draws from a generator seeded by (seed, step). Nothing has to
be saved to resume a training to the same bits, and every rank of a distributed training knows the whole
minibatch and takes its share of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from squall._types import State

__all__ = ["Sampler", "StiffnessAwareSampler", "UniformSampler", "stiffness_index"]


Indices = Int[Tensor, " drawn"]


Sampler = Callable[[int], Tensor]
"""Maps the number of a step to the indices of its minibatch."""


@dataclass(frozen=True)
class UniformSampler:
    """Draw `batch` different transitions uniformly from `population`, anew at every step.

    Args:
        population: number of transitions to draw from.
        batch: size of the minibatch, at most `population`.
        seed: the trial; two samplers of one seed draw the same minibatches.

    Raises:
        ValueError: if the minibatch is empty or larger than the population.

    >>> sampler = UniformSampler(population=1000, batch=4, seed=0)
    >>> sampler(7).shape, bool((sampler(7) == sampler(7)).all())
    (torch.Size([4]), True)
    """

    population: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_batch(self.batch, self.population)

    def __call__(self, step: int) -> Indices:
        generator = np.random.default_rng((self.seed, step))
        return torch.from_numpy(generator.choice(self.population, self.batch, replace=False, shuffle=False))


def stiffness_index(u: State, u_next: State, dt: float, floor: float = 0.0) -> Float[Tensor, " batch"]:
    r"""The stiffness-aware index of transitions: how fast the state changes, relative to its size.

    .. math:: \mathrm{SAI} = \frac{\|(u' - u)/dt\|_2}{\max(\|u\|_2, \text{floor} \sqrt{M})}

    Args:
        u: first states, (batch, channel, *space), M numbers each.
        u_next: the states a time dt later.
        dt: in units of time.
        floor: a root mean square, in the unit of u, below which the denominator does not fall: a field that starts
            near zero would otherwise have its calm beginning ranked as the stiffest part. 0 for none.

    Returns:
        one index per transition, in units of 1/time; not finite where u is zero and there is no floor.

    Reference:
        Liang, Huang and Zhang, Stiffness-Aware Neural Network for Learning Hamiltonian Systems, ICLR 2022.

    >>> u = torch.tensor([[[3.0, 4.0]], [[0.0, 0.1]]])
    >>> stiffness_index(u, u + 0.1, dt=0.1, floor=1.0)
    tensor([0.2828, 1.0000])
    """
    size = u.flatten(1).norm(dim=1).clamp(min=floor * u[0].numel() ** 0.5)
    return ((u_next - u) / dt).flatten(1).norm(dim=1) / size


@dataclass(frozen=True)
class StiffnessAwareSampler:
    """SANN's minibatches: a fixed share of every minibatch comes from the stiffest transitions.

    Args:
        index: one stiffness-aware index per transition, (transition,); see `stiffness_index`.
        batch: size of the minibatch.
        fraction: of the transitions, those of the largest index, that are called stiff; in (0, 1).
        share: of the minibatch that is drawn from the stiff ones; the rest is drawn from the others. In [0, 1].
            `share = fraction` draws both alike.
        seed: the trial; two samplers of one seed draw the same minibatches.

    Raises:
        ValueError: for a number outside its range, an index that is not finite, or a part of the transitions that
            is smaller than what is to be drawn from it.

    Reference:
        Liang, Huang and Zhang, Stiffness-Aware Neural Network for Learning Hamiltonian Systems, ICLR 2022.

    >>> sampler = StiffnessAwareSampler(torch.arange(100.0), batch=10, fraction=0.2, share=0.5)
    >>> int((sampler(0) >= 80).sum())
    5
    """

    index: Tensor = field(repr=False)
    batch: int
    fraction: float = 0.2
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check_batch(self.batch, len(self.index))
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction}, but must be between 0 and 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}, but must be in [0, 1]")
        if bad := int((~self.index.isfinite()).sum()):
            raise ValueError(f"{bad} stiffness indices are not finite: some state is zero. Set a floor")
        for name, wanted, there in (
            ("stiff", self.stiff_draws, len(self.stiff)),
            ("other", self.batch - self.stiff_draws, len(self.other)),
        ):
            if wanted > there:
                raise ValueError(
                    f"a minibatch of {self.batch} takes {wanted} {name} transitions, but there are {there}: change "
                    "batch, fraction or share"
                )

    @property
    def stiff_draws(self) -> int:
        """How many of a minibatch are drawn from the stiff transitions."""
        return round(self.share * self.batch)

    @cached_property
    def is_stiff(self) -> Bool[Tensor, " transition"]:
        """Whether each transition is one of the stiff ones."""
        chosen = torch.zeros(len(self.index), dtype=torch.bool)
        count = max(1, round(self.fraction * len(self.index)))
        chosen[self.index.argsort(descending=True, stable=True)[:count]] = True
        return chosen

    @cached_property
    def stiff(self) -> Indices:
        """The numbers of the stiff transitions."""
        return self.is_stiff.nonzero().flatten()

    @cached_property
    def other(self) -> Indices:
        """The numbers of all others."""
        return (~self.is_stiff).nonzero().flatten()

    def __call__(self, step: int) -> Indices:
        generator = np.random.default_rng((self.seed, step))
        parts = ((self.stiff, self.stiff_draws), (self.other, self.batch - self.stiff_draws))
        drawn = [part[generator.choice(len(part), count, replace=False, shuffle=False)] for part, count in parts]
        return torch.cat(drawn)


def _check_batch(batch: int, population: int) -> None:
    if not 1 <= batch <= population:
        raise ValueError(
            f"batch is {batch}, but the training data hold {population} transitions: choose a "
            f"batch from 1 to {population}"
        )
