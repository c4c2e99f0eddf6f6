"""Korteweg-de Vries: solitons run, collide and pass through each other."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import State
from squall.grid import Field, central_difference, integral, laplacian, squared_slope
from squall.systems.base import Generator, check_count, integer, uniform
from squall.systems.energy import EnergySystem, Stencil


@final
@dataclass(frozen=True, kw_only=True)
class KortewegDeVries(EnergySystem):
    r"""The Korteweg-de Vries equation, long waves on shallow water:

    $$u_t = \partial_x \left(-\tfrac{\alpha}{2} u^2 + \beta u_{xx}\right),$$

    with energy and scheme (v the next state)

    $$H(u) = \sum_m dx \left[-\tfrac{\alpha}{6} u^3 - \tfrac{\beta}{2} S(u)\right], \qquad
      \frac{v - u}{dt} = D\!\left[-\tfrac{\alpha}{2}\,\tfrac{u^2 + uv + v^2}{3} + \beta D_2 \tfrac{u + v}{2}\right].$$

    u is the height of the water. Mass and energy are conserved.

    What one sees: two humps that run to the left (for β > 0), the higher the faster and the narrower; where one
    overtakes the other, both come out unchanged but shifted. On the 50 points of the paper a high soliton is only a
    few points wide: it runs slower than on a fine grid and sheds ripples.

    Args:
        alpha: The strength of the steepening, dimensionless.
        beta: The strength of the dispersion, dimensionless.
        points: The number of grid points M, at least 5.
        width: The circumference of the ring, dimensionless.
        dt: The time step, dimensionless.

    Raises:
        ValueError: If a parameter is not finite, or dt, the width or the number of points is too small.

    Examples:
        >>> import torch
        >>> system = KortewegDeVries()
        >>> initial = system.initial_states(4, torch.Generator().manual_seed(0))
        >>> u = system.simulate(initial, steps=20)
        >>> u.shape
        torch.Size([4, 21, 1, 50])
        >>> energy = system.energy(u)
        >>> torch.allclose(energy, energy[:, :1], rtol=1e-10, atol=0)
        True
    """

    name: ClassVar[str] = "korteweg-de-vries"
    equation: ClassVar[str] = "u_t = ∂/∂x (−α/2 u² + β u_xx)"
    conserved: ClassVar[tuple[str, ...]] = ("mass", "energy")
    dissipated: ClassVar[tuple[str, ...]] = ()
    paper_seed: ClassVar[int] = 1

    alpha: float = -6.0
    beta: float = 1.0
    width: float = 10.0
    dt: float = 1e-3

    def energy(self, u: Field) -> Float[Tensor, "*batch"]:
        r"""The energy $H = \sum_m dx [-\frac\alpha6 u^3 - \frac\beta2 S(u)]$."""
        dx = self.grid.spacing
        return integral(-self.alpha / 6 * u**3 - self.beta / 2 * squared_slope(u, dx), dx)

    def energy_gradient(self, u: Field) -> Field:
        r"""The variational derivative $\nabla H = -\frac\alpha2 u^2 + \beta D_2 u$."""
        return -self.alpha / 2 * u**2 + self.beta * laplacian(u, self.grid.spacing)

    def structure(self, v: Field) -> Field:
        r"""The operator $G = D$, antisymmetric: the energy is conserved."""
        return central_difference(v, self.grid.spacing)

    def discrete_gradient(self, u: Field, v: Field) -> Field:
        r"""$\bar\nabla H(u, v) = -\frac\alpha2 \frac{u^2+uv+v^2}{3} + \beta D_2 \frac{u+v}{2}$."""
        squares = (u * u + u * v + v * v) / 3
        return -self.alpha / 2 * squares + self.beta * laplacian((u + v) / 2, self.grid.spacing)

    def initial_states(self, n: int, generator: Generator, shift: bool = False) -> State:
        r"""Two solitons of random speed and place, a random half of the states mirrored.

        $u = u_{k_1}(x; d_1) + u_{k_2}(x; d_2)$ with $k_1, k_2$ uniform in (0.5, 2), the centers at $d_1$ uniform in
        (0.2, 0.3) widths and $d_2$ another (0.2, 0.5) widths further. The solitons are those of the infinite line,
        cut off at the ends of the grid: the slow, wide ones have a small jump there.

        Args:
            n: The number of states, at least 1.
            generator: A `torch.Generator`, or `numpy.random.RandomState(KortewegDeVries.paper_seed)` for the states of
                the reference.
            shift: Whether to move each state around the ring by a random number of points. The reference draws that
                number and does not use it; so does `shift=False`, which gives its states.

        Returns:
            The states (n, 1, points) in float64.

        Raises:
            ValueError: If n is less than 1, or α or β is zero (solitons need both).
        """
        check_count(n)
        return torch.stack([self._two_solitons(generator, shift) for _ in range(n)])[:, None, :]

    def soliton(self, x: Float[Tensor, " points"], t: float, k: float, center: float) -> Float[Tensor, " points"]:
        r"""The exact solution of the equation that travels without changing its shape:

        $$u(x, t) = -\tfrac{12 \beta}{\alpha} k^2\, \mathrm{sech}^2\!\left(k (x - x_0 + 4 \beta k^2 t)\right).$$

        Its velocity is $-4 \beta k^2$, to the left for β > 0; its height with the usual α = −6, β = 1 is $2 k^2$.
        This is the solution on the infinite line; on the ring it holds where the width is many times $1/k$.

        Args:
            x: Coordinates on the line; they are not wrapped around the ring.
            t: The time.
            k: The inverse width.
            center: The place $x_0$ of the crest at t = 0.

        Raises:
            ValueError: If α or β is zero.

        Examples:
            >>> system = KortewegDeVries()
            >>> system.soliton(torch.tensor([5.0, 1.0]), t=1.0, k=1.0, center=5.0)[1]
            tensor(2.)
        """
        if self.alpha == 0 or self.beta == 0:
            raise ValueError(
                f"alpha is {self.alpha} and beta is {self.beta}; solitons need both to be other than zero. "
                "Change them, or give initial states of your own."
            )
        height = -6 * self.beta / self.alpha * 2 * k**2
        return height / torch.cosh(k * (x - (center - 4 * self.beta * k**2 * t))) ** 2

    def _two_solitons(self, generator: Generator, shift: bool) -> Float[Tensor, " points"]:
        x = self.grid.coordinates()
        k1, k2 = uniform(generator, 0.5, 2.0, 2).tolist()
        d1 = uniform(generator, 0.2, 0.3, 1).item()
        d2 = d1 + uniform(generator, 0.2, 0.5, 1).item()
        u = self.soliton(x, 0.0, k1, self.width * d1) + self.soliton(x, 0.0, k2, self.width * d2)
        places = integer(generator, self.points)  # drawn in any case: the draws after it depend on it
        if shift:
            u = u.roll(places)
        return u.flip(0) if integer(generator, 2) else u

    @property
    def _structure_stencil(self) -> Stencil:
        weight = 1 / (2 * self.grid.spacing)
        return -weight, 0.0, weight

    @property
    def _stiffness(self) -> float:
        return self.beta

    def _pointwise_slope(self, u: Field, v: Field) -> Field:
        return -self.alpha / 6 * (u + 2 * v)
