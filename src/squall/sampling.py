"""Which transitions make the minibatch of a step.

A sampler is a pure function of the step: it draws from a generator seeded by (seed, step). Nothing has to
be saved to resume a training to the same bits, and every rank of a distributed training knows the whole
minibatch and takes its share of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Sampler", "UniformSampler"]


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
        if not 1 <= self.batch <= self.population:
            raise ValueError(
                f"batch is {self.batch}, but the training data hold {self.population} transitions: choose a "
                f"batch from 1 to {self.population}"
            )

    def __call__(self, step: int) -> Tensor:
        generator = np.random.default_rng((self.seed, step))
        return torch.from_numpy(generator.choice(self.population, self.batch, replace=False, shuffle=False))
