"""The loss as two passes over the data and one write, for plain squared errors over everything.

Forward: one pass sums what the value needs and, for a budget, what the temperature needs; warm, the pass at
the temperature of the step before is enough. Backward: one pass writes the gradient. Each pass reads 2n
numbers and the backward writes n: 5n, where `mse_loss` moves 7n (it writes and reads back the squares).

The passes are in `fused_cpu` and `fused_triton`; what cannot be computed well here is declined (None), and
the eager formula takes over.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from squall.losses._tracing import is_traced
from squall.losses.checks import broadcasts
from squall.losses.fused_cpu import cpu_passes
from squall.losses.fused_measure import measured_passes
from squall.losses.population import Number
from squall.losses.sums import BOTH, FAR, FARTHEST, NEAR, Series, Sums, Tilting, scattered
from squall.losses.temperature import Budget, Fixed, KLBudget, Relative, Spread, TemperatureRule, newton_step

__all__ = ["FusedLoss", "Passes", "Solution", "betas_by_passes", "masked_passes", "passes_for", "solve"]

_TRITON = importlib.util.find_spec("triton") is not None
MOST_SWEEPS = 40
SHARPEST_BUDGET = 1e3
"""Largest b = max l / T at which float32 sums resolve a budget."""
SETTLED = 1e-4
"""Relative change of β so small that a sixth power of it does not count, nor whether it stays in its bracket."""
SERIES_STEPS = 6
"""Steps of Newton's method on a series, where it reaches."""
MASKED_SAMPLE = 1 << 14
FEW = 1000
SERIES_ERROR, BUDGET_ERROR = 3e-7, 1e-5
"""Relative errors of the value and of the budget up to which the temperature is moved without another pass."""


@runtime_checkable
class Passes(Protocol):
    """Passes over one batch; see `fused_cpu`."""

    count: int

    @property
    def measure(self) -> Tensor | None:
        """μ of mean 1, where points carry one."""
        ...

    def largest_and_mean(self) -> tuple[float, float]: ...
    def sweep(self, beta: float, once: int = 1, twice: int = 0) -> Sums: ...
    def gradient(self, beta: float, top: float, factor: Number) -> Tensor: ...
    def sample(self) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, slots=True)
class Solution:
    """The weights w_i = exp(β l_i − log_total) of n points, with their value Σ w l."""

    count: int
    beta: float
    log_total: float
    """log Σ exp(β l)."""
    value: float
    largest: float
    mean: float
    """Mean of l."""
    effective_fraction: float
    """1/Σw² over n, with a measure 1/Σ(w²/p)."""
    heaviest: float = 1.0
    """The largest weight over that of the largest error, at the temperature of the pass: 1 without a measure."""
    lagging: float | None = None
    """β that a rule which lags leaves for the next call, NaN where there is none."""

    @property
    def following(self) -> float:
        """β from which the next call starts."""
        return self.beta if self.lagging is None else self.lagging

    @property
    def kl(self) -> float:
        """KL(w‖1/n), in nats."""
        return max(0.0, self.beta * self.value - self.log_total + math.log(self.count))

    @property
    def max_weight(self) -> float:
        return self.heaviest * math.exp(self.beta * self.largest - self.log_total)

    def gradient_arguments(self, factor: Number) -> tuple[float, float, Number]:
        """What `Passes.gradient` needs for factor · 2 w (prediction − target)."""
        top = self.beta * self.largest
        return self.beta, top, factor * (2 * math.exp(top - self.log_total))


def passes_for(prediction: Tensor, target: Tensor, *, ties: bool = False) -> Passes | None:
    """The passes over these tensors, None where the eager formula has to do; `ties`: see `cpu_passes`."""
    if is_traced(prediction) or not (prediction.is_contiguous() and target.is_contiguous()):
        return None
    if prediction.device.type == "cpu" and target.device.type == "cpu":
        keep = torch.is_grad_enabled() and prediction.requires_grad
        return cpu_passes(prediction.detach(), target.detach(), keep=keep, ties=ties)
    if prediction.is_cuda and prediction.device == target.device and prediction.dtype == torch.float32 and _TRITON:
        from squall.losses.fused_triton import TritonPasses

        return TritonPasses(prediction.detach(), target.detach())
    return None


class MaskedPasses:
    """Passes over the points that a mask leaves: those behind it have no error, and what that adds is taken off again.

    Args:
        passes: over tensors of which prediction and target are both 0 behind the mask.
        prediction, target: these tensors.
        mask: True where a point counts, of their shape.
        count: how many do.
    """

    measure = None

    def __init__(self, passes: Passes, prediction: Tensor, target: Tensor, mask: Tensor, count: int) -> None:
        self.passes, self.count, self.hidden = passes, count, passes.count - count
        self.prediction, self.target, self.mask = prediction, target, mask

    def largest_and_mean(self) -> tuple[float, float]:
        largest, mean = self.passes.largest_and_mean()
        return largest, mean * self.passes.count / self.count

    def sweep(self, beta: float, once: int = 1, twice: int = 0) -> Sums:
        return self.passes.sweep(beta, once, twice).without_zeros(self.hidden)

    def gradient(self, beta: float, top: float, factor: Number) -> Tensor:
        return self.passes.gradient(beta, top, factor)

    def sample(self) -> tuple[Tensor, None]:
        places = scattered(self.passes.count, MASKED_SAMPLE, self.prediction.device)
        prediction, target, mask = (x.reshape(-1)[places] for x in (self.prediction, self.target, self.mask))
        return (prediction - target)[mask].square(), None


