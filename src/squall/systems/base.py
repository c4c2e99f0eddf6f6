"""What all systems have in common: parameters, random first states, and a simulation from them."""

import abc
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from numpy.random import RandomState
from torch import Tensor

from squall._process.messages import suggestion
from squall._types import PerState, State, Trajectories
from squall.grid import Grid

GROWS = ", or short waves grow without bound"
"""What happens without the sign that damps short waves."""

Generator = torch.Generator | RandomState
"""Where random numbers come from; NumPy's legacy `RandomState` is there to repeat the draws of the reference."""


@dataclass(frozen=True, kw_only=True)
class System(abc.ABC):
    """An equation with its parameters, on an equally spaced grid; all quantities are dimensionless.

    Args:
        points: The number of grid points along every axis of space, at least 5.
        width: The length of every axis, positive.
        dt: The time between two states, positive.
    """

    name: ClassVar[str]
    """The name of the system in files, configurations and on the command line."""
    equation: ClassVar[str]
    """The equation, to print."""
    scheme: ClassVar[str]
    """How it is solved, to print."""
    conserved: ClassVar[tuple[str, ...]] = ()
    """The quantities that stay constant along every trajectory, by the names of the methods that give them."""
    dissipated: ClassVar[tuple[str, ...]] = ()
    """The quantities that never increase along a trajectory."""
    fields: ClassVar[tuple[str, ...]] = ("u",)
    """The names of the channels."""
    dimensions: ClassVar[int] = 1
    """The number of axes of space."""
    boundary: ClassVar[str] = "periodic"
    """Of every axis: "periodic" or "open"."""
    positive: ClassVar[Mapping[str, str]] = {}
    """The parameters that must be positive besides the sizes, each with what happens otherwise, or ""."""
    not_negative: ClassVar[Mapping[str, str]] = {}
    """Those that may also be zero."""
    paper_seed: ClassVar[int] = 0
    """The seed of the usual data set: `initial_states(100, RandomState(paper_seed))`. For Cahn-Hilliard and
    Korteweg-de Vries they are those of the reference."""

    points: int = 50
    width: float = 1.0
    dt: float = 1e-4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = operator.index(value) if field.type is int else float(value)
            object.__setattr__(self, field.name, value)
            if not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}; every parameter must be finite.")
        if self.dt <= 0:
            raise ValueError(f"dt is {self.dt}; the time step must be positive.")
        for name, otherwise in self.positive.items():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive{otherwise}.")
        for name, otherwise in self.not_negative.items():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative{otherwise}.")
        _ = self.grid  # checks the points and the width

    @property
    def grid(self) -> Grid:
        """The grid along every axis of space."""
        return Grid(self.points, self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a state, (channel, *space)."""
        return (len(self.fields), *(self.points,) * self.dimensions)

    def integral(self, density: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        """Over all of space."""
        return density.flatten(-self.dimensions).sum(-1) * self.grid.spacing**self.dimensions

    @abc.abstractmethod
    def energy(self, u: Float[Tensor, "*shape"]) -> PerState:
        """The energy of each state."""

    @abc.abstractmethod
    def initial_states(self, n: int, generator: Generator) -> State:
        """Random first states, as a tensor (n, channel, *space) in float64 on the CPU."""

    @abc.abstractmethod
    def _march(self, first: State, steps: int, progress: Callable[[int], object] | None) -> Trajectories:
        """The trajectories from checked first states, in float64 on the CPU."""

    def simulate(
        self, initial: Shaped[Tensor, "..."], steps: int = 500, progress: Callable[[int], object] | None = None
    ) -> Trajectories:
        """The trajectories from given first states, all at once.

        Args:
            initial: The first states (batch, channel, *space), finite, of any floating precision.
            steps: The number of steps of size `dt`, at least 1.
            progress: Called with the number of finished steps after each one.

        Returns:
            The trajectories (batch, steps + 1, channel, *space) with the initial states first, in float64, on the
            device of `initial` (the computation itself runs on the CPU).

        Raises:
            TypeError: If `initial` is not a tensor of floating numbers.
            ValueError: If `initial` has another shape, or numbers that are not finite, or `steps` is less than 1.
            squall.systems.ConvergenceError: If a step has no solution, or becomes NaN or infinite.
        """
        self._check_initial(initial)
        if steps < 1:
            raise ValueError(f"steps is {steps}; a simulation takes at least 1 step.")
        with torch.no_grad():
            states = self._march(initial.detach().to("cpu", torch.float64), steps, progress)
        return states.to(initial.device)

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
            raise ValueError(f"{cls.name} has no parameter {name}: {suggestion(name, sorted(known))}.")
        if missing := sorted(known - parameters.keys()):
            raise ValueError(f"parameters of {cls.name} lack {', '.join(missing)}; give all of them.")
        values = dict(parameters)
        for field in dataclasses.fields(cls):
            if field.type is int:  # files may store every number as a float
                if not float(values[field.name]).is_integer():
                    raise ValueError(f"{field.name} is {values[field.name]}; it must be a whole number.")
                values[field.name] = int(values[field.name])
        return cls(**values)

    def _check_initial(self, initial: Shaped[Tensor, "..."]) -> None:
        shape = ", ".join(map(str, self.shape))
        if not isinstance(initial, Tensor) or not initial.is_floating_point():
            what = initial.dtype if isinstance(initial, Tensor) else type(initial).__name__
            raise TypeError(f"initial is {what}; give a torch.Tensor of floating numbers (batch, {shape}).")
        if tuple(initial.shape[1:]) != self.shape or len(initial) == 0:
            raise ValueError(
                f"initial has shape {tuple(initial.shape)}; it must be (batch, {shape}), at least one state on this "
                "system's grid. Reshape it, or build the system with another points."
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


def normal(generator: Generator, *shape: int) -> Float[Tensor, "..."]:
    """Independent normal numbers of mean 0 and variance 1, float64 on the CPU."""
    if isinstance(generator, RandomState):
        return torch.from_numpy(generator.standard_normal(shape))
    uniform(generator, 0, 1, 0)  # refuses what is no generator
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).cpu()
