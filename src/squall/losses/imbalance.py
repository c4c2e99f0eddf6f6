"""The imbalance-aware loss: a mean in which a point counts the more, the worse it is predicted."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from squall.losses._tracing import in_backward, is_transformed
from squall.losses.account import Account
from squall.losses.checks import check_finite, check_pair, combined_measure
from squall.losses.errors import PointwiseError, as_error, squared_error
from squall.losses.fused import FusedLoss, Passes, passes_for, solve
from squall.losses.population import ALONE
from squall.losses.temperature import DEFAULT_TEMPERATURE, Schedule, Temperature, as_rule
from squall.losses.weights import Over, Weighed, Weighing, from_groups, to_groups

__all__ = ["ImbalanceAwareLoss", "imbalance_aware_loss"]


class ImbalanceAwareLoss(nn.Module):
    """loss = Σ_i w_i l_i with w_i = p_i exp(l_i/T) / Σ_j p_j exp(l_j/T), the weights not differentiated.

    l_i is the error at point i of the batch, p_i = μ_i/Σμ its share of the measure (1/n), T the temperature.
    T → ∞ is the mean squared error, T → 0 the largest error; both are exact.

    Weights are data, not variables: the gradient is Σ w_i ∇l_i. Differentiated, the factor of ∇l_i would be
    w_i (1 + (l_i − loss)/T), negative for every l_i < loss − T, so that small errors were made *larger*.

    Args:
        temperature: T in the unit of l, or a rule that finds it: `KLBudget` (the default, nothing to tune),
            `EffectiveFraction`, `Relative`, `Schedule`.
        error: l: "squared", "absolute", "huber", or a callable (prediction, target) → tensor ≥ 0.
        over: what is normalised over together: "all" points of the batch (the paper), "sample" or "channel".
        cap: no weight above `cap` times the uniform one; what is cut off is shared out.
        mean_share: α in [0, 1]: α · mean + (1 − α) · imbalance-aware.
        trim: fraction of the points, largest errors first, that gets no weight at all (suspected outliers).
        winsorize: fraction of the points that is weighed like the largest of the rest.
        differentiate_weights: let the gradient flow through w (T stays a constant).
        reduction: "mean" for the loss, "none" for the map w_i l_i, whose sum is the loss.

    Shape:
        prediction, target: (batch, channel, *space), or any shape for `over="all"`.

    Example:
        >>> loss = ImbalanceAwareLoss(temperature=1.0)
        >>> prediction = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> value = loss(prediction, torch.zeros(2))
        >>> print(f"{value.item():.4f}")
        0.7311
        >>> value.backward()
        >>> prediction.grad
        tensor([0.0000, 1.4621])
    """

    step: Tensor
    log_inverse_temperature: Tensor

    def __init__(
        self,
        temperature: Temperature = DEFAULT_TEMPERATURE,
        error: str | PointwiseError = "squared",
        over: Over = "all",
        *,
        cap: float | None = None,
        mean_share: float = 0.0,
        trim: float = 0.0,
        winsorize: float = 0.0,
        differentiate_weights: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        self.error, self.reduction = as_error(error), reduction
        self.over: Over = over
        self.weighing = Weighing(as_rule(temperature), cap, mean_share, trim, winsorize, differentiate_weights)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("log_inverse_temperature", torch.tensor(math.nan, dtype=torch.float64))
        self._account: Account | None = None

    def forward(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Tensor:
        """The loss of a prediction.

        Args:
            prediction: shape (batch, channel, *space).
            target: the same shape.
            mask: True where a point counts; broadcastable. What is False may be NaN and gets no gradient.
            measure: μ ≥ 0, such as cell areas or quadrature weights; broadcastable. Only ratios matter.

        Returns:
            The loss, a scalar (`reduction="none"`: the map of w_i l_i), in float32 or the wider input's type.

        Raises:
            ValueError: shapes that do not match, nothing to average, NaN or infinity where it counts.
            TypeError: tensors that are not floating point.
        """
        prediction, target = check_pair(prediction, target, self.over)
        if self._plain and mask is None and measure is None and (passes := passes_for(prediction, target)):
            value = self._fused(passes, prediction, target)
            if value is not None:
                return value
        total = combined_measure(mask, measure, prediction)
        if mask is not None:  # replaced before the error, or 0 · NaN would be the gradient
            prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
        errors = self.error(prediction, target)
        check_finite(errors.detach().amax(), errors, prediction, target)
        grouped = to_groups(errors, self.over)
        weighed = self.weighing.weigh(
            grouped,
            None if total is None else to_groups(total, self.over),
            sharding=ALONE,
            log_inverse_temperature=self.log_inverse_temperature,
            step=self.step,
        )
        self._remember(weighed, grouped)
        weighted = weighed.weights * grouped
        if self.reduction == "none":
            return from_groups(weighted, errors.shape, self.over)
        return weighted.sum(dtype=torch.float64).to(errors.dtype)

    @property
    def _plain(self) -> bool:
        """Whether the fused passes know this loss."""
        return self.error is squared_error and self.over == "all" and self.reduction == "mean" and self.weighing.plain

    def _fused(self, passes: Passes, prediction: Tensor, target: Tensor) -> Tensor | None:
        """The loss by the fused passes, None where they decline."""
        rule, softness = self.weighing.at(self.step)
        solution = solve(passes, rule, float(softness), math.exp(self.log_inverse_temperature.item()))
        if solution is None:
            return None
        self._account = Account.of_solution(solution, passes.sample())
        if self.training and not in_backward():
            self._advance(math.log(solution.beta) if solution.beta else math.nan)
        return cast(Tensor, FusedLoss.apply(prediction, target, passes, solution))

    def _remember(self, weighed: Weighed, grouped: Tensor) -> None:
        """Keep the account of this call, and in training mode move on: the step, the solver's start."""
        if is_transformed():
            return
        self._account = Account.of_weights(weighed, grouped)
        if self.training and not in_backward():
            inverse = (weighed.sharpness / weighed.population.scale).log()
            self._advance(inverse.squeeze(0) if len(inverse) == 1 else math.nan)

    def _advance(self, log_inverse_temperature: Tensor | float) -> None:
        """Move on to the next step: count it, and start its solver where this one ended."""
        if isinstance(self.weighing.rule, Schedule):
            self.step.add_(1)
        self.log_inverse_temperature.fill_(log_inverse_temperature)

    def report(self) -> dict[str, float]:
        """What the last call did: plain numbers to log; computed now, not during the training step.

        Returns:
            `temperature` (unit of the error; the median over groups), `effective_fraction` (1/Σw² over n),
            `kl` (nats), `max_weight` (largest share of one point), `top_share` (weight of the 1 % of points
            with the largest errors), `mean_error`, `max_error`, `loss`. Empty before the first call.
        """
        return {} if self._account is None else self._account.numbers()

    def extra_repr(self) -> str:
        return f"temperature={self.weighing.rule}, over={self.over!r}"


def imbalance_aware_loss(
    prediction: Tensor,
    target: Tensor,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    *,
    mask: Tensor | None = None,
    measure: Tensor | None = None,
    error: str | PointwiseError = "squared",
    over: Over = "all",
    cap: float | None = None,
    mean_share: float = 0.0,
    trim: float = 0.0,
    winsorize: float = 0.0,
    differentiate_weights: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`ImbalanceAwareLoss` as a function, without memory: the solver of a budget starts anew in every call.

    Example:
        >>> imbalance_aware_loss(torch.tensor([0.0, 1.0]), torch.zeros(2), float("inf"))
        tensor(0.5000)
    """
    loss = ImbalanceAwareLoss(
        temperature,
        error,
        over,
        cap=cap,
        mean_share=mean_share,
        trim=trim,
        winsorize=winsorize,
        differentiate_weights=differentiate_weights,
        reduction=reduction,
    )
    return loss(prediction, target, mask=mask, measure=measure)
