"""Explicit one-step integrators of du/dt = f(u), with a fixed step size, and rollouts of them.

An integrator is called as `integrator(rate, u, dt)` and returns the next state. It takes any `rate`, a system's or a
model's, so that training and evaluation share one integrator by construction. Rates do not depend on time.
"""

import abc
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import Rate, State, Trajectories

IntegratorLike = Callable[[Rate, Tensor, float], Tensor]
"""Anything called as `integrator(rate, u, dt)` that returns the next state; an `Integrator` is one."""

Array = Float[Tensor, "*shape"]

Function = TypeVar("Function", bound=Callable[..., Any])


def accepts_step(function: Function) -> Function:
    """Let a function or class take its argument `integrator` by the old name `step` too, with a DeprecationWarning."""
    if isinstance(function, type):
        function.__init__ = accepts_step(function.__init__)
        return function  # pyright: ignore[reportReturnType]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "step" in kwargs:
            if "integrator" in kwargs:
                raise TypeError("integrator is given twice: drop `step`, its old name")
            warnings.warn("the argument `step` is now named `integrator`", DeprecationWarning, stacklevel=2)
            kwargs["integrator"] = kwargs.pop("step")
        return function(*args, **kwargs)

    return wrapper  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Integrator(abc.ABC):
    """A one-step method u' = u + dt Φ(u), given by its increment Φ, the mean rate over the step.

    Args:
        name: what a configuration calls it.
        order: p, where the error at a fixed time shrinks as dtᵖ; None where no rate is integrated.
    """

    name: str
    order: int | None

    @abc.abstractmethod
    def increment(self, rate: Rate, u: Array, dt: float) -> Array:
        """Φ(u) = (u' − u)/dt, computed without the subtraction where the method allows it."""

    def __call__(self, rate: Rate, u: Array, dt: float) -> Array:
        """The state a time dt after u."""
        return u + dt * self.increment(rate, u, dt)


@final
@dataclass(frozen=True)
class RungeKutta(Integrator):
    r"""An explicit Runge-Kutta method, by its Butcher tableau.

    .. math:: k_i = f(u + dt \sum_{j<i} a_{ij} k_j), \qquad Φ(u) = \sum_i b_i k_i

    Args:
        name: what a configuration calls it.
        order: its order of convergence p.
        stages: the rows a_i of the tableau from the second stage on (the first stage is f(u)).
        weights: b, one per stage; they sum to one.

    Example:
        >>> heun = RungeKutta("heun", order=2, stages=((1.0,),), weights=(0.5, 0.5))
        >>> heun(lambda u: -u, torch.ones(1), 0.1)
        tensor([0.9050])
    """

    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if [len(row) for row in self.stages] != list(range(1, len(self.weights))):
            raise ValueError(
                f"{self.name}: an explicit method with {len(self.weights)} weights needs rows of length "
                f"{list(range(1, len(self.weights)))} as stages, got {[len(row) for row in self.stages]}"
            )

    def increment(self, rate: Rate, u: Array, dt: float) -> Array:
        slopes = [rate(u)]
        for row in self.stages:
            slopes.append(rate(u + dt * _combine(row, slopes)))
        return _combine(self.weights, slopes)


def _combine(coefficients: tuple[float, ...], slopes: list[Array]) -> Array:
    """Σ c_i k_i; the term of a zero is left out, as 0·inf is not 0."""
    terms = [k if c == 1 else c * k for c, k in zip(coefficients, slopes, strict=True) if c != 0]
    return sum(terms[1:], start=terms[0])


euler = RungeKutta("euler", order=1, stages=(), weights=(1.0,))
"""Explicit Euler, u' = u + dt f(u)."""

midpoint = RungeKutta("midpoint", order=2, stages=((0.5,),), weights=(0.0, 1.0))
"""Explicit midpoint (RK2), u' = u + dt f(u + dt/2 f(u))."""

rk4 = RungeKutta("rk4", order=4, stages=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6))
"""The classical method of Runge and Kutta."""


