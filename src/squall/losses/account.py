"""Where the weight went: the numbers of the last call, kept as small tensors until somebody asks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from squall.losses.fused import Solution
from squall.losses.weights import Weighed

__all__ = ["Account"]

SAMPLE = 1 << 17
"""Points kept for the share of the top 1 %; exact up to here, a sample above."""
TOP = 0.01


@dataclass(frozen=True)
class Account:
    """Numbers, plain or as scalar tensors on the device, and a sample of points."""

    scalars: Callable[[], Mapping[str, Tensor | float]]
    sample: Callable[[], tuple[Tensor, Tensor, Tensor]]
    """Gives (weight, share of the measure, error) of a sample of points."""

    @classmethod
    @torch.no_grad()
    def of_weights(cls, weighed: Weighed, errors: Tensor) -> "Account":
        """The account of weights w (group, point) against their measure p."""
        population, weights, errors = weighed.population, weighed.weights.detach(), errors.detach()
        within, across, _ = population.sharding
        uniform = (population.share / population.mass).unsqueeze(1).to(weights.dtype)
        measure = uniform.expand_as(weights) if population.measure is None else uniform * population.measure
        ratio = torch.where(measure > 0, weights / measure, 0)

        def total(values: Tensor) -> Tensor:
            return across(within(values.sum(dtype=torch.float64), "sum"), "sum")

        def largest(values: Tensor) -> Tensor:
            return across(within(values.amax(), "max"), "max")

        def thinned(values: Tensor) -> Tensor:
            return values.reshape(-1)[:: stride(values)].clone()

        sample = thinned(weights), thinned(measure), thinned(errors)
        scalars = {
            "temperature": (population.scale / weighed.sharpness).median(),
            "effective_fraction": 1 / total(weights * ratio),
            "kl": total(torch.xlogy(weights, ratio)).clamp(min=0),
            "max_weight": largest(weights),
            "mean_error": total(measure * errors),
            "max_error": largest(population.top),
            "loss": total(weights * errors),
        }
        return cls(lambda: scalars, lambda: sample)

    @classmethod
    def of_solution(cls, solution: Solution, sample: Tensor) -> "Account":
        """The account of a fused pass, with errors of some points."""
        return cls(partial(_scalars, solution, sample), partial(_weighed, solution, sample))

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers."""
        return {name: float(value) for name, value in self.scalars().items()} | {"top_share": self._top_share()}

    def _top_share(self) -> float:
        """Weight of the TOP share of the measure with the largest errors."""
        weights, measure, errors = (values.double() for values in self.sample())
        order = errors.argsort(descending=True)
        measure, weights = measure[order], weights[order]
        before = measure.cumsum(0) - measure
        taken = ((TOP * measure.sum() - before) / measure.clamp(min=1e-300)).clamp(0, 1)
        return float((weights * taken).sum() / weights.sum())


def _weighed(solution: Solution, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    errors = sample.double()
    weights = (solution.beta * errors - solution.log_total).exp()
    return weights, torch.full_like(weights, 1 / solution.count), errors


def _scalars(solution: Solution, sample: Tensor) -> dict[str, float]:
    weights, _, errors = _weighed(solution, sample)
    return {
        "temperature": 1 / solution.beta if solution.beta else math.inf,
        "effective_fraction": min(1.0, float(weights.sum() ** 2 / weights.square().sum()) / len(weights)),
        "kl": solution.kl,
        "max_weight": solution.max_weight,
        "mean_error": float(errors.mean()),
        "max_error": solution.largest,
        "loss": solution.value,
    }


def stride(values: Tensor) -> int:
    """Every how many points one is kept for the sample."""
    return max(1, values.numel() // SAMPLE)
