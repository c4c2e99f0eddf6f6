"""What a model sees besides the present state: the states before it, and conditions that are known in advance."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from squall import integrators
from squall._types import Rate, State, Trajectories
from squall.integrators import IntegratorLike

Window = Float[Tensor, "batch history channel *space"]
"""The last states, oldest first."""

PastStates = Float[Tensor, "batch _past channel *space"]

Conditions = Float[Tensor, "batch _time condition *space"]
"""Conditions at the times of the steps; one time where they do not change."""

Held = Float[Tensor, "batch condition *space"]
"""Conditions at one time."""

Joined = Float[Tensor, "batch _channels *space"]

Mask = Bool[Tensor, "channel *space"]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a model: x = [u_{t−K+1}, …, u_t, conditions at t], (batch, K·channel + C, *space).

    Args:
        history: K, the number of states, oldest first.
        conditions: names, in the order of their channels.

    Raises:
        ValueError: if `history` is smaller than 1.
    """

    history: int = 1
    conditions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history is {self.history}, but must be at least 1: the present state counts")


@runtime_checkable
class HasConditions(Protocol):
    """A source of data, as far as its conditions are concerned."""

    @property
    def space(self) -> tuple[int, ...]: ...

    def condition(
        self, name: str, trajectories: Int[Tensor, " batch"], starts: Int[Tensor, " batch"], length: int
    ) -> Float[Tensor, "_batch _time part *_space"]: ...


def read_conditions(
    source: HasConditions,
    names: Sequence[str],
    trajectories: Int[Tensor, " batch"],
    starts: Int[Tensor, " batch"],
    length: int,
) -> Conditions | None:
    """Conditions of a batch of windows as one tensor; `None` without names.

    Args:
        source: a `squall.data.Source`.
        names: of the conditions, in the order of the channels.
        trajectories: number of the trajectory, (batch,).
        starts: time index of the first state, (batch,).
        length: states in a window.

    Returns:
        (batch, length, C, *space), scalars broadcast over space; one time where none of them changes in time.

    Raises:
        squall.data.DataError: where the source has no condition of a name.
    """
    if not names:
        return None
    values = [source.condition(name, trajectories, starts, length) for name in names]
    times = max(value.shape[1] for value in values)
    return torch.cat([value.expand(len(trajectories), times, -1, *source.space) for value in values], dim=2)


def join(window: Window, conditions: Held | None) -> Joined:
    """x of a model from the last states (batch, K, channel, *space) and the conditions at the last of them.

    Example:
        >>> join(torch.zeros(5, 2, 3, 8), torch.zeros(5, 1, 8)).shape
        torch.Size([5, 7, 8])
    """
    states = window.flatten(1, 2)
    return states if conditions is None else torch.cat((states, conditions), 1)


def rate_of(model: Rate, past: PastStates, conditions: Held | None) -> Rate:
    """The model as a map of the present state alone; states before it and conditions are held."""
    if past.shape[1] == 0 and conditions is None:
        return model
    return partial(_joined_rate, model, past.flatten(1, 2), conditions)


def _joined_rate(model: Rate, past: Joined, conditions: Held | None, u: State) -> State:
    return model(torch.cat((past, u) if conditions is None else (past, u, conditions), 1))


def advance(
    model: Rate,
    integrator: IntegratorLike,
    window: Window,
    conditions: Held | None,
    dt: float,
    mask: Mask | None = None,
) -> State:
    """The state after a window (batch, K, channel, *space); masked points keep their value.

    Args:
        model: from x to the rate at the last state (with `next_state`, to the next state).
        integrator: makes the step; its stages change the last state only.
        window: the last K states, oldest first.
        conditions: at the time of the last of them, (batch, C, *space); they are held over the step.
        dt: step size, in the unit of time of the rate.
        mask: False where a point is held.
    """
    u = window.select(1, -1)  # an index would be three operations of an exported program
    following = integrator(rate_of(model, window.narrow(1, 0, window.shape[1] - 1), conditions), u, dt)
    return following if mask is None else torch.where(mask, following, u)


def rollout(
    model: Rate,
    integrator: IntegratorLike,
    window: Window,
    conditions: Conditions | None,
    dt: float,
    steps: int,
    mask: Mask | None = None,
) -> Trajectories:
    """`squall.rollout` of a model that sees K states and conditions.

    Args:
        model, integrator, dt, mask: as `advance` takes them.
        window: the states to start from, (batch, K, channel, *space), oldest first.
        conditions: (batch, steps or 1, C, *space), at the time of the last state of the window and on.
        steps: how many steps.

    Returns:
        (batch, steps + 1, channel, *space), the last state of the window first.

    Raises:
        ValueError: if `steps` is negative, or the conditions end before the rollout.

    Example:
        >>> mean = lambda x: x.mean(1, keepdim=True)  # of both states
        >>> window = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
        >>> rollout(mean, integrators.next_state, window, None, dt=1.0, steps=3).flatten()
        tensor([1.0000, 0.5000, 0.7500, 0.6250])
    """
    history, u = window.shape[1], window[:, -1]
    if history == 1 and conditions is None and mask is None:
        return integrators.rollout(integrator, model, u, dt, steps)
    if steps < 0:
        raise ValueError(f"rollout: steps is {steps}, but must be at least 0")
    times = 1 if conditions is None else conditions.shape[1]
    if times != 1 and times < steps:
        raise ValueError(
            f"rollout: the conditions are given for {times} steps, but {steps} are asked for: give one for every step, "
            "or roll out fewer steps"
        )
    states = [*window.unbind(1)]
    for n in range(steps):
        held = None if conditions is None else conditions[:, n if times > 1 else 0]
        last = torch.stack(states[-history:], 1) if history > 1 else states[-1].unsqueeze(1)
        states.append(advance(model, integrator, last, held, dt, mask))
    return torch.stack(states[history - 1 :], 1)
