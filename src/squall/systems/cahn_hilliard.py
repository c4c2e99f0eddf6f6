"""Cahn-Hilliard: a mixture of two phases separates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from squall._types import State, Trajectories
from squall.grid import Field, integral, laplacian, squared_slope
from squall.systems.base import GROWS, Generator, check_count, uniform
from squall.systems.energy import EnergySystem, Stencil

ESTABLISHED = 0.5
"""Fraction of the pure phase's |u| above which a point belongs to a phase."""
FAST = 0.05
"""Fraction of the spinodal rate, the pure phase's |u| times a²/(4γ), above which a point changes fast."""


@final
@dataclass(frozen=True, kw_only=True)
class CahnHilliard(EnergySystem):
    r"""The Cahn-Hilliard equation, the separation of a mixture into two phases:

    $$u_t = \partial_x^2 \left(-a u + b u^3 - \gamma u_{xx}\right),$$

    with energy and scheme (v the next state)

    $$H(u) = \sum_m dx \left[-\tfrac{a}{2} u^2 + \tfrac{b}{4} u^4 + \tfrac{\gamma}{2} S(u)\right], \qquad
      \frac{v - u}{dt} = D_2\!\left[-a\,\tfrac{u + v}{2} + b\,\tfrac{u^3 + u^2 v + u v^2 + v^3}{4}
      - \gamma D_2 \tfrac{u + v}{2}\right].$$

    u is the difference in concentration, ±√(a/b) in the pure phases. The mass is conserved and the energy never grows.

    With the defaults, the roughness of the initial noise decays in a few steps. Stripes of width π√(2γ/a) ≈ 0.1 then
    grow by a factor e in 4γ/a² = 20 steps (spinodal decomposition) and reach the pure phases after some 150 steps. Then
    they are almost stationary, with boundaries of width √(2γ/a) ≈ 0.03; occasionally a stripe collapses quickly.

    Args:
        a: The strength of the separation, dimensionless.
        b: The strength of the saturation, dimensionless.
        gamma: The strength of the surface energy, γ ≥ 0, dimensionless.
        points: The number of grid points M, at least 5. A boundary needs dx < √(2γ/a).
        width: The circumference of the ring, dimensionless.
        dt: The time step, dimensionless.

    Raises:
        ValueError: If a parameter is not finite, γ is negative, or dt, the width or the number of points is too small.

    Examples:
        >>> import torch
        >>> system = CahnHilliard()
        >>> initial = system.initial_states(4, torch.Generator().manual_seed(0))
        >>> u = system.simulate(initial, steps=20)
        >>> u.shape
        torch.Size([4, 21, 1, 50])
        >>> bool((system.energy(u).diff(dim=1) <= 0).all())
        True
    """

    name: ClassVar[str] = "cahn-hilliard"
    equation: ClassVar[str] = "u_t = ∂²/∂x² (−a u + b u³ − γ u_xx)"
    conserved: ClassVar[tuple[str, ...]] = ("mass",)
    dissipated: ClassVar[tuple[str, ...]] = ("energy",)
    not_negative: ClassVar[Mapping[str, str]] = {"gamma": GROWS}
    regime_names: ClassVar[tuple[str, ...]] = ("separation", "collision", "boundary", "body")
    paper_seed: ClassVar[int] = 0

    a: float = 1.0
    b: float = 1.0
    gamma: float = 5e-4

    def energy(self, u: Field) -> Float[Tensor, "*batch"]:
        r"""The energy $H = \sum_m dx [-\frac a2 u^2 + \frac b4 u^4 + \frac\gamma2 S(u)]$."""
        dx = self.grid.spacing
        density = -self.a / 2 * u**2 + self.b / 4 * u**4 + self.gamma / 2 * squared_slope(u, dx)
        return integral(density, dx)

    def energy_gradient(self, u: Field) -> Field:
        r"""The chemical potential $\nabla H = -a u + b u^3 - \gamma D_2 u$."""
        return -self.a * u + self.b * u**3 - self.gamma * laplacian(u, self.grid.spacing)

    def structure(self, v: Field) -> Field:
        r"""The operator $G = D_2$, negative semidefinite: the energy is dissipated."""
        return laplacian(v, self.grid.spacing)

    def discrete_gradient(self, u: Field, v: Field) -> Field:
        r"""$\bar\nabla H(u, v) = -a\frac{u+v}{2} + b\frac{u^3+u^2v+uv^2+v^3}{4} - \gamma D_2 \frac{u+v}{2}$."""
        mean = (u + v) / 2
        cubes = mean * (u * u + v * v) / 2
        return -self.a * mean + self.b * cubes - self.gamma * laplacian(mean, self.grid.spacing)

    def initial_states(self, n: int, generator: Generator) -> State:
        """An almost even mixture: every point independent and uniform in (−0.05, 0.05).

        Args:
            n: The number of states, at least 1.
            generator: A `torch.Generator`, or `numpy.random.RandomState(CahnHilliard.paper_seed)` for the states of the
                reference.

        Returns:
            The states (n, 1, points) in float64.
        """
        check_count(n)
        return (uniform(generator, 0, 1, n, 1, self.points) - 0.5) * 0.1

    @property
    def has_regimes(self) -> bool:
        """Whether there are phases to separate."""
        return min(self.a, self.b, self.gamma) > 0

    def regimes(self, u: Trajectories) -> Int64[Tensor, "batch steps channel points"]:
        r"""What happens at every point over every step of a trajectory, as an index into `regime_names`.

        With U = √(a/b) the pure phase and r = U a²/(4γ) the fastest spinodal decay:

        - separation: until a point has come to rest (|u_t| < r/20) within a boundary's width of a phase (|u| > U/2);
        - collision: it moves again (|u_t| ≥ r/20), because domains merge or vanish;
        - boundary: it rests between the phases, |u| ≤ U/2;
        - body: it rests inside one.

        Args:
            u: the truth, (batch, time, 1, points), from its beginning, in steps of dt.

        Returns:
            labels of the steps, (batch, time − 1, 1, points).

        Raises:
            ValueError: if a, b or γ is not positive, since the phases do not separate.
        """
        if not self.has_regimes:
            raise ValueError(f"a, b and gamma are {self.a}, {self.b}, {self.gamma}: phases need all of them positive")
        phase = (self.a / self.b) ** 0.5
        moves = (u.diff(dim=1) / self.dt).abs() >= FAST * phase * self.a**2 / (4 * self.gamma)
        size = u[:, :-1].abs() / phase
        reach = round(2 * (2 * self.gamma / self.a) ** 0.5 / self.grid.spacing)
        near = size > ESTABLISHED
        for shift in range(1, reach + 1):
            near = near | (size.roll(shift, -1) > ESTABLISHED) | (size.roll(-shift, -1) > ESTABLISHED)
        settled = (near & ~moves).cummax(dim=1).values
        resting = torch.where(size > ESTABLISHED, 3, 2)
        return torch.where(settled, torch.where(moves, 1, resting), 0)

    @property
    def _structure_stencil(self) -> Stencil:
        weight = 1 / self.grid.spacing**2
        return weight, -2 * weight, weight

    @property
    def _stiffness(self) -> float:
        return -self.gamma

    def _pointwise_slope(self, u: Field, v: Field) -> Field:
        return (self.b * (u * u + 2 * u * v + 3 * v * v) - 2 * self.a) / 4
