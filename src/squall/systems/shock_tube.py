"""Shock tubes by the exact solution of the Riemann problem, up to LeBlanc's pressure ratio of 10⁹ and beyond."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from squall._process.extras import explain_missing_extra
from squall._types import State, Trajectories
from squall.systems.base import Generator, System, check_count, uniform


class Gas(NamedTuple):
    """Density, velocity and pressure on one side."""

    density: float
    velocity: float
    pressure: float


@final
@dataclass(frozen=True, kw_only=True)
class ShockTube(System):
    r"""The Euler equations of an ideal gas, from two gases at rest that a membrane separates:

    $$\rho_t + (\rho v)_x = 0, \quad (\rho v)_t + (\rho v^2 + p)_x = 0, \quad E_t + ((E + p) v)_x = 0, \qquad
      E = \frac{p}{\Gamma - 1} + \frac{\rho v^2}{2}.$$

    The channels are ln ρ, v and ln p. The trajectories are the exact solution at the points, for any dt. Mass and
    energy are conserved until a wave reaches an end of the tube; there it leaves.

    What one sees: when the membrane bursts, a shock and, behind it, a contact run into the thin gas; a rarefaction runs
    back. With LeBlanc's ratios the thin gas gains six orders of magnitude in pressure at a single point per step.

    Args:
        adiabatic: The ratio Γ > 1 of the heat capacities.
        least: The decimal logarithm of the least pressure ratio drawn; LeBlanc's is 9.
        most: That of the largest.
        membrane: Where the membrane is, as a fraction of the width.
        points: The number of points, the middles of equal cells.
        width: The length of the tube.
        dt: The time between two states.

    Raises:
        ValueError: If a parameter is not finite or out of its range.

    Reference:
        E. F. Toro, Riemann Solvers and Numerical Methods for Fluid Dynamics, 2009, chapter 4; LeBlanc's tube as in
        Loubère and Shashkov, J. Comput. Phys. 209 (2005) 105.

    Examples:
        >>> import torch
        >>> system = ShockTube()
        >>> u = system.simulate(system.initial_states(4, torch.Generator().manual_seed(0)), steps=5)
        >>> u.shape
        torch.Size([4, 6, 3, 200])
    """

    name: ClassVar[str] = "shock-tube"
    equation: ClassVar[str] = "ρ_t + (ρv)_x = 0, (ρv)_t + (ρv² + p)_x = 0, E_t + ((E + p)v)_x = 0"
    scheme: ClassVar[str] = "the exact solution of the Riemann problem"
    fields: ClassVar[tuple[str, ...]] = ("log_density", "velocity", "log_pressure")
    boundary: ClassVar[str] = "open"

    adiabatic: float = 5 / 3
    least: float = 2.0
    most: float = 10.0
    membrane: float = 1 / 3
    points: int = 200
    width: float = 9.0
    dt: float = 0.06

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adiabatic <= 1:
            raise ValueError(f"adiabatic is {self.adiabatic}; the ratio of heat capacities must be above 1.")
        if not 0 < self.least <= self.most:
            raise ValueError(f"least is {self.least} and most is {self.most}; they must be positive and in this order.")
        if not 0 < self.membrane < 1:
            raise ValueError(f"membrane is {self.membrane}; it must be inside the tube, between 0 and 1.")

    def initial_states(self, n: int, generator: Generator) -> State:
        """A dense gas (ρ = 1, p = 1/15) on the left, a thin one (ρ = 10⁻³) on the right, both at rest.

        The pressure ratio has a logarithm uniform between `least` and `most`.

        Args:
            n: The number of states, at least 1.
            generator: A `torch.Generator` or a `numpy.random.RandomState`.
        """
        check_count(n)
        ratios = uniform(generator, self.least, self.most, n) * np.log(10)
        right = (torch.arange(self.points) + 0.5) / self.points > self.membrane
        pressure = np.log(1 / 15) - ratios[:, None] * right
        density = (np.log(1e-3) * right).expand_as(pressure)
        return torch.stack([density, torch.zeros_like(pressure), pressure], 1)

    def mass(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        r"""The mass $\int \rho\,dx$ of states (..., 3, points), as (..., 1)."""
        return self.integral(u[..., :1, :].exp())

    def energy(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        r"""The energy $\int E\,dx$ of states (..., 3, points), as (..., 1)."""
        density, velocity, pressure = u[..., :1, :].exp(), u[..., 1:2, :], u[..., 2:, :].exp()
        return self.integral(pressure / (self.adiabatic - 1) + density * velocity**2 / 2)

    def riemann(self, left: Gas, right: Gas) -> Callable[[np.ndarray], np.ndarray]:
        """The solution as a function of x/t: it gives (3, *) of density, velocity and pressure.

        Raises:
            ValueError: If the gases move apart so fast that they leave a vacuum.
        """
        return _Riemann(left, right, self.adiabatic).at

    def _march(self, first: State, steps: int, progress: Callable[[int], object] | None) -> Trajectories:
        x = (np.arange(self.points) + 0.5) * self.grid.spacing
        times = self.dt * np.arange(1, steps + 1)[:, None]
        trajectories = []
        for number, state in enumerate(first.numpy()):
            jumps = np.flatnonzero((np.diff(state) != 0).any(0))
            if len(jumps) > 1:
                raise ValueError(f"initial state {number} has {len(jumps)} jumps; two gases have one between them.")
            ends = [Gas(np.exp(rho), v, np.exp(p)) for rho, v, p in (state[:, 0], state[:, -1])]
            membrane = (jumps[0] + 1) * self.grid.spacing if len(jumps) else self.width / 2
            density, velocity, pressure = self.riemann(*ends)((x - membrane) / times)
            later = np.stack([np.log(density), velocity, np.log(pressure)], 1)
            trajectories.append(torch.from_numpy(np.concatenate([state[None], later])))
        if progress:
            progress(steps)
        return torch.stack(trajectories)


class _Riemann:
    """Toro's exact solution: two waves, each a shock or a rarefaction, and a contact between them."""

    def __init__(self, left: Gas, right: Gas, adiabatic: float) -> None:
        self.left, self.right, self.adiabatic = left, right, adiabatic
        with explain_missing_extra():
            from scipy.optimize import brentq  # slow to import, and most commands simulate nothing

        gap = right.velocity - left.velocity
        if 2 / (adiabatic - 1) * (self._sound(left) + self._sound(right)) <= gap:
            raise ValueError(f"the gases move apart by {gap:g}, which leaves a vacuum between them.")
        pressures = np.log([left.pressure, right.pressure])

        def excess(log_pressure: float) -> float:
            pressure = np.exp(log_pressure)
            return self._jump(left, pressure) + self._jump(right, pressure) + gap

        root: Any = brentq(excess, pressures.min() - 60, pressures.max() + 30, xtol=1e-15)
        self.pressure = float(np.exp(root))
        jumps = self._jump(right, self.pressure) - self._jump(left, self.pressure)
        self.velocity = (left.velocity + right.velocity + jumps) / 2

    def at(self, speed: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "3 *shape"]:
        """Density, velocity and pressure at x/t."""
        # The right wave is a left one in a mirror.
        mirror = Gas(self.right.density, -self.right.velocity, self.right.pressure)
        left = self._wave(self.left, self.velocity, speed)
        right = self._wave(mirror, -self.velocity, -speed) * np.array([1, -1, 1]).reshape(3, *[1] * speed.ndim)
        return np.where(speed < self.velocity, left, right)

    def _sound(self, gas: Gas) -> float:
        return np.sqrt(self.adiabatic * gas.pressure / gas.density)

    def _jump(self, gas: Gas, pressure: float) -> float:
        """The change in velocity over the wave from a gas to the pressure between the waves."""
        g, ratio = self.adiabatic, pressure / gas.pressure
        if ratio > 1:
            return (pressure - gas.pressure) * np.sqrt(2 / gas.density / ((g + 1) * pressure + (g - 1) * gas.pressure))
        return 2 * self._sound(gas) / (g - 1) * (ratio ** ((g - 1) / (2 * g)) - 1)

    def _wave(self, gas: Gas, velocity: float, speed: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "3 *shape"]:
        """The gas left of the contact, which moves with `velocity`."""
        g, ratio, sound = self.adiabatic, self.pressure / gas.pressure, self._sound(gas)
        outside = np.array(gas).reshape(3, *[1] * speed.ndim)
        if ratio > 1:
            front = gas.velocity - sound * np.sqrt((g + 1) / (2 * g) * ratio + (g - 1) / (2 * g))
            density = gas.density * ((g + 1) * ratio + g - 1) / ((g - 1) * ratio + g + 1)
            inside = np.array([density, velocity, self.pressure]).reshape(outside.shape)
            return np.where(speed < front, outside, inside)
        inside = np.array([gas.density * ratio ** (1 / g), velocity, self.pressure]).reshape(outside.shape)
        head, tail = gas.velocity - sound, velocity - sound * ratio ** ((g - 1) / (2 * g))
        reduced = (2 + (g - 1) * (gas.velocity - np.clip(speed, head, tail)) / sound) / (g + 1)
        fan = gas.density * reduced ** (2 / (g - 1)), np.clip(speed, head, tail) + sound * reduced
        fan = np.stack([*fan, gas.pressure * reduced ** (2 * g / (g - 1))])
        return np.where(speed < head, outside, np.where(speed > tail, inside, fan))
