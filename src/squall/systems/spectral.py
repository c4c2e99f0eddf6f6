"""Systems that are solved in Fourier space: exponential time differencing of fourth order, shared by all of them."""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from squall._process.threads import threads
from squall._types import State, Trajectories
from squall.systems.base import Generator, System, check_count, normal
from squall.systems.implicit import ConvergenceError

Modes = Complex[Tensor, "batch *modes"]
"""Fourier coefficients of the states."""

CONTOUR = 32
"""Points of the circle on which the coefficients of ETDRK4 are averaged."""


class UnstableError(ConvergenceError):
    """A state became NaN or infinite; the residual is infinite."""

    def __init__(self, step: int, trajectory: int, dt: float, substeps: int) -> None:
        self.step, self.trajectory, self.residual = step, trajectory, math.inf
        RuntimeError.__init__(
            self,
            f"the state became NaN or infinite at step {step} in trajectory {trajectory}, with dt = {dt:g} and "
            f"substeps = {substeps}. Try ten times as many substeps, then initial states that are smoother or smaller",
        )


class ETDRK4:
    r"""One step of $\hat u_t = L \hat u + N(\hat u)$, with L diagonal: exact for L, of fourth order for N.

    The functions $(e^z - 1)/z$ and their kin are means over a circle around z = L h, which loses no digits where z is
    small.

    Args:
        linear: L, one number per mode; real or complex.
        h: the step.

    Reference:
        Cox and Matthews, J. Comput. Phys. 176 (2002) 430; Kassam and Trefethen, SIAM J. Sci. Comput. 26 (2005) 1214.

    Example:
        >>> step = ETDRK4(np.array([-1.0]), 0.1)  # u' = −u + u²: u = 1/(1 + c exp t)
        >>> u = torch.tensor([0.5])
        >>> for _ in range(10):
        ...     u = step(u, torch.square)
        >>> round(u.item(), 5), round(1 / (1 + np.e), 5)
        (0.26894, 0.26894)
    """

    def __init__(self, linear: np.ndarray, h: float) -> None:
        circle = np.exp(2j * np.pi * (np.arange(CONTOUR) + 0.5) / CONTOUR)
        z = (h * linear)[..., None] + circle
        e = np.exp(z)
        functions = (
            (np.exp(z / 2) - 1) / z,
            (-4 - z + e * (4 - 3 * z + z**2)) / z**3,
            (2 + z + e * (z - 2)) / z**3,
            (-4 - 3 * z - z**2 + e * (4 - z)) / z**3,
        )
        means = [h * f.mean(-1) for f in functions]
        coefficients = [np.exp(h * linear), np.exp(h * linear / 2), *means]
        if np.isrealobj(linear):
            coefficients = [x.real for x in coefficients]
        self.whole, self.half, self.q, self.f1, self.f2, self.f3 = map(torch.from_numpy, coefficients)

    def __call__(self, v: Tensor, nonlinear: Callable[[Tensor], Tensor]) -> Tensor:
        """The modes one step later."""
        n = nonlinear(v)
        a = self.half * v + self.q * n
        na = nonlinear(a)
        b = self.half * v + self.q * na
        nb = nonlinear(b)
        c = self.half * a + self.q * (2 * nb - n)
        return self.whole * v + self.f1 * n + 2 * self.f2 * (na + nb) + self.f3 * nonlinear(c)


