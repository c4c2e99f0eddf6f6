"""The loss as two passes over the data and one write, for plain squared errors over everything.

Forward: one pass sums what the value needs and, for a budget, what the temperature needs; warm, the pass near
the temperature of the step before is enough (see `tilting`). Backward: one pass writes the gradient. Each pass reads 2n
numbers and the backward writes n: 5n, where `mse_loss` moves 7n (it writes and reads back the squares).

The passes are in `fused_cpu` and `fused_triton`; what cannot be computed well here is declined (None), and
the eager formula takes over.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from squall.losses._tracing import is_traced
from squall.losses.checks import broadcasts
from squall.losses.fused_cpu import cpu_passes
from squall.losses.fused_measure import measured_passes
from squall.losses.passes import Passes
from squall.losses.population import Number
from squall.losses.sums import LN2, Sums, scattered
from squall.losses.temperature import Budget, Fixed, KLBudget, Relative, TemperatureRule, newton_step
from squall.losses.tilting import Tilting

__all__ = ["FusedLoss", "Solution", "beta_by_passes", "masked_passes", "passes_for", "solve"]

MOST_SWEEPS = 40
SHARPEST_BUDGET = 1e3
"""Largest b = max l / T at which float32 sums resolve a budget."""
MOST_STEPS = 40
MASKED_SAMPLE = 1 << 14
VALUE_ERROR, BUDGET_ERROR = 3e-7, 1e-5
"""Relative errors of the value and of the budget up to which the temperature is moved without another pass."""
RESOLVED = 1e-5
"""The least divergence over β l that sums in float32 tell from rounding."""
USABLE = 0.3
"""Relative error of the divergence up to which a step of Newton's method is worth taking."""
AT_TWO, BETWEEN = 14, 4 / 3
"""For a budget that looks at β and 2β: how many moments, and where the pass is taken, as a factor on β."""
STEADY = 1 << 20
"""Points from which on a batch is expected to resemble the one before more and more."""


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
    spread: float | Tilting
    """n Σw², with a measure n Σ(w²/μ), or what finds it where it is asked for."""
    heaviest: float = 1.0
    """The largest weight over that of the largest error, at the temperature of the pass: 1 without a measure."""

    @property
    def effective_fraction(self) -> float:
        """1/Σw² over n, with a measure 1/Σ(w²/p)."""
        if not isinstance(self.spread, Tilting):
            return min(1.0, 1 / self.spread)
        log_partition = self.log_total - math.log(self.count)
        return min(1.0, math.exp(2 * log_partition - self.spread(2 * self.beta).log_partition))

    @property
    def kl(self) -> float:
        """KL(w‖1/n), in nats."""
        return max(0.0, self.beta * self.value - self.log_total + math.log(self.count))

    @property
    def max_weight(self) -> float:
        return self.heaviest * math.exp(self.beta * self.largest - self.log_total)

    @property
    def for_gradient(self) -> tuple[float, float, float]:
        """What `Passes.gradient` needs for 2 w (prediction − target)."""
        top = self.beta * self.largest
        return self.beta, top, 2 * math.exp(top - self.log_total)


def passes_for(prediction: Tensor, target: Tensor, *, ties: bool = False) -> Passes | None:
    """The passes over these tensors, None where the eager formula has to do; `ties`: see `cpu_passes`."""
    if is_traced(prediction) or not (prediction.is_contiguous() and target.is_contiguous()):
        return None
    keep = torch.is_grad_enabled() and prediction.requires_grad
    if prediction.device.type == "cpu" and target.device.type == "cpu":
        return cpu_passes(prediction.detach(), target.detach(), keep=keep, ties=ties)
    if prediction.is_cuda and prediction.device == target.device and prediction.dtype == torch.float32:
        if not triton_compiles():
            return None
        from squall.losses.fused_triton import TritonPasses

        return TritonPasses(prediction.detach(), target.detach(), keep=keep)
    return None


