"""Systems that an energy drives, and a scheme that conserves or dissipates exactly what they do."""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import State, Trajectories
from squall.grid import Field, integral
from squall.systems import implicit
from squall.systems.base import System

Stencil = tuple[float, float, float]
"""The weights of the point to the left, the point itself and the point to the right."""


@dataclass(frozen=True, kw_only=True)
class EnergySystem(System):
    r"""A field u on a periodic grid with $u_t = G\, \nabla H(u)$.

    $H$ is the energy and $\nabla H$ its variational derivative,
    $(\nabla H)_m = \frac{1}{dx} \partial H/\partial u_m$: the sum in H carries a factor dx, which the gradient does
    not. $G$ is a difference operator: antisymmetric where the energy is conserved, negative semidefinite where it is
    dissipated. In both cases $\sum G v = 0$, so the mass is conserved.

    In time, the discrete variational derivative method (Furihata 1999) replaces $\nabla H$ by $\bar\nabla H(u, v)$. For
    a state u and the next state v it satisfies

    $$\sum_m \bar\nabla H(u, v)_m\, (v - u)_m\, dx = H(v) - H(u), \qquad v - u = dt\, G\, \bar\nabla H(u, v),$$

    so the computed states conserve or dissipate exactly what the equation does, for any dt. The scheme is implicit and
    second-order accurate in dt and dx.

    All quantities are dimensionless. The functions of a state u act on the last axis; u may have any leading shape, any
    floating precision and any device, and they are differentiable.

    Args:
        points: The number of grid points, at least 5.
        width: The length of the period, positive.
        dt: The size of a time step, positive.

    Reference:
        T. Matsubara, A. Ishikawa, T. Yaguchi, Deep Energy-Based Modeling of Discrete-Time Physics, NeurIPS 2020,
        https://arxiv.org/abs/1905.08604; D. Furihata, J. Comput. Phys. 156 (1999) 181.
    """

    scheme = "its structure-preserving implicit scheme"

    @abc.abstractmethod
    def energy(self, u: Field) -> Float[Tensor, "*batch"]:
        """The energy H of each state."""

    @abc.abstractmethod
    def energy_gradient(self, u: Field) -> Field:
        r"""The variational derivative $\nabla H$: the derivative of H with respect to $u_m$, divided by dx."""

    @abc.abstractmethod
    def structure(self, v: Field) -> Field:
        r"""The operator G: $u_t = G\, \nabla H(u)$."""

    @abc.abstractmethod
    def discrete_gradient(self, u: Field, v: Field) -> Field:
        r"""The discrete variational derivative $\bar\nabla H(u, v)$; $\bar\nabla H(u, u) = \nabla H(u)$."""

    @property
    @abc.abstractmethod
    def _structure_stencil(self) -> Stencil:
        """The weights of G."""

    @property
    @abc.abstractmethod
    def _stiffness(self) -> float:
        r"""The factor κ of the linear part of the gradient, $\kappa D_2 u$; the rest of it is pointwise."""

    @abc.abstractmethod
    def _pointwise_slope(self, u: Field, v: Field) -> Field:
        r"""The derivative with respect to v of the pointwise part of $\bar\nabla H(u, v)$."""

    def rate(self, u: Field) -> Field:
        r"""The rate of change $u_t = G\, \nabla H(u)$, discrete in space and continuous in time."""
        return self.structure(self.energy_gradient(u))

    def mass(self, u: Field) -> Float[Tensor, "*batch"]:
        r"""The mass $\sum_m u_m\, dx$ of each state."""
        return integral(u, self.grid.spacing)

    def _march(self, first: State, steps: int, progress: Callable[[int], object] | None) -> Trajectories:
        """Each trajectory comes out the same, to the bit, whichever others are computed with it."""
        states = implicit.march(self._residual, self._jacobian, first[:, 0, :], self.dt, steps, progress)
        return states[:, :, None, :]

    def _residual(self, u: Field, v: Field) -> Field:
        return v - u - self.dt * self.structure(self.discrete_gradient(u, v))

    def _jacobian(self, u: Field, v: Field) -> Float[Tensor, "5 *batch points"]:
        """The derivative of the residual with respect to v: bands[s + 2] belongs to the point s to the right."""
        curvature = [self._stiffness / 2 * weight / self.grid.spacing**2 for weight in (1, -2, 1)]
        linear = [0.0, 0.0, 1.0, 0.0, 0.0]
        for j, outer in enumerate(self._structure_stencil):
            for k, inner in enumerate(curvature):
                linear[j + k] -= self.dt * outer * inner
        slope = self._pointwise_slope(u, v)
        bands = torch.stack([torch.full_like(slope, weight) for weight in linear])
        for j, outer in enumerate(self._structure_stencil, start=-1):
            bands[j + 2] -= self.dt * outer * slope.roll(-j, -1)
        return bands
