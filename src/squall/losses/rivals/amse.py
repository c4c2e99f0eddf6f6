"""The adjusted mean squared error: amplitude and coherence of every scale apart, so that smoothing does not pay."""

import math
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from squall._process.harmonics import import_harmonics
from squall.losses.checks import combined_measure
from squall.losses.rivals.base import Points, Rival, ratio, require, root
from squall.losses.rivals.spectra import by_shell, power, shells, transform

NO_SPECTRUM = MappingProxyType(
    {name: f"a spectrum needs all points, alike; leave out {name}" for name in ("mask", "measure")}
)


def adjusted(error: Tensor, target: Tensor, shell: np.ndarray, times: np.ndarray, epsilon: float) -> Tensor:
    """AMSE of every (sample, channel), from the coefficients of the error and of the target.

    With E_k the power of the error and D_k = (√P_k − √Q_k)², 2 √(P_k Q_k) (1 − Coh_k) = E_k − D_k: nothing is lost to
    rounding where the prediction is good.
    """
    prediction = target + error
    p, q, e = (by_shell(power(x), shell, times) for x in (prediction, target, error))
    difference = by_shell((error * (prediction + target).conj()).real, shell, times)  # P − Q
    amplitude = ratio(difference, root(p) + root(q)).square()
    floor = epsilon * q.sum(-1, keepdim=True)
    factor = ratio(torch.maximum(p, q), torch.maximum(root(p) * root(q), floor)).clamp(min=1)
    return (amplitude + factor * (e - amplitude)).sum(-1)


class AMSE(Rival):
    """loss = mean over samples and channels of Σ_k (√P_k − √Q_k)² + 2 max(P_k, Q_k) (1 − Coh_k).

    P_k and Q_k are the powers of prediction and target in shell k of wave numbers, Coh_k = Re Σ û v̂* / √(P_k Q_k). With
    √(P_k Q_k) for the maximum the sum *is* the mean squared error, which rewards a forecast for smoothing what it
    cannot place (the double penalty). AMSE ≥ MSE, in the same unit. Where the prediction has next to no power in a
    shell, its gradient is up to 1/ε times that of MSE: the paper fine-tunes a model that MSE has trained.

    Args:
        epsilon: ε > 0: √(P_k Q_k) is taken to be at least ε times the power of the target; 1e-6, as in makani.

    Reference:
        Subich et al., Fixing the double penalty in data-driven weather forecasting through a modified spherical
        harmonic loss function, ICML 2025 (arXiv 2501.19374).

    Example:
        >>> wave = torch.linspace(0, 2 * math.pi, 9)[:8].sin().reshape(1, 1, 8)
        >>> print(f"{AMSE()(0.5 * wave, wave).item():.4f}")
        0.1250
    """

    axes = (1, 3)
    refuses = NO_SPECTRUM

    def __init__(self, *, epsilon: float = 1e-6) -> None:
        super().__init__()
        require(0 < epsilon < 1, f"AMSE: epsilon must be in (0, 1), got {epsilon}")
        self.epsilon = epsilon

    def value(self, batch: Points) -> Tensor:
        return adjusted(*self.spectra(batch), self.epsilon).mean()

    def spectra(self, batch: Points) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """Coefficients of error and target, the shell of each, and how often it counts."""
        return transform(batch.error), transform(batch.target), *shells(tuple(batch.error.shape[2:]))


class SphericalAMSE(AMSE):
    """`AMSE` by the degree k of spherical harmonics, of (batch, channel, latitude from the north, longitude).

    Several lead times, (batch, channel, lead, latitude, longitude), have a spectrum each. The quadrature of the
    harmonics counts points by area. A measure may be given, but must be these areas.

    Args:
        grid: the latitudes, a name of torch-harmonics: "equiangular" (with poles), "legendre-gauss", ...
        epsilon: as for `AMSE`.

    Raises:
        ModuleNotFoundError: without torch-harmonics.
    """

    axes = (2, 3)
    refuses = MappingProxyType({"mask": NO_SPECTRUM["mask"]})

    def __init__(self, *, grid: str = "equiangular", epsilon: float = 1e-6) -> None:
        super().__init__(epsilon=epsilon)
        self.grid, self._harmonics, self._made = grid, import_harmonics(), {}

    def forward(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; arguments and errors as for `ImbalanceAwareLoss`."""
        if measure is not None:
            self._check_areas(measure, prediction)
        return super().forward(prediction, target, mask=mask)

    def spectra(self, batch: Points) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        key = (*batch.error.shape[-2:], batch.error.device, batch.error.dtype)
        if key not in self._made:
            self._made[key] = self._harmonics.RealSHT(*key[:2], grid=self.grid).to(batch.error)
        error, target = (self._made[key](u) / math.sqrt(4 * math.pi) for u in (batch.error, batch.target))
        degree, order = np.indices(error.shape[-2:])
        return error.flatten(-2), target.flatten(-2), degree.ravel(), np.where(order == 0, 1.0, 2.0).ravel()

    def _check_areas(self, measure: Tensor, like: Tensor) -> None:
        """Refuse a measure that is not the areas, but for a hundredth of the largest cell."""
        given = combined_measure(None, measure, like)
        assert given is not None
        areas = self._harmonics.quadrature.precompute_latitudes(like.shape[-2], grid=self.grid)[1].to(given)
        expected, share = areas[:, None] / areas.max(), given / given.amax((-2, -1), keepdim=True)
        require(
            bool((share - expected).abs().max() <= 0.01),
            f"SphericalAMSE: measure is not the areas of the cells of a grid {self.grid!r}; name the grid of the data "
            "or leave out measure",
        )
