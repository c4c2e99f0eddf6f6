"""What all systems have in common: an energy, an operator that turns its gradient into a rate, and an exact scheme."""

import abc
import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from numpy.random import RandomState
from torch import Tensor

from squall._types import State, Trajectories
from squall.grid import Field, Grid, integral
from squall.systems import implicit

Generator = torch.Generator | RandomState
"""Where random numbers come from; NumPy's legacy `RandomState` is there to repeat the draws of the reference."""

Stencil = tuple[float, float, float]
"""The weights of the point to the left, the point itself and the point to the right."""


@dataclass(frozen=True, kw_only=True)
class System(abc.ABC):
    r"""A field u on a ring that follows $u_t = G\, \nabla H(u)$.

    $H$ is the energy and $\nabla H$ its variational derivative,
    $(\nabla H)_m = \frac{1}{dx} \partial H/\partial u_m$: the sum in H carries a factor dx, which the gradient does
    not. $G$ is a difference operator: antisymmetric where the energy is conserved, negative semidefinite where it is
    dissipated. In both cases $\sum G v = 0$, so the mass is conserved.

    In time, the discrete variational derivative method takes the place of $\nabla H$ by $\bar\nabla H(u, v)$ between a
    state u and the next one v, made such that

    $$\sum_m \bar\nabla H(u, v)_m\, (v - u)_m\, dx = H(v) - H(u), \qquad v - u = dt\, G\, \bar\nabla H(u, v),$$

    so that what the equation conserves or dissipates, the computed states conserve or dissipate exactly, whatever
    dt is. The scheme is implicit and accurate to second order in dt and dx.

    All quantities are dimensionless. The functions of a state u act on the last axis; u may have any leading shape, any
    floating precision and any device, and they are differentiable.

    Args:
        points: The number of grid points, at least 5.
        width: The circumference of the ring, positive.
        dt: The size of a time step, positive.

    Reference:
        T. Matsubara, A. Ishikawa, T. Yaguchi, Deep Energy-Based Modeling of Discrete-Time Physics, NeurIPS 2020,
        https://arxiv.org/abs/1905.08604; D. Furihata, J. Comput. Phys. 156 (1999) 181.
    """

    name: ClassVar[str]
    """What files, configurations and the command line call the system."""
    equation: ClassVar[str]
    """The equation, to print."""
    conserved: ClassVar[tuple[str, ...]]
    """The quantities that stay constant along every trajectory."""
    dissipated: ClassVar[tuple[str, ...]]
    """The quantities that never grow along a trajectory."""
    paper_seed: ClassVar[int]
    """`initial_states(100, RandomState(paper_seed))` are those of the reference."""

    points: int = 50
    width: float = 1.0
    dt: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", operator.index(self.points))
        for field in dataclasses.fields(self):
            if field.name == "points":
                continue
            value = float(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}; every parameter must be finite.")
        if self.dt <= 0:
            raise ValueError(f"dt is {self.dt}; the time step must be positive.")
        _ = self.grid  # checks the points and the width

    @property
    def grid(self) -> Grid:
        """The grid that the states live on."""
        return Grid(self.points, self.width)

    @abc.abstractmethod
    def energy(self, u: Field) -> Float[Tensor, "*batch"]:
        """The energy H of each state."""

    @abc.abstractmethod
    def energy_gradient(self, u: Field) -> Field:
        r"""The variational derivative $\nabla H$: the derivative of H with respect to $u_m$, divided by dx."""

    @abc.abstractmethod
    def structure(self, v: Field) -> Field:
        r"""The operator G: $u_t = G\, \nabla H(u)$."""

    @abc.abstractmethod
    def discrete_gradient(self, u: Field, v: Field) -> Field:
        r"""The discrete variational derivative $\bar\nabla H(u, v)$; $\bar\nabla H(u, u) = \nabla H(u)$."""

    @abc.abstractmethod
    def initial_states(self, n: int, generator: Generator) -> State:
        """Random first states, as a tensor (n, 1, points) in float64 on the CPU."""

    @property
    @abc.abstractmethod
    def _structure_stencil(self) -> Stencil:
        """The weights of G."""

    @property
    @abc.abstractmethod
    def _stiffness(self) -> float:
        r"""The factor κ of the linear part of the gradient, $\kappa D_2 u$; the rest of it is pointwise."""

    @abc.abstractmethod
    def _pointwise_slope(self, u: Field, v: Field) -> Field:
        r"""The derivative with respect to v of the pointwise part of $\bar\nabla H(u, v)$."""

    def rate(self, u: Field) -> Field:
        r"""The rate of change $u_t = G\, \nabla H(u)$, discrete in space and continuous in time."""
        return self.structure(self.energy_gradient(u))

    def mass(self, u: Field) -> Float[Tensor, "*batch"]:
        r"""The mass $\sum_m u_m\, dx$ of each state."""
        return integral(u, self.grid.spacing)

    def simulate(
        self, initial: Shaped[Tensor, "..."], steps: int = 500, progress: Callable[[int], object] | None = None
    ) -> Trajectories:
        r"""Solves the implicit scheme for all trajectories at once.

        Each trajectory comes out the same, to the bit, whichever others are computed with it.

        Args:
            initial: The first states (batch, 1, points), finite, of any floating precision.
            steps: The number of steps of size `dt`, at least 1.
            progress: Called with the number of finished steps after each one.

        Returns:
            The trajectories (batch, steps + 1, 1, points) with the initial states first, in float64, on the device of
            `initial` (the computation itself runs on the CPU).

        Raises:
            TypeError: If `initial` is not a tensor of floating numbers.
            ValueError: If `initial` has another shape, or numbers that are not finite, or `steps` is less than 1.
            squall.systems.ConvergenceError: If a step has no solution that Newton's method finds.
        """
        self._check_initial(initial)
        if steps < 1:
            raise ValueError(f"steps is {steps}; a simulation takes at least 1 step.")
        with torch.no_grad():
            first = initial.detach().to("cpu", torch.float64)[:, 0, :]
            states = implicit.march(self._residual, self._jacobian, first, self.dt, steps, progress)
        return states[:, :, None, :].to(initial.device)

    def parameters(self) -> dict[str, int | float]:
        """All parameters by name, so that a file can carry them; `from_parameters` rebuilds the system."""
        return dataclasses.asdict(self)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> "System":
        """The system that has these parameters, each of which must be given.

        Raises:
            ValueError: If a parameter is unknown or missing.

        Examples:
            >>> from squall.systems import SYSTEMS, CahnHilliard
            >>> system = CahnHilliard(gamma=1e-3)
            >>> SYSTEMS[system.name].from_parameters(system.parameters()) == system
            True
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(parameters.keys() - known):
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"{cls.name} has no parameter {name}; it has {', '.join(sorted(known))}.{hint}")
        if missing := sorted(known - parameters.keys()):
            raise ValueError(f"parameters of {cls.name} lack {', '.join(missing)}; give all of them.")
        points = float(parameters["points"])  # files may store every number as a float
        if not points.is_integer():
            raise ValueError(f"points is {points}; it must be a whole number.")
        return cls(**{**parameters, "points": int(points)})

    def _residual(self, u: Field, v: Field) -> Field:
        return v - u - self.dt * self.structure(self.discrete_gradient(u, v))

    def _jacobian(self, u: Field, v: Field) -> Float[Tensor, "5 *batch points"]:
        """The derivative of the residual with respect to v: bands[s + 2] belongs to the point s to the right."""
        curvature = [self._stiffness / 2 * weight / self.grid.spacing**2 for weight in (1, -2, 1)]
        linear = [0.0, 0.0, 1.0, 0.0, 0.0]
        for j, outer in enumerate(self._structure_stencil):
            for k, inner in enumerate(curvature):
                linear[j + k] -= self.dt * outer * inner
        slope = self._pointwise_slope(u, v)
        bands = torch.stack([torch.full_like(slope, weight) for weight in linear])
        for j, outer in enumerate(self._structure_stencil, start=-1):
            bands[j + 2] -= self.dt * outer * slope.roll(-j, -1)
        return bands

    def _check_initial(self, initial: Shaped[Tensor, "..."]) -> None:
        if not isinstance(initial, Tensor) or not initial.is_floating_point():
            what = initial.dtype if isinstance(initial, Tensor) else type(initial).__name__
            raise TypeError(f"initial is {what}; give a torch.Tensor of floating numbers (batch, 1, {self.points}).")
        if initial.ndim != 3 or tuple(initial.shape[1:]) != (1, self.points) or len(initial) == 0:
            raise ValueError(
                f"initial has shape {tuple(initial.shape)}; it must be (batch, 1, {self.points}), at least one state "
                f"with one channel on this system's grid. Reshape it, or build the system with another points."
            )
        if not (finite := initial.isfinite()).all():
            which = int((~finite).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"initial has {int((~finite).sum())} numbers that are not finite, the first in state {which}; "
                "a simulation starts from finite states."
            )


def check_count(n: int) -> None:
    """Refuses to draw fewer than one state."""
    if n < 1:
        raise ValueError(f"n is {n}; the number of initial states must be at least 1.")


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Float[Tensor, "..."]:
    """Independent numbers uniform in [low, high), float64 on the CPU."""
    if isinstance(generator, RandomState):
        unit = torch.from_numpy(generator.random_sample(shape))
    elif isinstance(generator, torch.Generator):
        unit = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    else:
        raise TypeError(
            f"generator is a {type(generator).__name__}; give a torch.Generator or a numpy.random.RandomState."
        )
    return low + (high - low) * unit


def integer(generator: Generator, high: int) -> int:
    """One whole number uniform in 0, ..., high − 1."""
    if isinstance(generator, RandomState):
        return int(generator.randint(0, high))
    return int(torch.randint(high, (), generator=generator, device=generator.device))