@dataclass(frozen=True, kw_only=True)
class SpectralSystem(System):
    r"""A periodic system $u_t = L u + N(u)$ in Fourier modes $\hat u_k$, with L diagonal: one real field.

    Modes above a part of the highest wave number are set to zero in N, so that its products are free of aliasing: two
    thirds for products of two fields, half for products of three.

    Args:
        substeps: The number of steps of the scheme that cover one dt, at least 1.
    """

    scheme = "a pseudo-spectral method with exponential time differencing of fourth order (ETDRK4)"

    kept: ClassVar[float] = 2 / 3
    """The part of the highest wave number up to which N keeps modes."""

    substeps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.substeps < 1:
            raise ValueError(f"substeps is {self.substeps}; it must be at least 1.")

    @abc.abstractmethod
    def linear(self) -> np.ndarray:
        """L, one number per mode."""

    def nonlinear(self, modes: Modes) -> Modes:
        """N, free of aliasing: the advection −u u_x = −(u²/2)_x on one axis, where a system has no other."""
        u = torch.fft.irfft(self.resolved * modes, n=self.points)
        return self._half_slope * torch.fft.rfft(u.square())

    @cached_property
    def wave_numbers(self) -> tuple[np.ndarray, ...]:
        """k along every axis of the modes, broadcastable; the last axis has no negative ones, except for its end."""
        axes = [np.fft.fftfreq(self.points)] * (self.dimensions - 1) + [np.fft.rfftfreq(self.points)]
        return np.meshgrid(*(2 * np.pi * self.points / self.width * k for k in axes), indexing="ij", sparse=True)

    @cached_property
    def resolved(self) -> Float[Tensor, "*modes"]:
        """1 for the modes that N keeps, 0 for the others."""
        limit = self.kept * np.pi * self.points / self.width
        return torch.from_numpy(
            np.prod(np.broadcast_arrays(*[abs(k) < limit for k in self.wave_numbers]), axis=0) + 0.0
        )

    def to_modes(self, u: State) -> Modes:
        """Fourier coefficients of one real field."""
        return torch.fft.rfftn(u[:, 0], dim=self._axes)

    def to_state(self, modes: Modes) -> State:
        """The field of these coefficients."""
        return torch.fft.irfftn(modes, s=self.shape[1:], dim=self._axes)[:, None]

    @cached_property
    def _half_slope(self) -> Complex[Tensor, " modes"]:
        """The symbol of −∂/∂x / 2."""
        (k,) = self.wave_numbers
        return -0.5j * torch.from_numpy(k) * self.resolved

    def derivative(self, u: Float[Tensor, "*state"], axis: int = -1) -> Float[Tensor, "*state"]:
        """∂u/∂x along an axis of space, exact for what the grid resolves."""
        k = 2 * np.pi * self.points / self.width * torch.fft.rfftfreq(self.points, dtype=u.dtype, device=u.device)
        k[-1] = k[-1] if self.points % 2 else 0  # of the highest mode of an even grid only the cosine is known
        turned = u.transpose(axis, -1)
        return torch.fft.irfft(1j * k * torch.fft.rfft(turned), n=self.points).transpose(axis, -1)

    def mass(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        r"""The mass $\int u\,dx$ of states (..., channel, *space), one number per channel."""
        return self.integral(u)

    def energy(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*rest"]:
        r"""The energy $\frac12 \int u^2\,dx$ of states (..., channel, *space), one number per channel."""
        return self.integral(u.square() / 2)

    def smooth_states(self, n: int, generator: Generator, modes: int) -> State:
        r"""Random waves $\sum_{k=1}^{K} a_k \cos(2\pi k x/w) + b_k \sin(2\pi k x/w)$ of mean 0 and root mean square 1.

        a and b are normal before the sum is scaled."""
        check_count(n)
        x = 2 * np.pi / self.width * self.grid.coordinates() * torch.arange(1, modes + 1)[:, None]
        states = []
        for _ in range(n):
            a, b = normal(generator, 2, modes)
            u = a @ x.cos() + b @ x.sin()
            states.append(u / u.square().mean().sqrt())
        return torch.stack(states)[:, None]

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.dimensions, 0))

    def _march(self, first: State, steps: int, progress: Callable[[int], object] | None) -> Trajectories:
        with threads(1):  # transforms this short gain nothing by threads, and lose much where others compute
            return self._march_alone(first, steps, progress)

    def _march_alone(self, first: State, steps: int, progress: Callable[[int], object] | None) -> Trajectories:
        step, modes, states = ETDRK4(self.linear(), self.dt / self.substeps), self.to_modes(first), [first]
        for done in range(1, steps + 1):
            for _ in range(self.substeps):
                modes = step(modes, self.nonlinear)
            states.append(self.to_state(modes))
            finite = states[-1].flatten(1).isfinite().all(1)
            if not finite.all():
                which = int((~finite).nonzero()[0])
                raise UnstableError(done, which, self.dt, self.substeps)
            if progress:
                progress(done)
        return torch.stack(states, 1)