def masked_passes(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Passes] | None:
    """Prediction and target with 0 behind the mask, and the passes over what it leaves; None where the eager formula
    has to do, as where it leaves less than a quarter of the points: what is taken off would drown the rest."""
    if is_traced(prediction) or mask.dtype != torch.bool or not broadcasts(mask, prediction):
        return None
    mask = mask.expand(prediction.shape)
    count = int(mask.sum())
    if count == 0 or 4 * count < mask.numel():
        return None
    prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
    passes = passes_for(prediction, target, ties=True)
    if passes is None:
        return None
    return prediction, target, MaskedPasses(passes, prediction.detach(), target.detach(), mask, count)


def solve(passes: Passes, rule: TemperatureRule, softness: float, beta: float) -> Solution | None:
    """The temperature that the rule asks for, with all sums at it; None to decline.

    Args:
        passes: over the batch.
        rule: what temperature to take.
        softness: how much of the rule applies, in [0, 1].
        beta: β of the step before, NaN where there is none; only a budget uses it.
    """
    if softness == 0:
        beta = 0.0
    elif isinstance(rule, Budget):
        warm = 0 < beta < math.inf
        if warm and rule.lagged:
            return _lag(passes, rule, softness * rule.budget, beta)
        beta = beta if warm else _relative_to_mean(passes, 4.0)
        return _uniform(passes) if beta == 0 else _solve_budget(passes, rule, softness * rule.budget, beta)
    elif isinstance(rule, Relative):  # the mean costs a tenth of a sweep, which then serves the gradient too
        beta = _relative_to_mean(passes, rule.tau / softness)
    else:
        beta = softness / rule.temperature if isinstance(rule, Fixed) and rule.temperature > 0 else math.nan
    if beta == 0:
        return _uniform(passes)
    sums = _swept(passes, beta)
    return None if sums is None else _unmoved(sums, beta)


def _swept(passes: Passes, beta: float, orders: tuple[int, ...] = (1,), sharpest: float = 1e30) -> Sums | None:
    """The sums at a β that is known beforehand, None to decline."""
    if not 1e-30 < beta < 1e30:
        return None
    sums = passes.sweep(beta, *orders)
    return sums if sums.top == 0 or 1e-6 < sums.top < sharpest else None


def _lag(passes: Passes, rule: Budget, budget: float, beta: float) -> Solution | None:
    """The weights at β, whatever their divergence, and a step towards the budget for the next call."""
    sums = _swept(passes, beta, NEAR, SHARPEST_BUDGET)
    if sums is None:
        return None
    spread = rule.spread(1.0, Tilting(sums))
    step = newton_step(*spread, budget, 0.0, math.inf) if spread.is_resolved(sums.top) else math.nan
    return replace(_unmoved(sums, beta), lagging=beta * step)


def betas_by_passes(
    errors: Tensor, measure: Tensor | None, rule: TemperatureRule, softness: float, beta: float
) -> tuple[float, float] | None:
    """β of the temperature that a rule wants for the errors of one group on a CPU, and that from which the next call
    starts; None where the passes decline.

    Args:
        errors, measure: l and μ, of one shape.
        rule, softness, beta: as `solve` takes them.
    """
    if isinstance(rule, Fixed):
        return None
    roots = errors.detach().reshape(-1).sqrt()
    nothing = torch.zeros_like(roots)
    if measure is None:
        solution = solve(cpu_passes(roots, nothing), rule, softness, beta)
    else:
        found = measured_passes(roots, nothing, measure.reshape(-1))
        solution = None if found is None else solve(found[2], rule, softness, beta)
    return None if solution is None else (solution.beta, solution.following)


def _uniform(passes: Passes) -> Solution | None:
    """Uniform weights: T → ∞, and any rule where all errors are 0."""
    largest, mean = passes.largest_and_mean()
    heaviest = 1.0 if passes.measure is None else passes.measure.amax().item()
    uniform = Solution(passes.count, 0.0, math.log(passes.count), mean, largest, mean, 1.0, heaviest)
    return uniform if math.isfinite(largest + mean) else None


def effective_fraction(sums: Sums) -> float:
    """1/Σw² over n, at the inverse temperature of the sums."""
    return min(1.0, sums.zeroth**2 / (sums.twice[0] * sums.count))


