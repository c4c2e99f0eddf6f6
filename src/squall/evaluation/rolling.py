"""Models over the truth, a piece at a time: rollouts, mean rates of every step, growth factors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import Rate, State, Trajectories
from squall.data import Source, Transitions
from squall.data.source import Numbers
from squall.evaluation.growth import DENSE_LIMIT, growth_factor, growth_factors
from squall.evaluation.pieces import without_history
from squall.evaluation.tallies import RolloutTally
from squall.integrators import Array, Implicit, IntegratorLike, increment
from squall.models.inputs import Conditions, Held, Inputs, Window, read_conditions, rollout
from squall.models.placement import like_model
from squall.models.stacked import Stacked

CHUNK_NUMBERS = 2**24
"""Numbers of the truth in memory at a time: 128 MB in float64."""

BATCH_NUMBERS = 2**18
"""Numbers passed to a model at a time; bounds memory, as hidden layers are hundreds of times larger."""

SAMPLED = 2**22
"""Numbers of the truth from which thresholds are estimated: the top 0.5 % of them are 20 000."""

OfOne = Float[Tensor, "1 *shape"]


@dataclass(frozen=True, eq=False)
class Task:
    """What is rolled out: from the first states of every trajectory to its end.

    Args:
        source: trajectories, with the history that the model sees.
        integrator: makes the steps.
        inputs: history and conditions of the model.
    """

    source: Source
    integrator: IntegratorLike
    inputs: Inputs

    @cached_property
    def truth(self) -> Source:
        """The states from lead time 0 on."""
        return without_history(self.source, self.inputs.history)

    @property
    def steps(self) -> int:
        return self.truth.steps

    @property
    def dt(self) -> float:
        return self.source.dt

    @property
    def memoryless(self) -> bool:
        """Whether a model sees the present state alone."""
        return self.inputs == Inputs()

    @property
    def plain(self) -> bool:
        """Whether models can be rolled out as one: without memory, masked points and implicit steps."""
        return self.memoryless and self.source.mask is None and not isinstance(self.integrator, Implicit)

    def conditions(
        self, rows: Sequence[int] | Numbers, starts: Sequence[int] | Numbers | None = None
    ) -> Conditions | None:
        """Conditions of some trajectories at every step, or at one step of each."""
        trajectories = torch.as_tensor(rows)
        history = self.inputs.history
        begin = torch.full_like(trajectories, history - 1) if starts is None else torch.as_tensor(starts) + history - 1
        length = self.steps if starts is None else 1
        return read_conditions(self.source, self.inputs.conditions, trajectories, begin, length)


class Alone:
    """One model under the interface of a stack.

    Args:
        model: the model.
        like: the stack that it is a member of, for device and precision.
    """

    device = None

    def __init__(self, model: Rate, like: Stacked | None = None) -> None:
        self.skeleton, self.like = model, like

    def __len__(self) -> int:
        return 1

    def increment(self, integrator: IntegratorLike, u: State, dt: float) -> OfOne:
        return increment(integrator, self.skeleton, self.place(u), dt)[None]

    def place(self, u: Array) -> Array:
        return like_model(self.skeleton, u) if self.like is None else u.to(self.like.device, self.like.dtype)


Models = Stacked | Alone


def chunks(source: Source, models: Models | None = None) -> Iterator[tuple[list[int], Trajectories]]:
    """The trajectories, as many at a time as memory allows, in float64; for a stack where it computes."""
    members, device = (1, None) if models is None else (len(models), models.device)
    size = (source.steps + 1) * source.channels * math.prod(source.space)
    count = max(1, CHUNK_NUMBERS // (size * members))
    for start in range(0, source.trajectories, count):
        indices = list(range(start, min(start + count, source.trajectories)))
        yield indices, source.read(indices).to(device, torch.float64)


def _batches(states: Float[Tensor, "batch *shape"], models: Models) -> Sequence[Float[Tensor, "_batch *shape"]]:
    """The states, as many at a time as fit the memory of the hidden layers."""
    return states.split(max(1, BATCH_NUMBERS // (states[0].numel() * len(models))))


def _split_alike(
    conditions: Float[Tensor, "batch *shape"] | None, batches: Sequence[Float[Tensor, "_batch *_shape"]]
) -> Sequence[Float[Tensor, "_part *shape"] | None]:
    """The conditions of every batch; `None` for each without any."""
    return [None] * len(batches) if conditions is None else conditions.split(len(batches[0]))


def roll_out(models: Models, task: Task, tallies: Sequence[RolloutTally]) -> None:
    """Roll every trajectory out, for each member into its tally."""
    history = task.inputs.history
    for indices, states in chunks(task.source, models):
        batches = _batches(states[:, :history], models)
        pairs = zip(batches, _split_alike(task.conditions(indices), batches), strict=True)
        predictions = torch.cat([_rollouts(models, task, *pair) for pair in pairs], 1)
        truth = states[:, history - 1 :]
        for tally, prediction in zip(tallies, predictions, strict=True):
            tally.add(indices, truth, prediction.to(truth))


def _rollouts(models: Models, task: Task, window: Window, conditions: Conditions | None) -> Array:
    if isinstance(models, Stacked):
        return models.rollout(task.integrator, window[:, 0], task.dt, task.steps)
    placed, mask = models.place, task.source.mask
    window, conditions = placed(window), None if conditions is None else placed(conditions)
    mask = None if mask is None else mask.to(window.device)
    return rollout(models.skeleton, task.integrator, window, conditions, task.dt, task.steps, mask)[None]


def mean_rates(
    models: Models, task: Task, indices: Sequence[int], states: Trajectories
) -> Iterator[Float[Tensor, "batch step channel *space"]]:
    """The mean rate over every step of the truth, as every member has it.

    Args:
        models: the members.
        task: what is rolled out.
        indices: of the trajectories.
        states: of these, with the history.
    """
    history = task.inputs.history
    truth = states[:, history - 1 :]
    if task.memoryless:
        u = truth[:, :-1]
        pieces = _batches(u.flatten(0, 1), models)
        rates = torch.cat([models.increment(task.integrator, piece, task.dt) for piece in pieces], 1)
        return (rate.to(truth).reshape(u.shape) for rate in rates)
    assert isinstance(models, Alone)
    windows = states.unfold(1, history, 1)[:, :-1].movedim(-1, 2).flatten(0, 1)
    conditions = task.conditions(indices)
    if conditions is not None:
        conditions = conditions.expand(-1, task.steps, *conditions.shape[2:]).flatten(0, 1)
    batches = _batches(windows, models)
    pairs = zip(batches, _split_alike(conditions, batches), strict=True)
    rates = torch.cat([increment(task.integrator, *_rate_at(models, *pair), task.dt) for pair in pairs])
    return iter([rates.to(truth).reshape(truth[:, :-1].shape)])


def _rate_at(models: Alone, window: Window, held: Held | None) -> tuple[Rate, State]:
    """The model as a map of the present state, the rest held, and that state; one rest serves any number of states."""
    window, others = models.place(window), []
    past = window[:, :-1].flatten(1, 2)
    if held is not None:
        others = [models.place(held)]

    def rate(u: State) -> State:
        return models.skeleton(torch.cat([x.expand(len(u), *x.shape[1:]) for x in (past, u, *others)], 1))

    return rate, window[:, -1]


def growth(models: Models, task: Task, states: int) -> list[dict[str, float | None]]:
    """Median and largest growth factor of every member."""
    source, history = task.source, task.inputs.history
    transitions = Transitions(source, history=history)
    if source.channels * math.prod(source.space) > DENSE_LIMIT:
        states = states // 10
    chosen = transitions.evenly(states)
    mask = source.mask

    def sea_only(rate: Rate, u: State, dt: float, /) -> State:  # a held point neither grows nor makes others grow
        following = task.integrator(rate, u, dt)
        return following if mask is None else following * mask.to(u)

    integrator = task.integrator if mask is None else sea_only
    if isinstance(models, Stacked):
        u, _ = transitions.fetch(chosen)
        factors = growth_factors(integrator, models, u, source.dt)
    elif task.memoryless:
        u, _ = transitions.fetch(chosen)
        factors = growth_factor(integrator, models.skeleton, models.place(u), source.dt)[None]
    else:
        windows = transitions.windows(chosen)[:, :history]
        conditions = task.conditions(*transitions.locate(chosen))
        helds = [None] * len(windows) if conditions is None else conditions.split(1)
        rates = (
            _rate_at(models, window, None if held is None else held[:, 0])
            for window, held in zip(windows.split(1), helds, strict=True)
        )
        factors = torch.cat([growth_factor(integrator, rate, u, source.dt) for rate, u in rates])[None]
    numbers: list[dict[str, Any]] = [{"median": row.nanmedian().item(), "max": row.max().item()} for row in factors]
    return [{name: x if math.isfinite(x) else None for name, x in pair.items()} for pair in numbers]


def sample(source: Source) -> tuple[State, State]:
    """States and |du/dt| of transitions spread evenly over the source, as many as `SAMPLED` allows."""
    stride = math.ceil(source.trajectories * source.steps * source.channels * math.prod(source.space) / SAMPLED)
    states, speeds = [], []
    for indices, truth in chunks(source):
        offset = -indices[0] * source.steps % stride
        states.append(truth[:, :-1].flatten(0, 1)[offset::stride])
        speeds.append((truth.diff(dim=1).flatten(0, 1) / source.dt)[offset::stride].abs())
    return torch.cat(states), torch.cat(speeds)
