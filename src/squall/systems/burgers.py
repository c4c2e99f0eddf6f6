"""Burgers: waves steepen into shocks, which merge."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from squall._types import State
from squall.systems.base import Generator
from squall.systems.spectral import SpectralSystem


@final
@dataclass(frozen=True, kw_only=True)
class Burgers(SpectralSystem):
    r"""The viscous Burgers equation, the simplest shocks:

    $$u_t = -u\,u_x + \nu\,u_{xx}, \qquad H(u) = \tfrac12 \int u^2\,dx.$$

    The mass is conserved, the energy dissipated. A shock of height Δu is 4ν/Δu wide; the grid must resolve it.

    What one sees: smooth waves lean over and become shocks within 1/max|u_x|. Where two shocks meet, they become one.
    Almost all of the change is at the shocks.

    Args:
        nu: The viscosity ν > 0.
        waves: The first states have wave numbers 1 to this one.
        points: The number of grid points.
        width: The circumference of the ring.
        dt: The time between two states.
        substeps: The number of steps of the scheme that cover one dt.

    Raises:
        ValueError: If a parameter is not finite or out of its range.

    Examples:
        >>> import torch
        >>> system = Burgers()
        >>> u = system.simulate(system.initial_states(4, torch.Generator().manual_seed(0)), steps=20)
        >>> u.shape, bool((system.energy(u).diff(dim=1) < 0).all())
        (torch.Size([4, 21, 1, 128]), True)
    """

    name: ClassVar[str] = "burgers"
    equation: ClassVar[str] = "u_t = −u u_x + ν u_xx"
    conserved: ClassVar[tuple[str, ...]] = ("mass",)
    dissipated: ClassVar[tuple[str, ...]] = ("energy",)
    positive: ClassVar[Mapping[str, str]] = {"nu": ", or shocks have no width"}

    nu: float = 5e-3
    waves: int = 4
    points: int = 128
    dt: float = 1e-2
    substeps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.waves < self.points / 3:
            raise ValueError(f"waves is {self.waves}; it must be from 1 to a third of the points, {self.points}.")

    def linear(self) -> np.ndarray:
        (k,) = self.wave_numbers
        return -self.nu * k**2

    def initial_states(self, n: int, generator: Generator) -> State:
        """Random waves of mean 0 and root mean square 1, as `smooth_states` draws them.

        Args:
            n: The number of states, at least 1.
            generator: A `torch.Generator` or a `numpy.random.RandomState`.
        """
        return self.smooth_states(n, generator, self.waves)
