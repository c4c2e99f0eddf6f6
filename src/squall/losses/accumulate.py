"""Gradient accumulation: micro-batches that weigh like the one large batch they make up.

The weights of a point depend on all points, so the plain sum of the losses of micro-batches is another loss.
`Accumulation` looks at every micro-batch twice and is exact; `LaggedAccumulation` looks once, with the
temperature of the step before, and puts the gradients in scale at the end. Both work over several processes, each with
as many micro-batches as the others, under DistributedDataParallel as the loss itself does.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from squall.losses.distributed import gathered, globally, process_group, sharding_of
from squall.losses.imbalance import ImbalanceAwareLoss
from squall.losses.recipe import Points
from squall.losses.sums import Moments, Sums
from squall.losses.temperature import Budget, Fixed, newton_step
from squall.losses.tilting import Tilting
from squall.losses.weights import Over

__all__ = ["Accumulation", "LaggedAccumulation"]

LARGEST_GROWTH = 80.0
"""Of β l after the first micro-batch: the exponential of more is no float32."""


class Accumulation:
    """Two calls per micro-batch: first all are observed, which fixes the weights, then all are differentiated.

    The losses of the second calls add up to the loss of the large batch, and so do their gradients.

    Args:
        loss: its settings are used, and its warm start moves on once.

    Example:
        >>> model, loss = nn.Linear(1, 1), ImbalanceAwareLoss()
        >>> parts = [(torch.randn(8, 1), torch.randn(8, 1)) for _ in range(4)]
        >>> whole = Accumulation(loss)
        >>> with torch.no_grad():
        ...     for x, y in parts:
        ...         whole.observe(model(x), y)
        >>> for x, y in parts:  # the same order
        ...     whole.loss(model(x), y).backward()
    """

    def __init__(self, loss: ImbalanceAwareLoss) -> None:
        if loss.recipe.weighing.differentiate:
            raise ValueError("Accumulation takes a loss with detached weights, not differentiate_weights=True")
        self._loss = loss
        self._observed: list[Points] = []
        self._weights: list[Tensor] | None = None

    @torch.no_grad()
    def observe(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> None:
        """First call: the errors of one micro-batch, without a graph."""
        if self._weights is not None:
            raise RuntimeError("observe after loss: make a new Accumulation for the next large batch")
        self._observed.append(self._loss.recipe.agreed_points(prediction, target, mask, measure))

    def loss(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Tensor:
        """Second call, in the same order: Σ w l over this micro-batch of all processes, w normalised over all."""
        if self._weights is None:
            self._weights = self._weigh()
        if not self._weights:
            raise RuntimeError("more losses than observed micro-batches")
        recipe = self._loss.recipe
        weights, points = self._weights.pop(0), recipe.agreed_points(prediction, target, mask, measure)
        if weights.shape != points.errors.shape:
            raise ValueError(
                f"micro-batches must come in the order in which they were observed: expected errors of shape "
                f"{tuple(weights.shape)} (group, point), got {tuple(points.errors.shape)}"
            )
        local = (weights * points.errors).sum(dtype=torch.float64)
        return globally(local, sharding_of(recipe.over, process_group(recipe.group))).to(weights.dtype)

    @torch.no_grad()
    def _weigh(self) -> list[Tensor]:
        if not self._observed:
            raise RuntimeError("observe every micro-batch before the first loss")
        errors = [points.errors for points in self._observed]
        measures = [torch.ones_like(p.errors) if p.measure is None else p.measure for p in self._observed]
        axis = _axis(self._loss.recipe.over)
        measure = None if all(p.measure is None for p in self._observed) else torch.cat(measures, axis)
        weights = self._loss.weigh(Points(torch.cat(errors, axis), measure))
        return list(weights.split([part.shape[axis] for part in errors], axis))


def _axis(over: Over) -> int:
    """Along which axis of (group, point) micro-batches follow on one another: samples are groups of their own."""
    return 0 if over == "sample" else 1


class LaggedAccumulation:
    """One call per micro-batch, with the temperature of the step before.

    `loss` gives Σ exp(β l − c) l with β and c fixed by what came before; its gradients accumulate in `.grad`.
    `finish` divides them by Z = Σ exp(β l − c) over all micro-batches: they are then exactly those of the large
    batch at the temperature 1/β. A budget is followed with a delay of one step. Over several processes c and Z are
    common to all; what `loss` returns is this process's part.

    Args:
        loss: over everything, with a fixed temperature or a budget, without guards.

    Example:
        >>> model, loss = nn.Linear(1, 1), ImbalanceAwareLoss()
        >>> parts = [(torch.randn(8, 1), torch.randn(8, 1)) for _ in range(4)]
        >>> lagged = LaggedAccumulation(loss)
        >>> for x, y in parts:
        ...     lagged.loss(model(x), y).backward()
        >>> value = lagged.finish(model.parameters())
    """

    def __init__(self, loss: ImbalanceAwareLoss) -> None:
        recipe = loss.recipe
        rule = recipe.weighing.rule
        if recipe.over != "all" or not recipe.weighing.plain or not isinstance(rule, Budget | Fixed):
            raise ValueError(
                "LaggedAccumulation takes a loss over 'all', with a fixed temperature or a budget, and no guards; "
                "use Accumulation otherwise"
            )
        if isinstance(rule, Fixed) and not 0 < rule.temperature < math.inf:
            raise ValueError(f"LaggedAccumulation needs a temperature in (0, inf), got {rule.temperature}")
        self._loss, self._rule = loss, rule
        self._beta = math.nan
        self._shift = math.nan
        self._parts: list[Sums] = []
        self._device = torch.device("cpu")

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Σ exp(β l − c) l over this micro-batch; call backward on it."""
        errors = self._loss.recipe.agreed_points(prediction, target).errors
        if not self._parts:
            self._start(errors.detach())
        self._parts.append(sums_of(errors.detach(), self._beta))
        weights = (self._beta * errors.detach() - self._shift).exp()
        return (weights * errors).sum(dtype=torch.float64).to(errors.dtype)

    def _start(self, errors: Tensor) -> None:
        if isinstance(self._rule, Fixed):
            self._beta = 1 / self._rule.temperature
        else:
            self._beta = math.exp(self._loss.log_inverse_temperature.item())
        self._device = errors.device
        if not 0 < self._beta < math.inf:  # nothing came before
            group = process_group(self._loss.recipe.group)
            weighed = self._loss.recipe.weighing.weigh(errors, sharding=sharding_of("all", group))
            self._beta = float(weighed.sharpness / weighed.population.scale)
        if self._beta == math.inf:
            raise ValueError(
                "LaggedAccumulation: the budget cannot be met in the first micro-batch, so there is no temperature to "
                "begin with: use larger micro-batches, a smaller budget, or Accumulation"
            )
        if self._beta == 0:  # all errors are equal: every temperature weighs them alike
            mean = float(errors.mean())
            self._beta = 1 / (4 * mean) if mean > 0 else 1.0
        first = self._over_all(sums_of(errors, self._beta))
        self._shift = first.top + math.log(first.zeroth)

    def _over_all(self, mine: Sums) -> Sums:
        """The sums of all processes."""
        group = process_group(self._loss.recipe.group)
        if group is None:
            return mine
        return Sums.merged([Sums.of_numbers(part) for part in gathered(mine.numbers(), group, self._device)])

    @torch.no_grad()
    def finish(self, parameters: Iterable[nn.Parameter]) -> float:
        """Put the accumulated gradients in scale; the value of the loss of the large batch.

        Raises:
            RuntimeError: before the first loss; or if the errors grew so much after the first micro-batch that the
                gradients have overflowed, on all processes.
        """
        if not self._parts:
            raise RuntimeError("finish before the first loss")
        sums = self._over_all(Sums.merged(self._parts))
        self._parts = []
        if not sums.top - self._shift <= LARGEST_GROWTH:
            raise RuntimeError(
                "the errors have grown so much since the first micro-batch that the lagged weights overflow: drop "
                "these gradients, and use Accumulation for this batch"
            )
        group = process_group(self._loss.recipe.group)
        world = 1 if group is None else distributed.get_world_size(group)  # the gradients are means over processes
        scale = world * math.exp(self._shift - sums.top) / sums.zeroth
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        beta = self._beta
        if isinstance(self._rule, Budget):
            near = Tilting()
            near.add(sums, beta)
            divergence, slope = self._rule.spread(beta, near)
            if divergence > 0 and slope > 0:
                beta *= newton_step(divergence, slope, self._rule.budget)
        self._loss.advance(math.log(beta))
        return sums.first / sums.zeroth / self._beta


def sums_of(errors: Tensor, beta: float) -> Sums:
    """The sums of a fused pass, by the formula."""
    z = beta * errors.double().reshape(-1)
    top = float(z.amax())
    e, span = (z - top).exp(), top or 1.0
    v = 2 * z / span - 1
    polynomials = torch.stack((torch.ones_like(v), v, 2 * v * v - 1))
    moments = Moments(span, (polynomials @ e).cpu().numpy(), (polynomials @ e.square()).cpu().numpy())
    return Sums.of_moments(len(z), top, float(z.sum()), moments)
