"""One-step integrators of du/dt = f(u), explicit and implicit, with a fixed step size, and rollouts of them.

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

dopri5 = RungeKutta(
    "dopri5",
    order=5,
    stages=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    weights=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The method of order 5 of Dormand and Prince (1980), without their control of the step size: dt stays what it is."""


class Implicit(Integrator):
    r"""A method whose increment depends on the next state: Φ = F(u, u + dt Φ).

    The equation is solved to a few roundings of u, every sample of the batch by itself; where it is not, as of a rate
    that is too stiff or not finite, the sample becomes NaN. Gradients are those of the solution, by the implicit
    function theorem; there is no second derivative. `squall.train` solves nothing while `unroll` is 1: it takes the
    next state of the data for u'.
    """

    @abc.abstractmethod
    def between(self, rate: Rate, u: Array, following: Array) -> Array:
        """F(u, u'), the mean rate over a step between two known states."""

    def increment(self, rate: Rate, u: Array, dt: float) -> Array:
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                f"{self.name} evaluates the model as often as the numbers need, which no program can: export a run "
                "with an explicit integrator"
            )
        with torch.no_grad():
            start = rate(u)
            size = (u.abs() / dt + start.abs()).flatten(1).amax(1)
            allowed = ROUNDINGS * torch.finfo(u.dtype).eps * size
            solution = _fixed_point(lambda k: self.between(rate, u, u + dt * k), start, allowed)
        if not torch.is_grad_enabled():
            return solution
        free = solution.requires_grad_()
        k = self.between(rate, u, u + dt * free)
        if not k.requires_grad:  # a rate that does not depend on the state
            return k

        def solve(gradient: Array | None) -> Array | None:
            """(1 − ∂F/∂Φ)⁻ᵀ g: the rest of the graph differentiates F with the solution held."""
            if gradient is None:
                return None
            if torch.is_grad_enabled():
                raise RuntimeError(f"{self.name}: an implicit step has no second derivative; differentiate it once")
            size = gradient.flatten(1).abs().amax(1)
            return _fixed_point(
                lambda w: gradient + torch.autograd.grad(k, free, w, retain_graph=True)[0],
                gradient,
                ROUNDINGS * torch.finfo(gradient.dtype).eps * size,
            )

        change = k - k.detach()  # 0 with the gradient of k, on which `solve` calls no hook
        change.register_hook(solve)
        return solution.detach() + change


ROUNDINGS = 32
"""Of the largest number of a state, that a solved step may be off: the rate of a stiff system has some of its own."""
MEMORY = 30
"""Earlier iterates that are combined. With 8, a linear rate of eigenvalues from 0 to −30/dt is not solved; with 30 it
takes 70 evaluations."""
MOST_ITERATIONS = 100
"""Learned rates of Cahn-Hilliard take 7 to 11 in float32, at the dt of the paper."""


def _fixed_point(
    function: Callable[[Array], Array], x: Float[Tensor, "batch *shape"], allowed: Float[Tensor, " batch"]
) -> Float[Tensor, "batch *shape"]:
    """x = function(x) by Anderson's method, NaN for samples that do not come within `allowed` of it.

    Reference:
        Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49, 2011 (type II).
    """
    shape, x = x.shape, x.flatten(1)
    found, met = torch.full_like(x, torch.nan), torch.zeros_like(allowed, dtype=torch.bool)
    steps, changes, before = [], [], None
    for _ in range(MOST_ITERATIONS):
        residual = function(x.reshape(shape)).flatten(1) - x
        now = ~met & (residual.abs().amax(1) <= allowed)
        found, met = torch.where(now.unsqueeze(1), x + residual, found), met | now
        if bool((met | ~residual.isfinite().all(1)).all()):
            break
        if before is not None:
            steps, changes = [*steps, x - before[0]][-MEMORY:], [*changes, residual - before[1]][-MEMORY:]
        before, x = (x, residual), x + residual
        if steps:
            change = torch.stack(changes, 2)
            x = x - ((torch.stack(steps, 2) + change) @ _least_squares(change, before[1])).squeeze(2)
    return found.reshape(shape)


def _least_squares(
    columns: Float[Tensor, "batch number some"], right: Float[Tensor, "batch number"]
) -> Float[Tensor, "batch some 1"]:
    """The combination of columns that comes closest to the right side; 0 for samples that are not finite.

    By normal equations of columns of length 1 in float64, with a ridge, as the last columns are nearly parallel.
    """
    dtype, columns, right = columns.dtype, columns.double(), right.double().unsqueeze(2)
    length = columns.norm(dim=1, keepdim=True)
    columns = columns / torch.where(length > 0, length, 1)
    gram = columns.mT @ columns
    fine = gram.isfinite().flatten(1).all(1) & right.isfinite().flatten(1).all(1)
    ridge = 1e-14 * gram.shape[1] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    gram = torch.where(fine.reshape(-1, 1, 1), gram, 0) + ridge
    weights = torch.linalg.solve(gram, torch.where(fine.reshape(-1, 1, 1), columns.mT @ right, 0))
    return (weights / torch.where(length > 0, length, 1).mT).to(dtype)


@final
@dataclass(frozen=True)
class _ImplicitMidpoint(Implicit):
    def between(self, rate: Rate, u: Array, following: Array) -> Array:
        return rate((u + following) / 2)


implicit_midpoint = _ImplicitMidpoint("implicit_midpoint", order=2)
"""The implicit midpoint rule, u' = u + dt f((u + u')/2): A-stable, and it keeps quadratic invariants."""


def rate_between(rate: Any) -> Callable[[Array, Array], Array]:
    """The mean rate between two states of a model that has an energy.

    Raises:
        TypeError: for any other rate.
    """
    if not hasattr(rate, "between"):
        raise TypeError(
            f"discrete_gradient needs a model of an energy: HNN, or a module with a method between(u, following) like "
            f"its own; {type(rate).__name__} has none. implicit_midpoint takes any rate"
        )
    return rate.between


@final
@dataclass(frozen=True)
class _DiscreteGradient(Implicit):
    def between(self, rate: Rate, u: Array, following: Array) -> Array:
        return rate_between(rate)(u, following)


discrete_gradient = _DiscreteGradient("discrete_gradient", order=2)
"""u' = u + dt G ∇̄H(u, u'), with a discrete gradient: (u' − u) · ∇̄H = H(u') − H(u). A learned energy is conserved, or
dissipated, whatever dt is (Matsubara, Ishikawa and Yaguchi, NeurIPS 2020: DGNet)."""


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
    {m.name: m for m in (euler, midpoint, rk4, dopri5, implicit_midpoint, discrete_gradient, next_state)}
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