@functools.cache
def triton_compiles() -> bool:
    """Whether Triton is there, and new enough to compile the kernels: 3.3, that of PyTorch 2.7."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


class MaskedPasses(Passes):
    """Passes over the points that a mask leaves: those behind it have no error, and what that adds is taken off again.

    Args:
        passes: over tensors of which prediction and target are both 0 behind the mask.
        prediction, target: these tensors.
        mask: True where a point counts, of their shape.
        count: how many do.
    """

    def __init__(self, passes: Passes, prediction: Tensor, target: Tensor, mask: Tensor, count: int) -> None:
        self.passes, self.count, self.hidden = passes, count, passes.count - count
        self.moments, self.single = passes.moments, passes.single
        self.prediction, self.target, self.mask = prediction, target, mask

    def largest_and_mean(self) -> tuple[float, float]:
        largest, mean = self.passes.largest_and_mean()
        return largest, mean * self.passes.count / self.count

    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        return self.passes.sweep(beta, moments).without_zeros(self.hidden)

    def anticipate(self, beta: float, top: float, scale: float) -> None:
        self.passes.anticipate(beta, top, scale)

    def gradient(self, beta: float, top: float, scale: float, factor: Number = 1.0) -> Tensor:
        return self.passes.gradient(beta, top, scale, factor)

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
        beta = beta if warm else _relative_to_mean(passes, 4.0)
        return _uniform(passes) if beta == 0 else _solve_budget(passes, rule, softness * rule.budget, beta, warm)
    elif isinstance(rule, Relative):  # the mean costs a tenth of a sweep, which then serves the gradient too
        beta = _relative_to_mean(passes, rule.tau / softness)
    else:
        beta = softness / rule.temperature if isinstance(rule, Fixed) and rule.temperature > 0 else math.nan
    if beta == 0:
        return _uniform(passes)
    return _unmoved(passes, beta)


def beta_by_passes(
    errors: Tensor, measure: Tensor | None, rule: TemperatureRule, softness: float, beta: float
) -> float | None:
    """β of the temperature that a rule wants for the errors of one group on a CPU, None where the passes decline.

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
    return None if solution is None else solution.beta


def _uniform(passes: Passes) -> Solution | None:
    """Uniform weights: T → ∞, and any rule where all errors are 0."""
    largest, mean = passes.largest_and_mean()
    heaviest = 1.0 if passes.measure is None else passes.measure.amax().item()
    uniform = Solution(passes.count, 0.0, math.log(passes.count), mean, largest, mean, 1.0, heaviest)
    return uniform if math.isfinite(largest + mean) else None


def _solution(
    sums: Sums, swept: float, beta: float, log_total: float, value: float, spread: float | Tilting
) -> Solution:
    """The solution at β, from sums at the β that was swept."""
    largest, mean = sums.top / swept, sums.plain / sums.count / swept
    heaviest = sums.heaviest * math.exp((1 - beta / swept) * sums.heaviest_below)
    return Solution(sums.count, beta, log_total, value, largest, mean, spread, heaviest)


def _unmoved(passes: Passes, beta: float) -> Solution | None:
    """The solution at a β that is known beforehand, None to decline."""
    if not 1e-30 < beta < 1e30:
        return None
    sums = passes.sweep(beta)
    if not (sums.top == 0 or 1e-6 < sums.top < 1e30):
        return None
    value, spread = sums.first / sums.zeroth / beta, sums.count * sums.squares / sums.zeroth**2
    return _solution(sums, beta, beta, sums.top + math.log(sums.zeroth), value, spread)


def _relative_to_mean(passes: Passes, tau: float) -> float:
    """β of T = τ · mean l; 0 where all errors are 0, NaN where one is."""
    mean = passes.largest_and_mean()[1]
    return 1 / (tau * mean) if mean > 0 else mean


