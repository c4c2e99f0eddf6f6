"""Kuramoto-Sivashinsky: a flame front in chaos that is alike everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from squall._types import State
from squall.systems.base import GROWS, Generator
from squall.systems.spectral import SpectralSystem


@final
@dataclass(frozen=True, kw_only=True)
class KuramotoSivashinsky(SpectralSystem):
    r"""The Kuramoto-Sivashinsky equation, spatio-temporal chaos:

    $$u_t = -u\,u_x - u_{xx} - \nu\,u_{xxxx}, \qquad H(u) = \tfrac12 \int u^2\,dx.$$

    The mass is conserved; the energy grows at long waves, is dissipated at short ones and stays bounded.

    What one sees: humps of wave length 2π√(2ν) that merge and split everywhere, all the time. The change is spread
    almost like Gaussian noise, so this is a control: a loss that helps on rare events must not hurt here.

    Args:
        nu: The strength ν > 0 of the fourth derivative.
        warm_up: The time from random waves to the first states, which brings them onto the attractor.
        points: The number of grid points.
        width: The circumference of the ring; below some 22 the motion is not chaotic.
        dt: The time between two states.
        substeps: The number of steps of the scheme that cover one dt.

    Raises:
        ValueError: If a parameter is not finite or out of its range.

    Examples:
        >>> import torch
        >>> system = KuramotoSivashinsky(warm_up=10.0)
        >>> u = system.simulate(system.initial_states(4, torch.Generator().manual_seed(0)), steps=20)
        >>> u.shape, bool(system.mass(u).abs().max() < 1e-10)
        (torch.Size([4, 21, 1, 128]), True)
    """

    name: ClassVar[str] = "kuramoto-sivashinsky"
    equation: ClassVar[str] = "u_t = −u u_x − u_xx − ν u_xxxx"
    conserved: ClassVar[tuple[str, ...]] = ("mass",)
    positive: ClassVar[Mapping[str, str]] = {"nu": GROWS}
    not_negative: ClassVar[Mapping[str, str]] = {"warm_up": ""}

    nu: float = 1.0
    warm_up: float = 100.0
    points: int = 128
    width: float = 64.0
    dt: float = 0.5
    substeps: int = 4

    def linear(self) -> np.ndarray:
        (k,) = self.wave_numbers
        return k**2 - self.nu * k**4

    def initial_states(self, n: int, generator: Generator) -> State:
        """States of the attractor: random waves of wave numbers 1 to 8, simulated for the time `warm_up`.

        Args:
            n: The number of states, at least 1.
            generator: A `torch.Generator` or a `numpy.random.RandomState`.
        """
        waves = self.smooth_states(n, generator, 8)
        steps = round(self.warm_up / self.dt)
        return self._march(waves, steps, None)[:, -1] if steps else waves
