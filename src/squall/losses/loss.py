"""The imbalance-aware loss: a mean in which a point counts the more, the worse it is predicted."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from squall.losses import program
from squall.losses._tracing import in_backward, is_traced, is_transformed
from squall.losses.checks import check_any, check_finite, check_pair, check_weights, combined_measure
from squall.losses.distributed import (
    ALONE,
    Group,
    Sharding,
    globally,
    globally_each,
    own_parts,
    process_group,
    sharding_of,
    together,
)
from squall.losses.errors import Huber, Over, PointwiseError, as_error, squared_error
from squall.losses.report import Account
from squall.losses.rules import DEFAULT_TEMPERATURE, Schedule, Temperature, as_rule
from squall.losses.weights import Compiled, Weighing, from_groups, is_compiled, to_groups, weigh_compiled, weights_of

__all__ = ["Evaluated", "ImbalanceAwareLoss", "Recipe", "Reduction", "imbalance_aware_loss"]

Reduction = Literal["mean", "sum", "none"]


class Evaluated(NamedTuple):
    """A loss, and what may be asked about it."""

    value: Tensor
    account: Account | None
    log_inverse_temperature: Tensor | float
    """log β; NaN for several groups."""


@dataclass(frozen=True)
class Recipe:
    """The loss as a pure function; `ImbalanceAwareLoss` documents the fields."""

    weighing: Weighing
    error: PointwiseError = squared_error
    over: Over = "all"
    group: Group = "world"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise ValueError(f"over must be one of {', '.join(map(repr, get_args(Over)))}; got {self.over!r}")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {self.reduction!r}")
        if isinstance(self.group, str) and self.group != "world":
            raise ValueError(f"group must be 'world', a process group or None, got {self.group!r}")

    @property
    def sharding(self) -> Sharding:
        """The processes that share a batch now."""
        return sharding_of(self.over, self.group)

    def evaluate(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        measure: Tensor | None = None,
        step: Tensor | None = None,
    ) -> Evaluated:
        """The loss; `step` is the number of calls before this one, for a `Schedule`."""
        if hasattr(prediction, "device_mesh") or hasattr(target, "device_mesh"):
            return self._of_parts(prediction, target, mask, measure, step)
        sharding = self.sharding
        if is_compiled(prediction, self.weighing, sharding):
            evaluated = self._compiled(prediction, target, mask, measure, step)
        else:
            evaluated = self._program(prediction, target, mask, measure, step, sharding)
        if self.reduction != "sum":
            return evaluated
        return evaluated._replace(value=evaluated.value * self._count(prediction, mask, sharding))

    def _of_parts(self, prediction: Any, target: Any, mask: Any, measure: Any, step: Tensor | None) -> Evaluated:
        """The loss of DTensors, a plain tensor that is the same on all processes; the map is placed like them."""
        parts, shares = own_parts(prediction, target, mask, measure, self.group)
        evaluated = dataclasses.replace(self, group=shares).evaluate(*parts, step)
        if self.reduction != "none":
            return evaluated
        mesh, placements, shape = prediction.device_mesh, prediction.placements, prediction.shape
        stride = prediction.stride()
        value = type(prediction).from_local(evaluated.value, mesh, placements, shape=shape, stride=stride)
        return evaluated._replace(value=value)

    def _count(self, prediction: Tensor, mask: Tensor | None, sharding: Sharding) -> Any:
        """n, the points that count, of all processes."""
        if sharding.world == 1 and mask is None:
            return prediction.numel()
        count = prediction.numel() if mask is None else mask.expand(prediction.shape).sum()
        count = torch.as_tensor(count, dtype=torch.float64, device=prediction.device)
        return sharding.across(sharding.within(count, "sum"), "sum").to(
            torch.promote_types(prediction.dtype, torch.float32)
        )

    def _compiled(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None, step: Tensor | None
    ) -> Evaluated:
        variables, made = self._loops(prediction, target, mask, measure, step)
        if self.reduction == "none":
            (errors,) = variables
            shown = made.weights(errors.shape) * errors
        elif made.out is not None:
            shown = _Weighted.apply(made, None, *variables)
        else:
            shown = torch.tensor(made.value, dtype=variables[0].dtype)
        log_beta = math.nan
        if len(made.rows) == 1:
            b, scale = made.rows[0, 0], made.rows[0, 2]
            log_beta = math.log(b / scale) if b > 0 else -math.inf
        return Evaluated(shown, made.account, log_beta)

    def _loops(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None, step: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Compiled]:
        """What the loss is differentiated by (prediction and target where the loops know the error, else the errors),
        and what the loops find."""
        prediction, target = check_pair(prediction, target, self.over)
        if mask is not None or measure is not None:
            check_weights(mask, measure, prediction)
        variables, delta, known = (prediction, target), None, self.error is squared_error
        if isinstance(self.error, Huber):
            known, delta = True, self.error.delta
        if not known or self.reduction == "none":
            variables, delta = (self.errors(prediction, target, mask),), None
        wanted = self.reduction == "none" or (
            torch.is_grad_enabled() and (variables[0].requires_grad or variables[-1].requires_grad)
        )
        softness = self.weighing.softness(step)
        made = weigh_compiled(variables, delta, mask, measure, self.over, self.weighing, softness, wanted)
        if made.account is None:
            errors = self.errors(prediction, target, mask)
            check_finite(errors, prediction, target, mask)
        return variables, made

    def errors(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """l of every point, that of a masked one computed from zeros."""
        if mask is not None:  # replaced before the error, or 0 · NaN would be the gradient
            prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
        errors = self.error(prediction, target)
        if errors.shape != prediction.shape:
            raise ValueError(
                f"error must keep the shape {tuple(prediction.shape)}, it returned {tuple(errors.shape)}; "
                f"leave the mean to the loss (reduction='none')"
            )
        return errors

    def checked_errors(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The errors and μ of every point; what one process refuses is an error on all."""
        group = process_group(self.group)

        def prepare() -> tuple[Tensor, Tensor | None]:
            pair = check_pair(prediction, target, self.over, may_be_empty=group is not None)
            total = combined_measure(mask, measure, pair[0])
            errors = self.errors(*pair, mask)
            check_finite(errors, *pair, mask)
            return errors, total

        return together(prepare, prediction.device, group)

    def _program(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None,
        measure: Tensor | None,
        step: Tensor | None,
        sharding: Sharding,
    ) -> Evaluated:
        if self.weighing.differentiate and sharding.world > 1:
            raise ValueError("differentiate_weights needs the whole batch on one process: pass group=None")
        errors, total = self.checked_errors(prediction, target, mask, measure)
        grouped, total = to_groups(errors, self.over), None if total is None else to_groups(total, self.over)
        made = program.weigh(grouped, total, self.weighing, self.weighing.softness(step), sharding)
        weighted = made.weights * grouped
        value = globally(program.sum_of_rows(weighted).sum(), sharding).to(errors.dtype)
        if not is_traced(prediction):
            check_any(float(sharding.across(made.total.sum(), "sum")))
        account = None
        if not is_transformed() and not torch.compiler.is_exporting():
            account = Account.of_program(made, value, sharding)
        log_beta = (made.tilt.b / made.tilt.scale).log().detach()
        log_beta = log_beta.squeeze(0) if len(log_beta) == 1 else math.nan
        if self.reduction == "none":
            value = globally_each(from_groups(weighted, errors.shape, self.over), sharding)
        return Evaluated(value, account, log_beta)

    def of_each_group(
        self,
        prediction: Tensor,
        target: Tensor,
        step: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        measure: Tensor | None = None,
    ) -> Tensor:
        """The loss of every group by itself, (group,), without an account; on one process."""
        if is_compiled(prediction, self.weighing, ALONE):
            variables, made = self._loops(prediction, target, mask, measure, step)
            values = torch.from_numpy(made.rows[:, 7] / made.partition).to(variables[0].dtype)
            return values if made.out is None else _Weighted.apply(made, values, *variables)
        errors, total = self.checked_errors(prediction, target, mask, measure)
        grouped, total = to_groups(errors, self.over), None if total is None else to_groups(total, self.over)
        made = program.weigh(grouped, total, self.weighing, self.weighing.softness(step))
        shares = made.share.to(errors.dtype).unsqueeze(1)
        return program.sum_of_rows(made.weights / shares * grouped).to(errors.dtype)


