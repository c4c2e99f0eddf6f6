"""Majda-McLaughlin-Tabak: dispersive waves that focus into rare, extreme crests."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import State
from squall.systems.base import Generator, check_count, normal
from squall.systems.spectral import Modes, SpectralSystem


@final
@dataclass(frozen=True, kw_only=True)
class MajdaMcLaughlinTabak(SpectralSystem):
    r"""The Majda-McLaughlin-Tabak equation, a model of wave turbulence, here without forcing:

    $$i\,\psi_t = |\partial_x|^{\alpha} \psi + \lambda\,|\psi|^2 \psi - i\,\delta\,(|k| - k_*)_+^2\,\psi,$$

    with $|\partial_x|^\alpha$ the factor $|k|^\alpha$ in Fourier space, and δ the damping of wave numbers above $k_*$,
    half of the highest that the nonlinear term keeps. The state has two channels, the real and the imaginary part.

    Without damping the mass $\int |\psi|^2 dx$ and the energy
    $H = \int \big||\partial_x|^{\alpha/2} \psi\big|^2 + \tfrac\lambda2 |\psi|^4 dx$ are conserved; with it the mass is
    dissipated.

    What one sees: a sea of random waves. With λ < 0 a wave group that is high enough focuses into a crest several times
    as high, sheds its short waves to the damping, and is gone. A few crests carry most of the change.

    Args:
        alpha: The exponent α > 0 of the dispersion; 1/2 is that of deep water.
        lam: The strength λ of the nonlinearity; negative is focusing.
        damping: The strength δ ≥ 0.
        amplitude: The root mean square of |ψ| in the first states.
        points: The number of grid points.
        width: The circumference of the ring.
        dt: The time between two states.
        substeps: The number of steps of the scheme that cover one dt.

    Raises:
        ValueError: If a parameter is not finite or out of its range.

    Reference:
        Majda, McLaughlin and Tabak, J. Nonlinear Sci. 7 (1997) 9; Cousins and Sapsis, Physica D 280 (2014) 48.

    Examples:
        >>> import torch
        >>> system = MajdaMcLaughlinTabak()
        >>> u = system.simulate(system.initial_states(4, torch.Generator().manual_seed(0)), steps=5)
        >>> u.shape, bool((system.mass(u).diff(dim=1) < 1e-9).all())
        (torch.Size([4, 6, 2, 256]), True)
    """

    name: ClassVar[str] = "majda-mclaughlin-tabak"
    equation: ClassVar[str] = "i ψ_t = |∂/∂x|^α ψ + λ |ψ|² ψ − i δ (|k| − k*)₊² ψ"
    dissipated: ClassVar[tuple[str, ...]] = ("mass",)
    positive: ClassVar[Mapping[str, str]] = {"alpha": ""}
    not_negative: ClassVar[Mapping[str, str]] = {"damping": ""}
    fields: ClassVar[tuple[str, ...]] = ("real", "imaginary")
    kept: ClassVar[float] = 1 / 2

    alpha: float = 0.5
    lam: float = -4.0
    damping: float = 0.1
    amplitude: float = 0.4
    points: int = 256
    width: float = 2 * np.pi
    dt: float = 0.05
    substeps: int = 10

    @cached_property
    def wave_numbers(self) -> tuple[np.ndarray, ...]:
        return (2 * np.pi * self.points / self.width * np.fft.fftfreq(self.points),)

    def linear(self) -> np.ndarray:
        k = np.abs(self.wave_numbers[0])
        start = self.kept / 2 * np.pi * self.points / self.width
        return -1j * k**self.alpha - self.damping * np.maximum(k - start, 0) ** 2

    def nonlinear(self, modes: Modes) -> Modes:
        psi = torch.fft.ifft(self.resolved * modes)
        return -1j * self.lam * self.resolved * torch.fft.fft(psi.abs().square() * psi)

    def to_modes(self, u: State) -> Modes:
        return torch.fft.fft(torch.complex(u[:, 0], u[:, 1]))

    def to_state(self, modes: Modes) -> State:
        return torch.view_as_real(torch.fft.ifft(modes)).movedim(-1, 1)

    def mass(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        r"""The mass $\int |\psi|^2 dx$ of states (..., 2, points), as (..., 1)."""
        return self.integral(u.square().sum(-2, keepdim=True))

    def energy(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        r"""The energy $H$ of states (..., 2, points), as (..., 1)."""
        modes = torch.fft.fft(torch.complex(u[..., 0, :], u[..., 1, :]), norm="ortho")
        k = torch.from_numpy(np.abs(self.wave_numbers[0]) ** self.alpha).to(u)
        density = k * modes.abs().square() + self.lam / 2 * u.square().sum(-2).square()
        return self.integral(density.unsqueeze(-2))

    def initial_states(self, n: int, generator: Generator) -> State:
        r"""Random waves with the spectrum $e^{-(k/4)^2}$, normal and of root mean square `amplitude` in the mean.

        Args:
            n: The number of states, at least 1.
            generator: A `torch.Generator` or a `numpy.random.RandomState`.
        """
        check_count(n)
        k = np.abs(np.fft.fftfreq(self.points, 1 / self.points))
        size = torch.from_numpy(np.exp(-((k / 4) ** 2) / 2))
        size = self.amplitude * size / size.square().sum().sqrt() * self.points / 2**0.5
        draws = torch.stack([normal(generator, 2, self.points) for _ in range(n)])
        return self.to_state(size * torch.complex(draws[:, 0], draws[:, 1]))