def _solution(sums: Sums, swept: float, beta: float, log_total: float, value: float, fraction: float) -> Solution:
    """The solution at β, from sums at the β that was swept."""
    largest, mean = sums.top / swept, sums.plain / sums.count / swept
    heaviest = sums.heaviest * math.exp((1 - beta / swept) * sums.heaviest_below)
    return Solution(sums.count, beta, log_total, value, largest, mean, fraction, heaviest)


def _unmoved(sums: Sums, beta: float) -> Solution:
    """The solution at the β of the sums."""
    value = sums.first / sums.zeroth / beta
    return _solution(sums, beta, beta, sums.top + math.log(sums.zeroth), value, effective_fraction(sums))


def _relative_to_mean(passes: Passes, tau: float) -> float:
    """β of T = τ · mean l; 0 where all errors are 0, NaN where one is."""
    mean = passes.largest_and_mean()[1]
    return 1 / (tau * mean) if mean > 0 else mean


def _solve_budget(passes: Passes, rule: Budget, budget: float, beta: float) -> Solution | None:
    """Newton's method on log β. The series of a pass reach the next β, or another pass is taken there."""
    low, high = 0.0, math.inf
    orders, decisive = (FAR, (1,)) if isinstance(rule, KLBudget) else (BOTH, (1, 2))
    for _ in range(MOST_SWEEPS):
        if not 1e-30 < beta < 1e30:
            return None
        sums = passes.sweep(beta, *orders)
        if sums.top == 0:
            return _uniform(passes)
        if not 1e-6 < sums.top < SHARPEST_BUDGET:
            return None
        near = Tilting(sums)
        spread = rule.spread(1.0, near)
        if not (spread.divergence > 0 and spread.slope > 0):
            return None
        low, high = (low, beta) if spread.divergence > budget else (beta, high)
        ratio = _ratio(rule, budget, near, spread, max(low / beta, 1e-3), min(high / beta, 1e3))
        change = abs(ratio - 1)
        if change < FARTHEST and all(k * change < _reach(near.around(k), sums.count, budget) for k in decisive):
            return _moved(sums, near, beta, ratio)
        beta *= ratio
    return None


def _ratio(rule: Budget, budget: float, near: Tilting, spread: Spread, low: float, high: float) -> float:
    """The factor on β, between `low` and `high`, that meets the budget as far as the series can tell.

    Args:
        near: the moments near β.
        spread: what the rule says of β itself.
    """
    ratio, least, most = 1.0, low, high
    for _ in range(SERIES_STEPS):
        if abs(spread.divergence / budget - 1) < 1e-9:
            break
        step = newton_step(spread.divergence, spread.slope, budget, least, most)
        ratio *= step
        if abs(step - 1) < 1e-5 or abs(ratio - 1) > FARTHEST:  # what is left is the square of that
            break
        least, most, spread = 0.5, 2.0, rule.spread(ratio, near)
        if not (spread.divergence > 0 and spread.slope > 0):
            break
    settled = abs(ratio - 1) < SETTLED  # then a bracket may be narrower than what rounding leaves of the step
    return ratio if settled or low < ratio < high else math.sqrt(low * high)


def _reach(series: Series, count: int, budget: float) -> float:
    """How far from 1 a factor on β may be; few points have no law, and another pass over them costs nothing.

    Where the errors are nearly equal, the mean of z is large against the budget, which is what A leaves of it.
    """
    if count < FEW:
        return SETTLED
    return series.reach(min(SERIES_ERROR, BUDGET_ERROR * budget / abs(series.terms[0])))


def _moved(sums: Sums, near: Tilting, beta: float, ratio: float) -> Solution:
    """The solution at ratio · β, from the series of the sums at β."""
    log_partition, mean, _ = near(ratio)
    fraction = min(1.0, math.exp(2 * log_partition - near(2 * ratio).log_partition))
    return _solution(sums, beta, beta * ratio, log_partition + math.log(sums.count), mean / beta, fraction)


class FusedLoss(torch.autograd.Function):
    """Σ w l with the weights of a solution, detached; the gradient is 2 w (prediction − target)."""

    @staticmethod
    def forward(ctx, prediction: Tensor, target: Tensor, passes: Passes, solution: Solution) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(prediction, target)
        ctx.passes, ctx.solution = passes, solution
        return torch.scalar_tensor(solution.value, dtype=prediction.dtype, device=prediction.device)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        prediction, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            result = _differentiable_gradient(prediction, target, ctx.passes.measure, ctx.solution, gradient)
        else:
            factor = gradient.item() if gradient.device.type == "cpu" else gradient  # a device is not waited for
            result = ctx.passes.gradient(*ctx.solution.gradient_arguments(factor))
        to_prediction, to_target = ctx.needs_input_grad[:2]
        return (result if to_prediction else None), (-result if to_target else None), None, None


def _differentiable_gradient(
    prediction: Tensor, target: Tensor, measure: Tensor | None, solution: Solution, gradient: Tensor
) -> Tensor:
    difference = prediction - target
    weights = (solution.beta * difference.detach().square() - solution.log_total).exp()
    if measure is not None:
        weights = weights * measure
    return 2 * gradient * weights * difference