class _Weighted(torch.autograd.Function):
    """Σ w l with the weights held, or one for each group: of errors, or of a prediction and a target by their error."""

    @staticmethod
    def forward(ctx: Any, made: Compiled, values: Tensor | None, *variables: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*variables)
        ctx.made, ctx.out, ctx.shared = made._replace(out=None), made.out, values is None
        return torch.tensor(made.value, dtype=variables[0].dtype) if values is None else values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, made = ctx.saved_tensors, ctx.made  # unpacked once: activation checkpointing allows no more
        delta = made.arrays[4]
        factors = made.factors if ctx.shared else 1 / made.partition
        if torch.is_grad_enabled():  # a second derivative is asked for
            result = _differentiable(saved, made, gradient * torch.from_numpy(factors).to(gradient.dtype))
        else:
            out, ctx.out = made.again() if ctx.out is None else ctx.out, None  # None: asked for again
            factors = 2 * factors if delta is None else factors  # the derivative of a square
            if len(factors) == 1:
                result = out.mul_(gradient.item() * factors.item()).view(saved[0].shape)
            else:
                result = out.mul_((gradient * torch.from_numpy(factors)).to(out.dtype).unsqueeze(1)).view(
                    saved[0].shape
                )
        if len(saved) == 1:
            return None, None, result
        to_prediction, to_target = ctx.needs_input_grad[2:]
        return None, None, (result if to_prediction else None), (-result if to_target else None)


