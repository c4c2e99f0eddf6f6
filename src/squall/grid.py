"""The periodic grid in one dimension: difference operators and integrals.

Every function acts on the last axis, point m of M with m wrapped, and takes any leading shape, any device and any
floating precision. The operators are the second-order ones of Matsubara, Ishikawa and Yaguchi (NeurIPS 2020,
https://arxiv.org/abs/1905.08604); summation by parts holds for them exactly, which is what the conservation laws of
`squall.systems` rest on.
"""

import math
import operator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Field = Float[Tensor, "*batch points"]
"""A function on the grid: space last, any leading shape."""

MINIMUM_POINTS = 5
"""A point and two neighbours on either side, all different: the bands of the implicit scheme."""


@dataclass(frozen=True)
class Grid:
    r"""Equally spaced points $x_m = m\,dx$, $dx = \text{width}/M$, on a ring.

    Args:
        points: The number of points $M$, at least 5: the five points that a fourth difference couples must be distinct.
        width: The circumference of the ring, in the unit of x.

    Raises:
        TypeError: If `points` is not a whole number.
        ValueError: If there are fewer than 5 points, or the width is not positive and finite.

    Examples:
        >>> grid = Grid(points=50, width=10.0)
        >>> grid.spacing
        0.2
        >>> grid.coordinates().shape
        torch.Size([50])
    """

    points: int = 50
    width: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", operator.index(self.points))
        object.__setattr__(self, "width", float(self.width))
        if self.points < MINIMUM_POINTS:
            raise ValueError(
                f"points is {self.points}; a periodic grid needs at least {MINIMUM_POINTS} points, "
                "so that a point and its neighbours on both sides are five different ones."
            )
        if not (math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"width is {self.width}; it is a length and must be positive and finite.")

    @property
    def spacing(self) -> float:
        """The distance dx between neighbouring points, in the unit of the width."""
        return self.width / self.points

    def coordinates(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, " points"]:
        """The coordinates x of the points, from 0 to width − dx."""
        return self.width * torch.arange(self.points, dtype=dtype) / self.points


def forward_difference(u: Field, dx: float) -> Field:
    r"""The slope to the right, $(u_{m+1} - u_m)/dx$."""
    return (u.roll(-1, -1) - u) / dx


def backward_difference(u: Field, dx: float) -> Field:
    r"""The slope to the left, $(u_m - u_{m-1})/dx$."""
    return (u - u.roll(1, -1)) / dx


def central_difference(u: Field, dx: float) -> Field:
    r"""The first derivative, $(D u)_m = (u_{m+1} - u_{m-1})/(2\,dx)$, accurate to second order.

    D is antisymmetric, Σ v Du = −Σ u Dv, and Σ Du = 0.

    Examples:
        >>> central_difference(torch.tensor([0.0, 1.0, 0.0, -1.0]), dx=1.0)
        tensor([ 1.,  0., -1.,  0.])
    """
    return (u.roll(-1, -1) - u.roll(1, -1)) / (2 * dx)


def laplacian(u: Field, dx: float) -> Field:
    r"""The second derivative, $(D_2 u)_m = (u_{m+1} - 2u_m + u_{m-1})/dx^2$, accurate to second order.

    D₂ is symmetric and negative semidefinite, Σ u D₂u = −Σ (forward difference of u)², and Σ D₂u = 0.

    Examples:
        >>> laplacian(torch.tensor([0.0, 1.0, 0.0, -1.0]), dx=1.0)
        tensor([ 0., -2.,  0.,  2.])
    """
    return (u.roll(-1, -1) - 2 * u + u.roll(1, -1)) / dx**2


def squared_slope(u: Field, dx: float) -> Field:
    r"""The mean of the squared slopes to both sides, $S(u)_m = [(u_{m+1}-u_m)^2 + (u_m-u_{m-1})^2] / (2\,dx^2)$."""
    return (forward_difference(u, dx) ** 2 + backward_difference(u, dx) ** 2) / 2


def integral(u: Field, dx: float) -> Float[Tensor, "*batch"]:
    r"""The integral over the ring, $\sum_m u_m\,dx$ (the trapezoidal rule)."""
    return u.sum(-1) * dx