@final
@dataclass(frozen=True)
class _NextState(Integrator):
    def increment(self, rate: Rate, u: Array, dt: float) -> Array:
        return (rate(u) - u) / dt

    def __call__(self, rate: Rate, u: Array, dt: float) -> Array:
        return rate(u)


next_state = _NextState("next_state", order=None)
"""The step of a model that maps a state to the next state: u' = model(u), whatever dt is."""

INTEGRATORS: Mapping[str, Integrator] = MappingProxyType(
    {method.name: method for method in (euler, midpoint, rk4, next_state)}
)
"""Every integrator by its name."""


@final
@dataclass(frozen=True)
class _Substeps(Integrator):
    integrator: IntegratorLike
    count: int

    def increment(self, rate: Rate, u: Array, dt: float) -> Array:
        small = dt / self.count
        total = increment(self.integrator, rate, u, small)
        for _ in range(self.count - 1):
            total = total + increment(self.integrator, rate, u + small * total, small)
        return total / self.count


@accepts_step
def substeps(integrator: IntegratorLike, count: int) -> Integrator:
    """The integrator that covers dt by `count` equal steps of another, of the same order.

    Args:
        integrator: of each of the steps.
        count: how many, at least 1.

    Raises:
        ValueError: if `count` is smaller than 1.

    Example:
        >>> substeps(euler, 2)(lambda u: -u, torch.ones(1), 0.2)
        tensor([0.8100])
    """
    if count < 1:
        raise ValueError(f"substeps: count is {count}, but must be at least 1")
    name = f"{count} × {getattr(integrator, 'name', 'step')}"
    return _Substeps(name, getattr(integrator, "order", None), integrator, count)


@accepts_step
def increment(integrator: IntegratorLike, rate: Rate, u: Array, dt: float) -> Array:
    """The mean rate over one step, Φ(u) = (u' − u)/dt.

    An `Integrator` computes it from the rates, and loses no digit in float32; of any other callable it is the
    difference quotient.

    Args:
        integrator: makes the step.
        rate: a map from a state to its rate (with `next_state`, to the next state).
        u: states, of any shape that `rate` takes.
        dt: step size, in the unit of time of `rate`.

    Example:
        >>> increment(euler, lambda u: -u, torch.ones(1), 0.1)
        tensor([-1.])
    """
    if isinstance(integrator, Integrator):
        return integrator.increment(rate, u, dt)
    return (integrator(rate, u, dt) - u) / dt


@accepts_step
def rollout(integrator: IntegratorLike, rate: Rate, u0: State, dt: float, steps: int) -> Trajectories:
    """The trajectory u⁰, u¹, … with uⁿ⁺¹ = integrator(rate, uⁿ, dt).

    It never stops early: infinity and NaN stay in the result, where they can be counted. Gradients flow through all
    steps unless the caller forbids it (`torch.no_grad`, which also halves the memory).

    Args:
        integrator: makes the step.
        rate: a map from a state to its rate (with `next_state`, to the next state).
        u0: initial states, (batch, channel, *space).
        dt: step size, in the unit of time of `rate`.
        steps: how many steps; 0 gives the initial states alone.

    Returns:
        states of shape (batch, steps + 1, channel, *space), the initial ones first.

    Raises:
        ValueError: if `steps` is negative.

    Example:
        >>> rollout(euler, lambda u: -u, torch.ones(1, 1, 1), 0.5, 3).flatten()
        tensor([1.0000, 0.5000, 0.2500, 0.1250])
    """
    if steps < 0:
        raise ValueError(f"rollout: steps is {steps}, but must be at least 0")
    if torch.is_grad_enabled():  # writing into one tensor would make the backward pass quadratic in `steps`
        states = [u0]
        for _ in range(steps):
            states.append(integrator(rate, states[-1], dt))
        return torch.stack(states, dim=1)
    trajectory = u0.new_empty((u0.shape[0], steps + 1, *u0.shape[1:]))
    trajectory[:, 0] = u = u0
    for n in range(steps):
        trajectory[:, n + 1] = u = integrator(rate, u, dt)
    return trajectory
