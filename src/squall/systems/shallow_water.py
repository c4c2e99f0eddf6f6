"""Shallow water on a rotating sphere: a jet that breaks into storms, and vortices that meet."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from squall._process.harmonics import import_harmonics
from squall._types import State, Trajectories
from squall.systems.base import Generator, check_count, uniform

RADIUS, ROTATION, GRAVITY = 6.37122e6, 7.292e-5, 9.80616
"""Of the Earth: m, 1/s, m/s², the values of Williamson et al. (1992)."""

STABLE = 0.72
"""Third-order Adams-Bashforth is stable for waves of frequency ω with ω·step below this number."""

WIND = 100.0
"""The strongest wind (m/s) that the check of the step allows for."""

Winds = Float[Tensor, "*batch 2 latitude longitude"]
OnSphere = Float[Tensor, "*batch 3 latitude longitude"]
PerSphere = Float[Tensor, "*batch"]


@final
@dataclass(frozen=True, kw_only=True)
class ShallowWater:
    r"""The rotating shallow-water equations on the Earth, solved by torch-harmonics' spectral `ShallowWaterSolver`:

    $$\zeta_t = -\nabla\cdot\big((\zeta + f)\,v\big),\qquad
      \delta_t = k\cdot\nabla\times\big((\zeta + f)\,v\big) - \nabla^2\big(g h + |v|^2/2\big),\qquad
      h_t = -\nabla\cdot(h\,v).$$

    A state has the fields height h (m), vorticity ζ (1/s) and divergence δ (1/s) of the wind v (m/s), on Gaussian
    latitudes from the north and equally spaced longitudes; f = 2Ω sin(latitude). Triangular truncation at a third of
    the longitudes keeps products free of aliasing. The solver steps by third-order Adams-Bashforth, restarted by an
    Euler step at every dt, and damps the smallest scales (eighth-order hyperdiffusion, two hours at the truncation).

    Mass is conserved to rounding. Energy and potential enstrophy change by the damping and by the step.

    What one sees: from `jet`, calm for two to four days, then a row of vortices and filaments along 45° N. From
    `vortices`, storms from the first hour, which drift, merge and shed waves.

    Args:
        latitudes: number of latitudes, at least 8.
        longitudes: number of longitudes, at least 16.
        dt: seconds between two states of a trajectory, a multiple of `step`.
        step: seconds of one step of the solver.
        depth: mean height, m.
        start: the initial states, `jet` (Galewsky et al. 2004, with random bumps) or `vortices`.

    Raises:
        ValueError: for a size that is too small, a dt that is no multiple of the step, or a step that is unstable.

    Reference:
        J. Galewsky, R. K. Scott, L. M. Polvani, Tellus A 56 (2004) 429; D. L. Williamson et al., J. Comput. Phys. 102
        (1992) 211; solver: B. Bonev et al., torch-harmonics, https://arxiv.org/abs/2306.03838.
    """

    name: ClassVar[str] = "shallow-water"
    equation: ClassVar[str] = "ζ_t = −∇·((ζ+f)v), δ_t = k·∇×((ζ+f)v) − ∇²(gh + |v|²/2), h_t = −∇·(hv)"
    fields: ClassVar[tuple[str, ...]] = ("height", "vorticity", "divergence")
    units: ClassVar[tuple[str, ...]] = ("m", "s-1", "s-1")
    conserved: ClassVar[tuple[str, ...]] = ("mass",)

    latitudes: int = 64
    longitudes: int = 128
    dt: float = 21600.0
    step: float = 150.0
    depth: float = 10_000.0
    start: Literal["jet", "vortices"] = "jet"

    def __post_init__(self) -> None:
        if self.latitudes < 8 or self.longitudes < 16:
            raise ValueError(f"the grid is {self.latitudes} × {self.longitudes}; it needs at least 8 × 16 points")
        if not (math.isfinite(self.depth) and self.depth > 0):
            raise ValueError(f"depth is {self.depth}; it is the mean height in metres and must be positive")
        if self.start not in ("jet", "vortices"):
            raise ValueError(f"start is {self.start!r}; the initial states are 'jet' and 'vortices'")
        if not (0 < self.step <= self.dt < math.inf) or abs(self.dt / self.step - round(self.dt / self.step)) > 1e-9:
            raise ValueError(f"dt is {self.dt} s and step is {self.step} s; dt must be a multiple of the step")
        fastest = math.sqrt(GRAVITY * self.depth) + WIND
        longest = STABLE * RADIUS / fastest / math.sqrt(self.truncation * (self.truncation + 1))
        if self.step > longest:
            raise ValueError(
                f"step is {self.step} s; waves on {self.latitudes} × {self.longitudes} points need at most "
                f"{longest:.0f} s. Set a shorter step, which divides dt"
            )

    @property
    def truncation(self) -> int:
        """The largest total wavenumber, such that products of two fields are exact."""
        return min((self.longitudes - 1) // 3, (2 * self.latitudes - 1) // 3)

    @cached_property
    def _solver(self) -> Any:
        solver = import_harmonics().examples.ShallowWaterSolver(
            self.latitudes,
            self.longitudes,
            self.step,
            lmax=self.truncation + 1,
            mmax=self.truncation + 1,
            grid="legendre-gauss",
            radius=RADIUS,
            omega=ROTATION,
            gravity=GRAVITY,
            havg=self.depth,
        )
        return solver.double()

    @property
    def latitude(self) -> Float[Tensor, " latitude"]:
        """Degrees, from the north."""
        return self._solver.lats.flatten().rad2deg()

    @property
    def longitude(self) -> Float[Tensor, " longitude"]:
        """Degrees east, from 0."""
        return self._solver.lons.flatten().rad2deg()

    @property
    def areas(self) -> Float[Tensor, "latitude longitude"]:
        """Areas of the cells on the unit sphere; they sum to 4π."""
        return (self._solver.quad_weights * 2 * math.pi / self.longitudes).expand(self.latitudes, self.longitudes)

    def winds(self, u: OnSphere) -> Winds:
        """The winds to the east and to the north, m/s."""
        with torch.no_grad():
            return self._solver.getuv(self._solver.grid2spec(u[..., 1:, :, :].double()))

    def mass(self, u: OnSphere) -> PerSphere:
        """The mean height, m."""
        return self._mean(u[..., 0, :, :].double())

    def energy(self, u: OnSphere) -> PerSphere:
        r"""The mean energy above the state of rest, $\overline{h|v|^2 + g(h - H)^2}/2$ with H the depth, m³/s²."""
        height = u[..., 0, :, :].double()
        speed = self.winds(u).square().sum(-3)
        return self._mean(height * speed + GRAVITY * (height - self.depth) ** 2) / 2

    def potential_enstrophy(self, u: OnSphere) -> PerSphere:
        r"""The mean potential enstrophy $\overline{(\zeta + f)^2 / 2h}$, 1/(m s²)."""
        u = u.double()
        return self._mean((u[..., 1, :, :] + self._solver.coriolis) ** 2 / u[..., 0, :, :]) / 2

    def balanced(self, vorticity: Float[Tensor, "latitude longitude"]) -> Float[Tensor, "3 latitude longitude"]:
        """A state without divergence whose height balances the wind of a vorticity (1/s), with mean `depth`."""
        solver = self._solver
        spectrum = solver.grid2spec(torch.stack((vorticity, torch.zeros_like(vorticity))).double())
        spectrum[0, 0, 0] = 0  # the vorticity of a wind has no mean
        wind = solver.getuv(spectrum)
        absolute = solver.spec2grid(spectrum[0]) + solver.coriolis
        kinetic = solver.grid2spec(wind.square().sum(0) / 2)
        potential = solver.invlap * solver.vrtdivspec(wind * absolute)[0] - kinetic
        potential[0, 0] = math.sqrt(4 * math.pi) * GRAVITY * self.depth
        return solver.spec2grid(torch.cat((potential[None] / GRAVITY, spectrum)))

    def jet(self) -> Float[Tensor, "3 latitude longitude"]:
        """The zonal jet of Galewsky et al. at 45° N, 80 m/s, in balance and unstable."""
        latitude = self._solver.lats.flatten()
        south, north = math.pi / 7, math.pi / 2 - math.pi / 7
        inside = (latitude > south) & (latitude < north)
        product = torch.where(inside, (latitude - south) * (latitude - north), -1.0)
        wind = torch.where(inside, 80 * torch.exp(1 / product + 4 / (north - south) ** 2), 0.0)
        wind = wind[:, None].expand(self.latitudes, self.longitudes)
        spectrum = self._solver.vrtdivspec(torch.stack((wind, torch.zeros_like(wind))))
        return self.balanced(self._solver.spec2grid(spectrum[0]))

    def initial_states(self, n: int, generator: Generator) -> State:
        """Random first states (n, 3, latitude, longitude), float64.

        `jet`: the jet, with three bumps of the height of −120 to 120 m (Galewsky's has 120) at random longitudes and
        latitudes of 30° to 60° N. `vortices`: sixteen Gaussian vortices of 0.4 to 1.2·10⁻⁴ s⁻¹ and radius 500 to
        1000 km, anywhere within 70° of the equator, three in four cyclonic, in balance.

        Args:
            n: how many, at least 1.
            generator: where the random numbers come from.
        """
        check_count(n)
        if self.start == "jet":
            jet = self.jet()
            return torch.stack([self._bumped(jet, generator, 120.0) for _ in range(n)])
        return torch.stack([self.balanced(self._vortices(generator)) for _ in range(n)])

    def perturbed(self, initial: State, generator: Generator, height: float = 1.0) -> State:
        """Twins: the states with three random bumps of the height, each of at most `height` metres."""
        return torch.stack([self._bumped(state, generator, height) for state in initial])

    def _bumped(
        self, state: Float[Tensor, "3 latitude longitude"], generator: Generator, height: float
    ) -> Float[Tensor, "3 latitude longitude"]:
        latitude = self._solver.lats.reshape(-1, 1)
        bumps = torch.zeros(self.latitudes, self.longitudes, dtype=torch.float64)
        for _ in range(3):
            amplitude = uniform(generator, -height, height, 1)
            east, north = uniform(generator, 0, 2 * math.pi, 1), uniform(generator, math.pi / 6, math.pi / 3, 1)
            away = (self._solver.lons.reshape(1, -1) - east + math.pi) % (2 * math.pi) - math.pi
            bumps += amplitude * latitude.cos() * torch.exp(-((3 * away) ** 2) - (15 * (latitude - north)) ** 2)
        spectrum = self._solver.grid2spec(bumps)
        spectrum[0, 0] = 0
        return torch.cat((state[:1] + self._solver.spec2grid(spectrum), state[1:]))

    def _vortices(self, generator: Generator) -> Float[Tensor, "latitude longitude"]:
        latitude, longitude = self._solver.lats.reshape(-1, 1), self._solver.lons.reshape(1, -1)
        vorticity = torch.zeros(self.latitudes, self.longitudes, dtype=torch.float64)
        limit = math.sin(math.radians(70))
        for _ in range(16):
            north, east = uniform(generator, -limit, limit, 1).asin(), uniform(generator, 0, 2 * math.pi, 1)
            strength, radius = uniform(generator, 4e-5, 1.2e-4, 1), uniform(generator, 5e5, 1e6, 1)
            sense = torch.where(uniform(generator, 0, 1, 1) < 0.75, 1.0, -1.0) * north.sign()
            cosine = latitude.sin() * north.sin() + latitude.cos() * north.cos() * (longitude - east).cos()
            distance = RADIUS * cosine.clamp(-1, 1).acos()
            vorticity += sense * strength * torch.exp(-((distance / radius) ** 2))
        return vorticity

    def simulate(
        self,
        initial: Float[Tensor, "batch 3 latitude longitude"],
        steps: int = 40,
        progress: Callable[[int], object] | None = None,
    ) -> Trajectories:
        """Solve for one trajectory after the other; each is the same whichever others are computed with it.

        Args:
            initial: first states (batch, 3, latitude, longitude), finite.
            steps: number of steps of `dt`, at least 1.
            progress: called with the number of finished steps, of all trajectories together.

        Returns:
            the trajectories (batch, steps + 1, 3, latitude, longitude), float64.

        Raises:
            ValueError: for another shape, numbers that are not finite, or a trajectory that became NaN or infinite.
        """
        expected = (3, self.latitudes, self.longitudes)
        if initial.ndim != 4 or tuple(initial.shape[1:]) != expected or not initial.isfinite().all():
            raise ValueError(f"initial has shape {tuple(initial.shape)}; expected finite numbers (batch, *{expected})")
        if steps < 1:
            raise ValueError(f"steps is {steps}; a simulation takes at least 1 step")
        done, trajectories = 0, torch.empty(len(initial), steps + 1, *expected, dtype=torch.float64)
        scale = torch.tensor([GRAVITY, 1, 1], dtype=torch.float64).reshape(3, 1, 1)  # the solver has g h for h
        with torch.no_grad():
            for trajectory, first in zip(trajectories, initial.double(), strict=True):
                spectrum = self._solver.grid2spec(first * scale)
                trajectory[0] = first
                for i in range(1, steps + 1):
                    spectrum = self._solver.timestep(spectrum, round(self.dt / self.step))
                    trajectory[i] = self._solver.spec2grid(spectrum) / scale
                    done += 1
                    if progress is not None:
                        progress(done)
                if not trajectory[-1].isfinite().all():
                    raise ValueError(f"the simulation became NaN or infinite with a step of {self.step} s; shorten it")
        return trajectories

    def parameters(self) -> dict[str, int | float | str]:
        """All parameters by name, so that a file can carry them."""
        return asdict(self)

    def _mean(self, field: Float[Tensor, "*batch latitude longitude"]) -> PerSphere:
        return (field * self.areas).sum((-2, -1)) / (4 * math.pi)
