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

from squall.losses.distributed import Sharding, globally, process_group
from squall.losses.errors import Over
from squall.losses.loss import ImbalanceAwareLoss
from squall.losses.program import solve
from squall.losses.rules import SHARPEST, Demand, Fixed, Relative, Schedule
from squall.losses.sketch import WINDOW, ErrorSketch
from squall.losses.weights import to_groups, weights_of

__all__ = ["Accumulation", "LaggedAccumulation"]

LARGEST_GROWTH = 80.0
"""Of β l after the first micro-batch: the exponential of more is no float32."""


class Accumulation:
    """Two calls per micro-batch: first all are observed, which fixes the weights, then all are differentiated.

    The losses of the second calls add up to the loss of the large batch, and so do their gradients.

    Args:
        loss: its settings are used, and its schedule moves on once.

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
        self._observed: list[tuple[Tensor, Tensor | None]] = []
        self._weights: list[Tensor] | None = None

    @torch.no_grad()
    def observe(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> None:
        """First call: the errors of one micro-batch, without a graph."""
        if self._weights is not None:
            raise RuntimeError("observe after loss: make a new Accumulation for the next large batch")
        self._observed.append(self._grouped(prediction, target, mask, measure))

    def _grouped(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Errors and measures (group, point)."""
        recipe = self._loss.recipe
        errors, total = recipe.checked_errors(prediction, target, mask, measure)
        return to_groups(errors, recipe.over), None if total is None else to_groups(total, recipe.over)

    def loss(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Tensor:
        """Second call, in the same order: Σ w l over this micro-batch of all processes, w normalised over all."""
        if self._weights is None:
            self._weights = self._weigh()
        if not self._weights:
            raise RuntimeError("more losses than observed micro-batches")
        weights, (errors, _) = self._weights.pop(0), self._grouped(prediction, target, mask, measure)
        if weights.shape != errors.shape:
            raise ValueError(
                f"micro-batches must come in the order in which they were observed: expected errors of shape "
                f"{tuple(weights.shape)} (group, point), got {tuple(errors.shape)}"
            )
        local = (weights * errors).sum(dtype=torch.float64)
        return globally(local, self._loss.recipe.sharding).to(weights.dtype)

    @torch.no_grad()
    def _weigh(self) -> list[Tensor]:
        if not self._observed:
            raise RuntimeError("observe every micro-batch before the first loss")
        loss, recipe = self._loss, self._loss.recipe
        errors = [part for part, _ in self._observed]
        axis = _axis(recipe.over)
        together, measure = torch.cat(errors, axis), None
        if any(part is not None for _, part in self._observed):
            measures = [torch.ones_like(e) if m is None else m for e, m in self._observed]
            measure = torch.cat(measures, axis)
        softness, sharding = recipe.weighing.softness(loss.step), recipe.sharding
        weights, account = weights_of(together, None, measure, measure, recipe.weighing, "sample", softness, sharding)
        object.__setattr__(loss, "_account", account)
        if loss.training:
            loss.advance(math.nan)
        self._observed = []
        return list(weights.split([part.shape[axis] for part in errors], axis))


def _axis(over: Over) -> int:
    """Along which axis of (group, point) micro-batches follow on one another: samples are groups of their own."""
    return 0 if over == "sample" else 1


class LaggedAccumulation:
    """One call per micro-batch, with the temperature of the step before.

    `loss` gives Σ exp(β (l − c)) l with β and c fixed by what came before; its gradients accumulate in `.grad`.
    `finish` divides them by Z = Σ exp(β (l − c)) over all micro-batches: they are then exactly those of the large
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
        weighing, rule = loss.recipe.weighing, loss.recipe.weighing.rule
        guarded = weighing.cap < math.inf or weighing.mean_share or weighing.trim or weighing.winsorize
        capped = not isinstance(rule, Schedule) and rule.demand().cap < math.inf
        if (
            loss.recipe.over != "all"
            or guarded
            or capped
            or weighing.differentiate
            or isinstance(rule, Schedule | Relative)
        ):
            raise ValueError(
                "LaggedAccumulation takes a loss over 'all', with a fixed temperature or a budget, and no guards; "
                "use Accumulation otherwise"
            )
        if isinstance(rule, Fixed) and not 0 < rule.temperature < math.inf:
            raise ValueError(f"LaggedAccumulation needs a temperature in (0, inf), got {rule.temperature}")
        loss.lagged = True
        self._loss, self._rule = loss, rule
        self._beta, self._reference = math.nan, 0.0
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._sketch: ErrorSketch | None = None

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Σ exp(β (l − c)) l over this micro-batch; call backward on it."""
        errors, _ = self._loss.recipe.checked_errors(prediction, target, None, None)
        held = errors.detach()
        if self._sketch is None:
            self._sketch = ErrorSketch()
            self._sketch.add(held)
            self._start(self._sketch)
        else:
            self._sketch.add(held)
        density = (self._beta * (held - self._reference)).exp()
        weighted = density * errors
        sums = torch.stack((density.sum(dtype=torch.float64), weighted.detach().sum(dtype=torch.float64)))
        self._sums = self._sums + sums.cpu()
        return weighted.sum(dtype=torch.float64).to(errors.dtype)

    def _start(self, sketch: ErrorSketch) -> None:
        """β from the step before, or from the first micro-batch; c, the largest error of the first micro-batches."""
        before = math.exp(self._loss.log_inverse_temperature.item())
        beta, self._reference = _solved(sketch, self._rule.demand(), self._loss.recipe.sharding)
        self._beta = before if 0 < before < math.inf and not isinstance(self._rule, Fixed) else beta
        if self._beta == math.inf:
            raise ValueError(
                "LaggedAccumulation: the budget cannot be met in the first micro-batch, so there is no temperature to "
                "begin with: use larger micro-batches, a smaller budget, or Accumulation"
            )

    @torch.no_grad()
    def finish(self, parameters: Iterable[nn.Parameter]) -> float:
        """Put the accumulated gradients in scale; the value of the loss of the large batch.

        Raises:
            RuntimeError: before the first loss; or if the errors grew so much after the first micro-batch that the
                gradients have overflowed, on all processes.
        """
        if self._sketch is None:
            raise RuntimeError("finish before the first loss")
        sharding = self._loss.recipe.sharding
        total, first = sharding.within(self._sums, "sum").tolist()
        beta, top = _solved(self._sketch, self._rule.demand(), sharding)
        self._sketch = None
        if not self._beta * (top - self._reference) <= LARGEST_GROWTH:
            raise RuntimeError(
                "the errors have grown so much since the first micro-batch that the lagged weights overflow: drop "
                "these gradients, and use Accumulation for this batch"
            )
        group = process_group(self._loss.recipe.group)
        world = 1 if group is None else distributed.get_world_size(group)  # the gradients are means over processes
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(world / total)
        self._loss.advance(math.log(beta) if 0 < beta < math.inf else math.nan)
        return first / total


def _solved(sketch: ErrorSketch, demand: Demand, sharding: Sharding) -> tuple[float, float]:
    """β for the sketches of all processes, and the largest error; what is 32 octaves below that counts as one bin."""
    arrays, reduce = sketch.arrays(), sharding.within
    keys = torch.from_numpy(arrays["keys"])
    ends = torch.tensor([keys[-1], arrays["largest"][0]] if len(keys) else [0.0, 0.0], dtype=torch.float64)
    last, top = reduce(ends, "max").tolist()
    places = (keys - (int(last) - WINDOW + 1)).clamp(min=0)
    bins = torch.zeros((2, 1, WINDOW), dtype=torch.float64)
    for row, name in zip(bins, ("mass", "total"), strict=True):
        row[0].scatter_add_(0, places, torch.from_numpy(arrays[name][0]))
    mass, total = reduce(bins, "sum")
    l = total / torch.where(mass > 0, mass, 1)
    b = float(solve(l, mass, demand, math.inf, True)[0])
    return (math.inf if b >= SHARPEST else b / (float(l.max()) or 1.0)), top
