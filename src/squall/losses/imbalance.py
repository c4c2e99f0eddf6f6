"""The imbalance-aware loss: a mean in which a point counts the more, the worse it is predicted."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from squall.losses._tracing import in_backward, is_traced, is_transformed
from squall.losses.account import Account, FusedAccount, GroupedAccount, account_of
from squall.losses.checks import check_finite, check_pair, combined_measure
from squall.losses.distributed import (
    Group,
    ShardedPasses,
    globally,
    globally_each,
    process_group,
    sharding_of,
    together,
)
from squall.losses.errors import PointwiseError, as_error, squared_error
from squall.losses.fused import FusedLoss, Passes, masked_passes, passes_for, solve
from squall.losses.fused_measure import measured_passes
from squall.losses.temperature import DEFAULT_TEMPERATURE, Schedule, Temperature, as_rule
from squall.losses.weights import Over, Weighed, Weighing, from_groups, to_groups

__all__ = ["Evaluated", "ImbalanceAwareLoss", "Points", "Recipe", "imbalance_aware_loss"]

Reduction = Literal["mean", "none"]

LARGE_GROUP = 1 << 12
"""Points from which a group is worth fused passes of its own."""


class Evaluated(NamedTuple):
    """A loss, and what may be asked about it or is a start for the next one."""

    value: Tensor
    account: Account | None
    log_inverse_temperature: Tensor | float
    """log β, a scalar or one per channel; NaN where there is no finite temperature to start from."""


class Points(NamedTuple):
    """The errors and their measure, each (group, point)."""

    errors: Tensor
    measure: Tensor | None


@dataclass(frozen=True)
class Recipe:
    """The loss as a pure function; `ImbalanceAwareLoss` documents the fields."""

    weighing: Weighing
    error: PointwiseError = squared_error
    over: Over = "all"
    group: Group = "world"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {self.reduction!r}")
        if isinstance(self.group, str) and self.group != "world":
            raise ValueError(f"group must be 'world', a process group or None, got {self.group!r}")

    def evaluate(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        measure: Tensor | None = None,
        step: Tensor | None = None,
        log_inverse_temperature: Tensor | None = None,
    ) -> Evaluated:
        """The loss; `step` and `log_inverse_temperature` are what remains of the calls before."""
        group = process_group(self.group)
        prediction, target = together(
            partial(check_pair, prediction, target, self.over, may_be_empty=group is not None),
            prediction.device,
            group,
        )
        if self._plain:
            fused = self._by_passes(prediction, target, mask, measure, step, log_inverse_temperature)
            if fused is not None:
                return fused
        points = together(partial(self.points, prediction, target, mask, measure), prediction.device, group)
        evaluated, _ = self.weigh(points, step, log_inverse_temperature)
        if self.reduction == "mean":
            return evaluated
        return evaluated._replace(value=from_groups(evaluated.value, prediction.shape, self.over))

    @property
    def _plain(self) -> bool:
        """Whether the fused passes know this loss."""
        return self.reduction == "mean" and self.weighing.plain

    @property
    def _starts_by_channel(self) -> bool:
        """Whether the next step's channels start where this one's ended; a sample is another one each time."""
        return self.over == "channel" and not is_transformed() and not torch.compiler.is_compiling()

    def _by_passes(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None,
        measure: Tensor | None,
        step: Tensor | None,
        log_inverse_temperature: Tensor | None,
    ) -> Evaluated | None:
        """The loss by the fused passes, None where they decline."""
        group = process_group(self.group)
        if self.error is not squared_error:
            if is_traced(prediction):
                return None
            points = together(partial(self.points, prediction, target, mask, measure), prediction.device, group)
            errors = from_groups(points.errors, prediction.shape, self.over)
            roots = errors.clamp(min=torch.finfo(errors.dtype).tiny).sqrt()  # where it is 0, the slope is infinite
            squared, rest = replace(self, error=squared_error), (step, log_inverse_temperature)
            return squared._by_passes(roots, torch.zeros_like(roots), mask, measure, *rest)
        if self.over != "all":
            if group is not None or mask is not None or measure is not None:
                return None
            parts = self._fused_groups(prediction, target, step, log_inverse_temperature)
            return None if parts is None else self._together(parts)
        shown, aim, passes = self._passes(prediction, target, mask, measure, alone=group is None)
        if group is not None:  # a mask may be there on some of the processes only
            passes = ShardedPasses.of(passes, group, prediction.device)
        return None if passes is None else self._fused(passes, shown, aim, step, log_inverse_temperature)

    @staticmethod
    def _passes(
        prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None, *, alone: bool
    ) -> tuple[Tensor, Tensor, Passes | None]:
        """The fused passes, None where there are none, and what they are over."""
        if measure is not None:
            if not alone or is_traced(prediction):
                return prediction, target, None
            total = combined_measure(mask, measure, prediction)
            assert total is not None
            if mask is not None:
                prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
            return measured_passes(prediction, target, total) or (prediction, target, None)
        if mask is not None:
            return masked_passes(prediction, target, mask) or (prediction, target, None)
        return prediction, target, passes_for(prediction, target)

    def _fused(
        self,
        passes: Passes,
        prediction: Tensor,
        target: Tensor,
        step: Tensor | None,
        log_inverse_temperature: Tensor | None,
    ) -> Evaluated | None:
        """By the fused passes, None where they decline."""
        rule, softness = self.weighing.at(step)
        warm = math.nan if log_inverse_temperature is None else math.exp(log_inverse_temperature.item())
        solution = solve(passes, rule, float(softness), warm)
        if solution is None:
            return None
        value = cast(Tensor, FusedLoss.apply(prediction, target, passes, solution))
        log_beta = math.log(solution.beta) if solution.beta else math.nan
        return Evaluated(value, FusedAccount(solution, *passes.sample()), log_beta)

    def of_each_group(self, prediction: Tensor, target: Tensor, step: Tensor | None = None) -> Tensor:
        """The loss of every group by itself, (group,), without an account; on one process."""
        prediction, target = check_pair(prediction, target, self.over)
        fusable = self._plain and self.error is squared_error
        parts = self._fused_groups(prediction, target, step) if fusable else None
        if parts is not None:
            return torch.stack([part.value for part in parts])
        points = self.points(prediction, target, None, None)
        weights = self.weighing.weigh(*points, step=step).weights
        return (weights * points.errors).sum(1, dtype=torch.float64).to(points.errors.dtype) * len(weights)

    def _fused_groups(
        self, prediction: Tensor, target: Tensor, step: Tensor | None, log_inverse_temperature: Tensor | None = None
    ) -> list[Evaluated] | None:
        """Every group by the fused passes, None where they decline."""
        if is_traced(prediction) or prediction.is_cuda:  # where many groups are one small kernel's work
            return None
        predictions, targets = to_groups(prediction, self.over), to_groups(target, self.over)
        if predictions.shape[1] < LARGE_GROUP:
            return None
        starts: list[Tensor | None] = [None] * len(predictions)
        if log_inverse_temperature is not None and log_inverse_temperature.shape == (len(starts),):
            starts = list(log_inverse_temperature)
        parts = []
        for one, aim, start in zip(predictions, targets, starts, strict=True):
            passes = passes_for(one, aim)
            part = None if passes is None else self._fused(passes, one, aim, step, start)
            if part is None:
                return None
            parts.append(part)
        return parts

    def _together(self, parts: list[Evaluated]) -> Evaluated:
        """The loss over groups of equally many points: their mean."""
        values, accounts, log_betas = zip(*parts, strict=True)
        start = torch.tensor(log_betas, dtype=torch.float64) if self._starts_by_channel else math.nan
        return Evaluated(torch.stack(values).mean(), GroupedAccount(accounts), start)

    def points(self, prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None) -> Points:
        """The pointwise errors in groups, with their measure."""
        total = combined_measure(mask, measure, prediction)
        if mask is not None:  # replaced before the error, or 0 · NaN would be the gradient
            prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
        errors = self.error(prediction, target)
        if errors.shape != prediction.shape:
            raise ValueError(
                f"error must keep the shape {tuple(prediction.shape)}, it returned {tuple(errors.shape)}; "
                f"leave the mean to the loss (reduction='none')"
            )
        check_finite(errors, prediction, target)
        return Points(to_groups(errors, self.over), None if total is None else to_groups(total, self.over))

    def weigh(
        self, points: Points, step: Tensor | None, log_inverse_temperature: Tensor | None
    ) -> tuple[Evaluated, Weighed]:
        """The loss by the formula, operator by operator (the reference, and what every transform can trace), with
        the weights that it used."""
        errors = points.errors
        sharding = sharding_of(self.over, process_group(self.group))
        if self.weighing.differentiate and sharding.world > 1:
            raise ValueError("differentiate_weights needs the whole batch on one process: pass group=None")
        weighed = self.weighing.weigh(
            errors,
            points.measure,
            sharding=sharding,
            log_inverse_temperature=log_inverse_temperature,
            step=step,
        )
        account = None if is_transformed() or torch.compiler.is_exporting() else account_of(weighed, errors)
        inverse = (weighed.sharpness / weighed.population.scale).log()
        log_beta = inverse.squeeze(0) if len(inverse) == 1 else inverse if self._starts_by_channel else math.nan
        weighted = weighed.weights * errors
        if self.reduction == "mean":
            weighted = globally(weighted.sum(dtype=torch.float64), sharding).to(errors.dtype)
        else:
            weighted = globally_each(weighted, sharding)
        return Evaluated(weighted, account, log_beta), weighed


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
        self._account: Account | None = None
        self.register_load_state_dict_pre_hook(_make_room)

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
        evaluated = self.recipe.evaluate(
            prediction, target, mask, measure, self._step_of_call(), self.log_inverse_temperature
        )
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
        starts = log_inverse_temperature
        shape = starts.shape if isinstance(starts, Tensor) else ()
        if shape != self.log_inverse_temperature.shape:  # one per channel, as the first batch shows
            self.log_inverse_temperature = self.log_inverse_temperature.new_empty(shape)
        if isinstance(starts, Tensor) and shape:
            self.log_inverse_temperature.copy_(starts)
        else:
            self.log_inverse_temperature.fill_(starts)

    @torch.no_grad()
    def weigh(self, points: Points) -> Tensor:
        """The weights (group, point) of the errors of a whole batch, which then counts as a call of the loss."""
        evaluated, weighed = self.recipe.weigh(points, self.step, self.log_inverse_temperature)
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
        prediction, target = check_pair(prediction, target, recipe.over)
        points = recipe.points(prediction, target, mask, measure)
        sharding = sharding_of(recipe.over, process_group(recipe.group))
        weighed = recipe.weighing.weigh(*points, sharding=sharding, step=self.step)
        return from_groups(weighed.weights, prediction.shape, recipe.over)

    def report(self) -> dict[str, float]:
        """What the last call did: plain numbers to log; computed now, not during the training step.

        Returns:
            `temperature` (unit of the error; the median over groups), `effective_fraction` (1/Σw² over n),
            `kl` (nats), `max_weight` (largest share of one point), `top_share` (weight of the 1 % of points
            with the largest errors; of a large batch an estimate from a sample of this process), `mean_error`,
            `max_error`, `loss`. Empty before the first call. Warm, the effective fraction of a KL budget is that at
            the temperature of the call before, which drifts by little.
        """
        return {} if self._account is None else self._account.numbers()

    def extra_repr(self) -> str:
        return f"temperature={self.recipe.weighing.rule}, over={self.recipe.over!r}"


def _make_room(loss: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The solver's starts are as many as they were when the state was saved: one, or one per channel."""
    saved = state.get(prefix + "log_inverse_temperature")
    if isinstance(saved, Tensor) and isinstance(loss, ImbalanceAwareLoss):
        loss.log_inverse_temperature = loss.log_inverse_temperature.new_empty(saved.shape)


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
