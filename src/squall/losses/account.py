"""Where the weight went: the numbers of the last call, computed when somebody asks."""

import math
from collections.abc import Sequence
from statistics import fmean, median_low
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from squall.losses.checks import check_labels, combined_measure
from squall.losses.fused import Solution
from squall.losses.sums import scattered
from squall.losses.weights import Weighed

__all__ = ["Account", "FusedAccount", "GroupedAccount", "WeighedAccount", "account_of", "weight_shares"]

SAMPLE = 1 << 17
"""Points kept for the share of the top 1 %; exact up to here, a sample above."""
TOP = 0.01


class WeighedAccount(NamedTuple):
    """The account of weights made by the eager formula: scalars on the device, and a sample of points."""

    scalars: dict[str, Tensor]
    weights: Tensor
    measure: Tensor
    """Share of the measure."""
    errors: Tensor

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers."""
        numbers = {name: float(value) for name, value in self.scalars.items()}
        return numbers | {"top_share": top_share(self.weights, self.measure, self.errors)}


class FusedAccount(NamedTuple):
    """The account of the fused passes: the solution, and a sample of points of this process."""

    solution: Solution
    errors: Tensor
    measure: Tensor | None = None
    """μ of mean 1."""

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers; only `top_share` is that of the sample."""
        return GroupedAccount((self,)).numbers()

    def thinned(self, most: int) -> "FusedAccount":
        """The same with no more than so many points."""
        places = scattered(len(self.errors), max(most, 1), self.errors.device)
        return self._replace(errors=self.errors[places], measure=None if self.measure is None else self.measure[places])

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, shares of the measure, and errors."""
        errors = self.errors.double()
        measure = torch.ones_like(errors) if self.measure is None else self.measure.double()
        weights = measure * (self.solution.beta * errors - self.solution.log_total).exp()
        return weights, measure / self.solution.count, errors


class GroupedAccount(NamedTuple):
    """The account of groups of equally many points, each solved by fused passes of its own."""

    groups: tuple[FusedAccount, ...]

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers: of the weights of all groups together, each of which has an equal share."""
        solutions, count = [group.solution for group in self.groups], len(self.groups)
        weights, measure, errors = map(torch.cat, zip(*(group.sample() for group in self.groups), strict=True))
        return {
            "temperature": median_low(1 / s.beta if s.beta else math.inf for s in solutions),
            "effective_fraction": 1 / fmean(1 / s.effective_fraction for s in solutions),
            "kl": fmean(s.kl for s in solutions),
            "max_weight": max(s.max_weight for s in solutions) / count,
            "mean_error": fmean(s.mean for s in solutions),
            "max_error": max(s.largest for s in solutions),
            "loss": fmean(s.value for s in solutions),
            "top_share": top_share(weights / count, measure / count, errors),
        }


Account = WeighedAccount | FusedAccount | GroupedAccount


@torch.no_grad()
def account_of(weighed: Weighed, errors: Tensor) -> WeighedAccount:
    """The account of weights w (group, point) against their measure p."""
    population, weights, errors = weighed.population, weighed.weights.detach(), errors.detach()
    within, across, _ = population.sharding
    uniform = (population.share / population.mass).unsqueeze(1).to(weights.dtype)
    measure = uniform.expand_as(weights) if population.measure is None else uniform * population.measure
    ratio = torch.where(measure > 0, weights / measure, 0)
    summands = weights * ratio, torch.xlogy(weights, ratio), measure * errors, weights * errors
    sums = torch.stack([summand.sum(dtype=torch.float64) for summand in summands])
    largest = torch.stack([_amax(weights), _amax(population.top)])
    concentration, kl, mean, loss = across(within(sums, "sum"), "sum").unbind()
    max_weight, max_error = across(within(largest, "max"), "max").unbind()
    scalars = {
        "temperature": (population.scale / weighed.sharpness).median(),
        "effective_fraction": 1 / concentration,
        "kl": kl.clamp(min=0),
        "max_weight": max_weight,
        "mean_error": mean,
        "max_error": max_error,
        "loss": loss,
    }
    return WeighedAccount(scalars, _thinned(weights), _thinned(measure), _thinned(errors))


def top_share(weights: Tensor, measure: Tensor, errors: Tensor) -> float:
    """Weight of the TOP share of the measure with the largest errors, from a sample of the points.

    As one minus the weight of the others, which no single point rules: a sample that misses the few points that
    have all the weight says so.
    """
    weights, measure, errors = weights.double(), measure.double(), errors.double()
    order = errors.argsort(descending=True)
    measure, weights = measure[order], weights[order]
    before = measure.cumsum(0) - measure
    taken = ((TOP * measure.sum() - before) / measure.clamp(min=1e-300)).clamp(0, 1)
    return min(1.0, max(0.0, float(1 - (weights * (1 - taken)).sum() / measure.sum())))


def _amax(values: Tensor) -> Tensor:
    """The largest value, 0 where there is none."""
    return values.amax() if values.numel() else values.new_zeros(())


def _thinned(values: Tensor) -> Tensor:
    return values.reshape(-1)[scattered(values.numel(), SAMPLE, values.device)]


def weight_shares(
    weights: Tensor,
    labels: Tensor | Literal["channel"],
    names: Sequence[str] | None = None,
    *,
    mask: Tensor | None = None,
    measure: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Where the weight goes: the share of each class of points in the weight, and in the points.

    Args:
        weights: w, as `ImbalanceAwareLoss.weights` or `imbalance_weights` gives them, shape (batch, channel, *space).
        labels: the class of every point, integers from 0, broadcastable; or "channel".
        names: of the classes; the numbers otherwise.
        mask, measure: as the loss was given them: what is masked is no point, and points count by their measure.

    Returns:
        For every class `weight` and `points` (each sums to 1 over the classes) and `ratio`, their quotient: how
        much more a point of the class counts than in the mean.

    Raises:
        ValueError: for labels that do not broadcast or are negative, or fewer names than classes.

    Example:
        >>> shares = weight_shares(torch.tensor([0.1, 0.1, 0.8]), torch.tensor([0, 0, 1]), ["calm", "violent"])
        >>> round(shares["violent"]["ratio"], 3)
        2.4
    """
    if isinstance(labels, str):
        labels = torch.arange(weights.shape[1], device=weights.device).view(-1, *[1] * (weights.dim() - 2))
    total = combined_measure(mask, measure, weights)
    check_labels(labels, weights, names)
    classes = labels.broadcast_to(weights.shape).reshape(-1)
    weight = torch.bincount(classes, weights.reshape(-1).double())
    points = torch.bincount(classes, None if total is None else total.reshape(-1).double()).double()
    weight, points = weight / weight.sum(), points / points.sum()
    return {
        names[k] if names else str(k): {"weight": w, "points": p, "ratio": w / p if p else math.nan}
        for k, (w, p) in enumerate(zip(weight.tolist(), points.tolist(), strict=True))
    }
