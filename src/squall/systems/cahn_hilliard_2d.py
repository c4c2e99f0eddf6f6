"""Cahn-Hilliard in two dimensions: a mixture separates into a labyrinth that coarsens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import State
from squall.systems.base import GROWS, Generator, check_count, uniform
from squall.systems.spectral import Modes, SpectralSystem


@final
@dataclass(frozen=True, kw_only=True)
class CahnHilliard2D(SpectralSystem):
    r"""The Cahn-Hilliard equation on a torus:

    $$u_t = \Delta\left(-a u + b u^3 - \gamma \Delta u\right), \qquad
      H(u) = \int -\tfrac a2 u^2 + \tfrac b4 u^4 + \tfrac\gamma2 |\nabla u|^2\,dx\,dy.$$

    The mass is conserved, the energy dissipated: by the equation, and by the scheme where its step is short enough.

    What one sees: noise that is smoothed, then a labyrinth of two phases of width π√(2γ/a), which coarsens: necks pinch
    off, droplets shrink and vanish in a burst. With `mean` away from 0, droplets in a sea.

    Args:
        a: The strength of the separation.
        b: The strength of the saturation.
        gamma: The strength γ > 0 of the surface energy; boundaries are √(2γ/a) wide, and the grid must resolve them.
        mean: The mean of u in the first states.
        points: The number of grid points along each side.
        width: The length of each side.
        dt: The time between two states.
        substeps: The number of steps of the scheme that cover one dt.

    Raises:
        ValueError: If a parameter is not finite or out of its range.

    Examples:
        >>> import torch
        >>> system = CahnHilliard2D(points=32)
        >>> u = system.simulate(system.initial_states(2, torch.Generator().manual_seed(0)), steps=3)
        >>> u.shape, bool((system.energy(u).diff(dim=1) < 0).all())
        (torch.Size([2, 4, 1, 32, 32]), True)
    """

    name: ClassVar[str] = "cahn-hilliard-2d"
    equation: ClassVar[str] = "u_t = Δ (−a u + b u³ − γ Δu)"
    conserved: ClassVar[tuple[str, ...]] = ("mass",)
    dissipated: ClassVar[tuple[str, ...]] = ("energy",)
    positive: ClassVar[Mapping[str, str]] = {"gamma": GROWS}
    dimensions: ClassVar[int] = 2
    kept: ClassVar[float] = 1 / 2

    a: float = 1.0
    b: float = 1.0
    gamma: float = 1e-3
    mean: float = 0.0
    points: int = 64
    dt: float = 1e-3
    substeps: int = 10

    @property
    def _squared(self) -> np.ndarray:
        kx, ky = self.wave_numbers
        return kx**2 + ky**2

    def linear(self) -> np.ndarray:
        return self.a * self._squared - self.gamma * self._squared**2

    def nonlinear(self, modes: Modes) -> Modes:
        u = torch.fft.irfftn(self.resolved * modes, s=self.shape[1:], dim=self._axes)
        return -self.b * torch.from_numpy(self._squared) * self.resolved * torch.fft.rfftn(u**3, dim=self._axes)

    def energy(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        r"""The energy $H$ of states (..., 1, points, points), as (..., 1)."""
        slopes = sum(self.derivative(u, axis).square() for axis in self._axes)
        return self.integral(-self.a / 2 * u**2 + self.b / 4 * u**4 + self.gamma / 2 * slopes)

    def initial_states(self, n: int, generator: Generator) -> State:
        """Every point independent and uniform within 0.05 of `mean`.

        Args:
            n: The number of states, at least 1.
            generator: A `torch.Generator` or a `numpy.random.RandomState`.
        """
        check_count(n)
        return self.mean + uniform(generator, -0.05, 0.05, n, *self.shape)