def _solve_budget(passes: Passes, rule: Budget, budget: float, beta: float, warm: bool) -> Solution | None:
    """The budget met by what the passes so far say of all β; another pass only where they say too little."""
    near, farthest = Tilting(), 1 if isinstance(rule, KLBudget) else 2
    moments = passes.moments if farthest == 1 else (AT_TWO, passes.moments[1])
    place = beta * (BETWEEN if farthest == 2 else _caution(passes) if warm else 1.0)
    for _ in range(MOST_SWEEPS):
        if not 1e-30 < place < 1e30:
            return None
        place = _representable(place, passes)
        sums = passes.sweep(place, moments)
        if sums.top == 0:
            return _uniform(passes)
        if not 1e-6 < sums.top < SHARPEST_BUDGET:
            return None
        if sums.moments is None:  # the largest z was not what it was thought to be; now it is known
            continue
        near.add(sums, place)
        if _doubt(near, beta, budget, 1) > USABLE:
            beta = place
        if passes.single and budget < RESOLVED * sums.first / sums.zeroth:  # errors that are nearly equal
            return None
        met = _met(rule, budget, near, beta, farthest)
        if met is None:
            return None
        beta = _representable(met, passes)
        off = abs(rule.spread(beta, near).divergence / budget - 1) + _doubt(near, beta, budget, farthest)
        if near.error(beta) < VALUE_ERROR and off < BUDGET_ERROR:
            return _moved(sums, place, near, beta)
        place = beta
    return None


def _doubt(near: Tilting, beta: float, budget: float, farthest: int) -> float:
    """A bound of the error, relative to the budget, of the divergence that the passes tell of at β."""
    error = near.error(beta) if farthest == 1 else max(near.error(beta), near.error(farthest * beta))
    return error * (1 + beta * near(beta).mean) / budget


def _representable(beta: float, passes: Passes) -> float:
    """β to the precision in which passes multiply by β/log 2: what they would round counts β l times."""
    return LN2 * float(np.float32(beta / LN2)) if passes.single else beta


def _caution(passes: Passes) -> float:
    """Where to take the pass, as a factor on the β of the step before: below it, since moments reach farther up than
    down; the less so, the fewer there are, and the larger a batch is and the less its β will move."""
    return 1 - (passes.moments[0] - 6) / 24 * min(1.0, math.sqrt(STEADY / passes.count))


def _met(rule: Budget, budget: float, near: Tilting, beta: float, farthest: int) -> float | None:
    """β that meets the budget, by Newton's method from this one, as far as the passes can tell of it and of `farthest`
    times it; None where the divergence is lost in rounding."""
    low, high = 0.0, math.inf
    for _ in range(MOST_STEPS):
        if _doubt(near, beta, budget, farthest) > USABLE:
            break
        divergence, slope = rule.spread(beta, near)
        if not divergence > 0:
            return None
        if abs(divergence / budget - 1) < 1e-9:
            break
        low, high = (low, beta) if divergence > budget else (beta, high)
        step = newton_step(divergence, slope, budget, low / beta, high / beta)
        beta *= step
        if abs(step - 1) < 5e-4:  # what is left is the square of that
            break
    return beta


def _moved(sums: Sums, swept: float, near: Tilting, beta: float) -> Solution:
    """The solution at β, from what the passes say; the last of them at the β that was swept."""
    log_partition, mean, _ = near(beta)
    return _solution(sums, swept, beta, log_partition + math.log(sums.count), mean, near)


class FusedLoss(torch.autograd.Function):
    """Σ w l with the weights of a solution, detached; the gradient is 2 w (prediction − target)."""

    @staticmethod
    def forward(ctx, prediction: Tensor, target: Tensor, passes: Passes, solution: Solution) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(prediction, target)
        ctx.passes, ctx.solution = passes, solution
        passes.anticipate(*solution.for_gradient)
        return torch.scalar_tensor(solution.value, dtype=prediction.dtype, device=prediction.device)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        prediction, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            result = _differentiable_gradient(prediction, target, ctx.passes.measure, ctx.solution, gradient)
        else:
            factor = gradient.item() if gradient.device.type == "cpu" else gradient  # a device is not waited for
            result = ctx.passes.gradient(*ctx.solution.for_gradient, factor)
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