def _differentiable(variables: tuple[Tensor, ...], made: Compiled, factors: Tensor) -> Tensor:
    """The derivative as a function of the variables, with the weights held."""
    if len(variables) == 1:
        return (made.again() * factors.unsqueeze(1)).view(variables[0].shape)
    difference, delta = variables[0] - variables[1], made.arrays[4]
    error = squared_error if delta is None else Huber(float(delta))
    weights = made.again(error(*variables)) * factors.unsqueeze(1)
    derivative = 2 * difference if delta is None else difference.clamp(-float(delta), float(delta))
    return weights.view(difference.shape) * derivative


class ImbalanceAwareLoss(nn.Module):
    """loss = Σ_i w_i l_i with w_i = p_i exp(l_i/T) / Σ_j p_j exp(l_j/T), the weights not differentiated.

    l_i is the error at point i of the batch, p_i = μ_i/Σμ its share of the measure (1/n), T the temperature.
    T → ∞ is the mean squared error, T → 0 the largest error; both are exact.

    Weights are data, not variables: the gradient is Σ w_i ∇l_i. Differentiated, the factor of ∇l_i would be
    w_i (1 + (l_i − loss)/T), negative for every l_i < loss − T, so that small errors were made *larger*.

    Every call finds its temperature anew, from its batch alone: there is no state, but for the count of calls of a
    `Schedule`.

    Args:
        temperature: T in the unit of l, or a rule that finds it: `KLBudget` (the default, nothing to tune),
            `EffectiveFraction`, `Relative`, `Schedule`.
        error: l: "squared", "absolute", "huber", or a callable (prediction, target) → tensor ≥ 0.
        over: what is normalised over together: "all" points of the batch (the paper), each "sample", each "channel", or
            each "lead" time of (batch, channel, lead, *space).
        cap: no weight above `cap` times the uniform one; what is cut off is shared out.
        mean_share: α in [0, 1]: α · mean + (1 − α) · imbalance-aware.
        trim: fraction of the points, largest errors first, that gets no weight at all (suspected outliers).
        winsorize: fraction of the points that is weighed like the largest of the rest.
        differentiate_weights: let the gradient flow through w (T stays a constant).
        group: which processes share the batch: "world" (all, where torch.distributed runs), a group, or None. DTensors
            say themselves how they are shared.
        reduction: "mean" for the loss; "sum" for n times it, n the number of points that count; "none" for the map
            w_i l_i, whose sum is the loss.

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
        cap = math.inf if cap is None else cap
        weighing = Weighing(as_rule(temperature), cap, mean_share, trim, winsorize, differentiate_weights)
        self.recipe = Recipe(weighing, as_error(error), over, group, reduction)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("log_inverse_temperature", torch.tensor(math.nan, dtype=torch.float64), persistent=False)
        self.lagged = False
        """Whether a `LaggedAccumulation` starts from the temperature of the last call."""
        self._account: Account | None = None
        self._unconfirmed: Tensor | float | None = None
        self.register_state_dict_post_hook(_save_state)
        self.register_load_state_dict_pre_hook(_load_state)

    @property
    def reduction(self) -> Reduction:
        """As trainers read it from PyTorch's own losses."""
        return self.recipe.reduction

    def forward(
        self,
        input: Tensor | None = None,
        target: Tensor | None = None,
        *,
        prediction: Tensor | None = None,
        mask: Tensor | None = None,
        measure: Tensor | None = None,
    ) -> Tensor:
        """The loss of a prediction.

        Args:
            input: the prediction, shape (batch, channel, *space), under the name that PyTorch's losses give it.
            target: the same shape; for squared, absolute and Huber's errors the order of the two has no effect.
            prediction: another name for `input`.
            mask: True where a point counts; broadcastable. What is False may be NaN and gets no gradient.
            measure: μ ≥ 0, such as cell areas or quadrature weights; broadcastable. Only ratios matter.

        Returns:
            The loss, a scalar (`reduction="none"`: the map of w_i l_i), in float32 or the wider input's type.

        Raises:
            ValueError: shapes that do not match, nothing to average, NaN or infinity where it counts.
            TypeError: tensors that are not floating point, or a prediction or a target that is not given.
        """
        if input is None or target is None or prediction is not None:
            input, target = _pair(input, target, prediction)
        prediction = input
        evaluated = self.recipe.evaluate(prediction, target, mask, measure, self._step_of_call())
        if not is_transformed():
            object.__setattr__(self, "_account", evaluated.account)  # nn.Module looks at every attribute set
            if self.training:
                self._advance_once(evaluated.log_inverse_temperature)
        return evaluated.value

    def _step_of_call(self) -> Tensor:
        """The step; of the call before, where activation checkpointing computes that one again."""
        scheduled = isinstance(self.recipe.weighing.rule, Schedule)
        again = scheduled and self.training and in_backward() and self._unconfirmed is None
        return self.step - 1 if again else self.step

    def _advance_once(self, log_inverse_temperature: Tensor | float) -> None:
        """Move on after a call with gradients: not in a validation pass, and once where a call is computed again.

        Reentrant checkpointing calls first without gradients and then in the backward pass, which confirms that the
        first call was no validation.
        """
        if not torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                object.__setattr__(self, "_unconfirmed", log_inverse_temperature)
        elif not in_backward():
            self.advance(log_inverse_temperature)
        elif self._unconfirmed is not None:
            self.advance(self._unconfirmed)

    def advance(self, log_inverse_temperature: Tensor | float) -> None:
        """Move on to the next step: count it, and remember its temperature."""
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_unconfirmed", None)
        if isinstance(self.recipe.weighing.rule, Schedule):
            self.step.add_(1)
        self.log_inverse_temperature.fill_(log_inverse_temperature)

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
        errors, total = recipe.checked_errors(prediction, target, mask, measure)
        softness = recipe.weighing.softness(self.step)
        return weights_of(errors, mask, measure, total, recipe.weighing, recipe.over, softness, recipe.sharding)[0]

    def report(self) -> dict[str, float]:
        """What the last call did: plain numbers to log; computed now, not during the training step.

        Returns:
            `temperature` (unit of the error; the median over groups), `effective_fraction` (1/Σw² over n),
            `kl` (nats), `max_weight` (largest share of one point), `top_share` (weight of the 1 % of points
            with the largest errors), `mean_error`, `median_error`, `p90_error`, `p99_error`, `max_error`, `loss`. Empty
            before the first call. Divergences, shares and quantiles are those of the sketch, right to a thousandth (a
            quantile to a bin, 1.6 %) and without trimmed points; of more than 131 072 points in groups of up to 2 048,
            they are estimates from some of the groups.
        """
        return {} if self._account is None else self._account.numbers()

    def extra_repr(self) -> str:
        return f"temperature={self.recipe.weighing.rule}, over={self.recipe.over!r}"


