"""Spectra where points are masked: power by the eigenvalues of the Laplacian on the points that count."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from squall._types import Trajectories

__all__ = ["basin_spectrum"]

MOMENTS = 512
"""The most moments that are computed: a moment costs half a Laplacian of each state."""

States = Float[Tensor, "two state channel *space"]
"""States of the prediction and of the truth."""

Links = list[Float[Tensor, "channel *space"]]
"""1/h² between neighbours along each axis that both count, else 0."""


def basin_spectrum(
    prediction: Trajectories,
    truth: Trajectories,
    mask: Bool[Tensor, "channel *space"],
    spacing: Sequence[float],
    boundary: Sequence[str],
    edges: Sequence[float],
    measure: Float[Tensor, "*space"] | None = None,
) -> Float[Tensor, "quantity batch step channel band"]:
    r"""Power of prediction and truth and their cross-power, by band of the square root of an eigenvalue.

    Fourier waves need values on land, and whatever stands there adds waves of its own. The modes of

    .. math:: -\nabla^2 φ = k^2 φ, \quad \partial φ / \partial n = 0 \text{ at coasts and open ends}

    need none, are orthogonal over the points that count, and are cosines or waves in a rectangle (the discrete cosine
    transform). Their sum over all bands is the mean square anomaly of these points. The power of a band is a step
    function of the operator, expanded in Chebyshev polynomials with Jackson's damping, so that no mode is computed.
    The edges of a band are soft, alike for prediction and truth.

    Args:
        prediction, truth: (batch, step, channel, *space); what stands at masked points has no influence.
        mask: points that count.
        spacing: of the points along each axis.
        boundary: of each axis; only "periodic" closes.
        edges: wave numbers 2π/wavelength that divide the bands, ascending.
        measure: relative areas of the cells: the modes are those of u √area, along the grid.

    Reference:
        Weiße et al., The kernel polynomial method, Rev. Mod. Phys. 78, 2006; Denis, Côté and Laprise, Mon. Wea. Rev.
        130, 2002 (cosine transform on limited areas).
    """
    mask = mask.to(truth.device)
    axes = tuple(range(-mask.dim() + 1, 0))
    area = mask.to(truth) if measure is None else mask * measure.to(truth)
    total = area.sum(axes, keepdim=True)
    links = _links(mask.to(truth), spacing, boundary)
    largest = 4 * sum(h**-2 for n, h in zip(mask.shape[1:], spacing, strict=True) if n > 1)

    def anomaly(u: Trajectories) -> Trajectories:
        known = torch.where(mask, u, 0)
        return (known - (known * area).sum(axes, keepdim=True) / total) * area.sqrt()

    both = torch.stack([anomaly(prediction), anomaly(truth)])
    shape, both = both.shape[1:4], both.flatten(1, 2)  # (2, state, channel, *space)
    number = min(MOMENTS, max(64, 2 * max(mask.shape[1:])))
    moments = _moments(both, links, largest, number - number % 2)
    bands = _bands(moments.shape[-1], largest, spacing, edges).to(moments)
    return (moments @ bands).unflatten(1, shape[:2]) / total.reshape(-1, 1).to(moments)


def _links(mask: Float[Tensor, "channel *space"], spacing: Sequence[float], boundary: Sequence[str]) -> Links:
    links = []
    for axis, (h, end) in enumerate(zip(spacing, boundary, strict=True), 1):
        link = mask * mask.roll(-1, axis) / h**2
        if end != "periodic":
            link.select(axis, -1).zero_()
        links.append(link)
    return links


def _stepped(u: States, links: Links, largest: float) -> States:
    """(1 + 2/λ_max ∇²) u, whose eigenvalues lie between -1 and 1."""
    result = u
    for axis, link in enumerate(links, 3):
        flow = link * (u.roll(-1, axis) - u) * (2 / largest)
        result = result + flow - flow.roll(1, axis)
    return result


def _moments(u: States, links: Links, largest: float, number: int) -> Float[Tensor, "quantity state channel moment"]:
    """⟨u, T_n u⟩ of prediction, truth and both, two from each polynomial: 2 T_n T_n = T_2n + 1."""

    def products(a: Tensor, b: Tensor) -> Float[Tensor, "quantity state channel"]:
        pairs = ((a[0], b[0]), (a[1], b[1]), (a[0], b[1]))
        return torch.stack([(x * y).flatten(2).sum(-1, dtype=torch.float64) for x, y in pairs])

    before, now = u, _stepped(u, links, largest)
    moments = [products(u, u), products(now, u)]
    while len(moments) < number:
        after = 2 * _stepped(now, links, largest) - before
        moments.append(2 * products(now, now) - moments[0])
        moments.append(2 * products(after, now) - moments[1])
        before, now = now, after
    return torch.stack(moments, -1)


def _bands(
    number: int, largest: float, spacing: Sequence[float], edges: Sequence[float]
) -> Float[Tensor, "moment band"]:
    """Coefficients of the damped step functions of the bands."""
    h = max(spacing)
    values = [2 * (1 - math.cos(min(k * h, math.pi))) / h**2 for k in edges]  # of the discrete Laplacian
    angles = torch.tensor([0.0, *(math.acos(max(-1.0, 1 - 2 * x / largest)) for x in values), math.pi]).double()
    n = torch.arange(number).double()[:, None]
    q = math.pi / (number + 1)
    damped = ((number - n + 1) * torch.cos(q * n) + torch.sin(q * n) / math.tan(q)) / (number + 1)
    sines = torch.where(n > 0, torch.sin(n * angles) / n.clamp(min=1), angles) / math.pi
    return damped * torch.where(n > 0, 2.0, 1.0) * sines.diff(dim=1)
