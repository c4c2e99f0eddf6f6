"""Where the weight went: the numbers of the last call, kept as small tensors until somebody asks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from squall.losses.weights import Weighed

__all__ = ["Account"]

SAMPLE = 1 << 16
"""Points kept for the share of the top 1 %; exact below, a strided sample above."""
TOP = 0.01


@dataclass(frozen=True)
class Account:
    """Scalars (float64 tensors on the device) and a sample of (weight, measure share, error)."""

    temperature: Tensor
    effective_fraction: Tensor
    kl: Tensor
    max_weight: Tensor
    mean_error: Tensor
    max_error: Tensor
    loss: Tensor
    sample: tuple[Tensor, Tensor, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, weighed: Weighed, errors: Tensor) -> "Account":
        """The account of weights w (group, point) against their measure p."""
        population, weights = weighed.population, weighed.weights.detach()
        reduce_all = _reduce_all(population.sharding)
        errors = errors.detach()
        uniform = (population.share / population.mass).unsqueeze(1).to(weights.dtype)
        measure = uniform.expand_as(weights) if population.measure is None else uniform * population.measure
        ratio = torch.where(measure > 0, weights / measure, 0)
        kl = torch.xlogy(weights, ratio)

        def total(values: Tensor) -> Tensor:
            return reduce_all(values.sum(dtype=torch.float64), "sum")

        thin = max(1, weights.numel() // SAMPLE)
        return cls(
            temperature=(population.scale / weighed.sharpness).median(),
            effective_fraction=1 / total(weights * ratio),
            kl=total(kl),
            max_weight=reduce_all(weights.amax(), "max"),
            mean_error=total(measure * errors),
            max_error=reduce_all(population.top.amax(), "max"),
            loss=total(weights * errors),
            sample=tuple(t.reshape(-1)[::thin].clone() for t in (weights, measure, errors)),  # type: ignore[arg-type]
        )

    def numbers(self) -> dict[str, float]:
        return {
            "temperature": float(self.temperature),
            "effective_fraction": float(self.effective_fraction),
            "kl": max(0.0, float(self.kl)),
            "max_weight": float(self.max_weight),
            "top_share": self._top_share(),
            "mean_error": float(self.mean_error),
            "max_error": float(self.max_error),
            "loss": float(self.loss),
        }

    def _top_share(self) -> float:
        """Weight of the TOP share of the measure with the largest errors."""
        weights, measure, errors = (t.double() for t in self.sample)
        order = errors.argsort(descending=True)
        before = measure[order].cumsum(0) - measure[order]
        taken = ((TOP * measure.sum() - before) / measure[order].clamp(min=1e-300)).clamp(0, 1)
        return float((weights[order] * taken).sum() / weights.sum())


def _reduce_all(sharding):  # type: ignore[no-untyped-def]
    def reduce(value: Tensor, operation: str) -> Tensor:
        return sharding.across(sharding.within(value, operation), operation)

    return reduce