STEP, LOG_BETA = "step", "log_inverse_temperature"


def _save_state(loss: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Only what the next call depends on: most losses have nothing, like PyTorch's own, and load in their place."""
    if isinstance(loss, ImbalanceAwareLoss):
        if isinstance(loss.recipe.weighing.rule, Schedule):
            state[prefix + STEP] = loss.step.detach()
        if loss.lagged:
            state[prefix + LOG_BETA] = loss.log_inverse_temperature.detach()


def _load_state(loss: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take what is there; a checkpoint of another loss has nothing, one of an earlier version more."""
    step, log_beta = state.pop(prefix + STEP, None), state.pop(prefix + LOG_BETA, None)
    state.pop(prefix + "log_inverse_temperature_of_channels", None)
    if isinstance(loss, ImbalanceAwareLoss):
        with torch.no_grad():
            if step is not None:
                loss.step.copy_(step)
            if log_beta is not None:
                loss.log_inverse_temperature.copy_(log_beta)
                loss.lagged = loss.lagged or bool(log_beta.isfinite())


def _pair(input: Tensor | None, target: Tensor | None, prediction: Tensor | None) -> tuple[Tensor, Tensor]:
    if input is not None and prediction is not None:
        raise TypeError("input and prediction are two names of one argument: pass one of them")
    prediction = input if prediction is None else prediction
    if prediction is None or target is None:
        missing = "prediction" if prediction is None else "target"
        raise TypeError(f"the loss needs a prediction and a target: {missing} is missing")
    return prediction, target


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
    """`ImbalanceAwareLoss` as a function.

    Example:
        >>> imbalance_aware_loss(torch.tensor([0.0, 1.0]), torch.zeros(2), float("inf"))
        tensor(0.5000)
    """
    cap = math.inf if cap is None else cap
    weighing = Weighing(as_rule(temperature), cap, mean_share, trim, winsorize, differentiate_weights)
    return Recipe(weighing, as_error(error), over, group, reduction).evaluate(prediction, target, mask, measure).value
