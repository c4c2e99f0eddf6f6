"""The imbalance-aware loss: a mean in which a point counts the more, the worse it is predicted."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from squall.losses._tracing import in_backward, is_transformed
from squall.losses.account import Account
from squall.losses.distributed import Group, process_group, sharding_of
from squall.losses.errors import PointwiseError, as_error
from squall.losses.recipe import Points, Recipe, Reduction
from squall.losses.temperature import DEFAULT_TEMPERATURE, Schedule, Temperature, as_rule
from squall.losses.weights import Over, Weighing, from_groups

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
        group: which processes share the batch: "world" (all, where torch.distributed runs), a group, or None.
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
        group: Group = "world",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        weighing = Weighing(as_rule(temperature), cap, mean_share, trim, winsorize, differentiate_weights)
        self.recipe = Recipe(weighing, as_error(error), over, group, reduction)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("log_inverse_temperature", torch.tensor(math.nan, dtype=torch.float64))
        self._channel_starts: Tensor | None = None  # no buffer, whose shape would have to be known beforehand
        self._account: Account | None = None
        self.register_state_dict_post_hook(_save_channel_starts)
        self.register_load_state_dict_pre_hook(_load_channel_starts)

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
        evaluated = self.recipe.evaluate(prediction, target, mask, measure, self._step_of_call(), self._starts)
        if not is_transformed():
            object.__setattr__(self, "_account", evaluated.account)  # nn.Module looks at every attribute set
            if self.training and not in_backward():
                self.advance(evaluated.log_inverse_temperature)
        return evaluated.value

    def _step_of_call(self) -> Tensor:
        """The step; of the call before, where activation checkpointing computes that one again."""
        scheduled = isinstance(self.recipe.weighing.rule, Schedule)
        return self.step - 1 if scheduled and self.training and in_backward() else self.step

    def advance(self, log_inverse_temperature: Tensor | float) -> None:
        """Move on to the next step: count it, and start its solver where this one ended."""
        if isinstance(self.recipe.weighing.rule, Schedule):
            self.step.add_(1)
        if isinstance(log_inverse_temperature, Tensor) and log_inverse_temperature.dim():
            self._channel_starts = log_inverse_temperature
        else:
            self.log_inverse_temperature.fill_(log_inverse_temperature)

    @property
    def _starts(self) -> Tensor:
        return self.log_inverse_temperature if self._channel_starts is None else self._channel_starts

    @torch.no_grad()
    def weigh(self, points: Points) -> Tensor:
        """The weights (group, point) of the errors of a whole batch, which then counts as a call of the loss."""
        evaluated, weighed = self.recipe.weigh(points, self.step, self._starts)
        self._account = evaluated.account
        if self.training:
            self.advance(evaluated.log_inverse_temperature)
        return weighed.weights

    @torch.no_grad()
    def weights(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Tensor:
        """The weights that the next call would give a batch, of its shape, summing to 1: to look at; nothing is
        remembered of it.

        Args:
            prediction, target, mask, measure: as in the call of the loss.
        """
        recipe = self.recipe
        points = recipe.agreed_points(prediction, target, mask, measure)
        sharding = sharding_of(recipe.over, process_group(recipe.group))
        weighed = recipe.weighing.weigh(*points, sharding=sharding, step=self.step)
        return from_groups(weighed.weights, prediction.shape, recipe.over)

    def report(self) -> dict[str, float]:
        """What the last call did: plain numbers to log; computed now, not during the training step.

        Returns:
            `temperature` (unit of the error; the median over groups), `effective_fraction` (1/Σw² over n),
            `kl` (nats), `max_weight` (largest share of one point), `top_share` (weight of the 1 % of points
            with the largest errors; of a large batch an estimate from a sample of this process), `mean_error`,
            `max_error`, `loss`. Empty before the first call. The effective fraction of a KL budget is right to some
            thousandths.
        """
        return {} if self._account is None else self._account.numbers()

    def extra_repr(self) -> str:
        return f"temperature={self.recipe.weighing.rule}, over={self.recipe.over!r}"


CHANNEL_STARTS = "log_inverse_temperature_of_channels"


def _save_channel_starts(loss: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if isinstance(loss, ImbalanceAwareLoss) and loss._channel_starts is not None:
        state[prefix + CHANNEL_STARTS] = loss._channel_starts


def _load_channel_starts(loss: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = state.pop(prefix + CHANNEL_STARTS, None)
    if isinstance(loss, ImbalanceAwareLoss):
        loss._channel_starts = saved.clone() if saved is not None and loss.recipe.over == "channel" else None


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
    group: Group = "world",
    reduction: Reduction = "mean",
) -> Tensor:
    """`ImbalanceAwareLoss` as a function, without memory: the solver of a budget starts anew in every call.

    Example:
        >>> imbalance_aware_loss(torch.tensor([0.0, 1.0]), torch.zeros(2), float("inf"))
        tensor(0.5000)
    """
    weighing = Weighing(as_rule(temperature), cap, mean_share, trim, winsorize, differentiate_weights)
    recipe = Recipe(weighing, as_error(error), over, group, reduction)
    return recipe.evaluate(prediction, target, mask, measure).value
