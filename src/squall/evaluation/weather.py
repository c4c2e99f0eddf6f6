"""Scores of forecasts on the sphere, with the names of WeatherBench-X: RMSE, bias and ACC by lead time, spectra.

Fields are (trajectory, time, channel, latitude, longitude). Means are weighted by the area of the cells; a point whose
weight is zero never counts, whatever its value.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from squall._types import Trajectories
from squall.evaluation.regimes import quantiles
from squall.evaluation.scores import contingency_scores
from squall.evaluation.sphere import SphereGrid

Weights = Float[Tensor, "latitude longitude"] | Float[Tensor, "channel latitude longitude"]
ByLead = Float[Tensor, "time channel"]


def area_mean(values: Float[Tensor, "*batch latitude longitude"], weights: Weights) -> Float[Tensor, "*batch"]:
    """The mean over the sphere, Σ a x / Σ a, with areas a of any scale, zero where masked."""
    weights = weights.to(values)
    return torch.where(weights > 0, values * weights, 0.0).sum((-2, -1)) / weights.sum((-2, -1))


def rmse(prediction: Trajectories, truth: Trajectories, weights: Weights) -> ByLead:
    """The root of the mean of (û − u)² over trajectories and the sphere, in the unit of the field."""
    return area_mean((prediction - truth).square(), weights).mean(0).sqrt()


def bias(prediction: Trajectories, truth: Trajectories, weights: Weights) -> ByLead:
    """The mean of û − u over trajectories and the sphere, in the unit of the field."""
    return area_mean(prediction - truth, weights).mean(0)


def acc(
    prediction: Trajectories,
    truth: Trajectories,
    climate: Float[Tensor, "channel latitude longitude"],
    weights: Weights,
) -> ByLead:
    r"""The anomaly correlation coefficient, with anomalies $a = u - c$ from the climatology c:

    .. math:: ACC = \overline{\hat a a} \Big/ \sqrt{\overline{\hat a^2}\;\overline{a^2}}

    The means are over trajectories and the sphere. NaN where all anomalies are zero, as for climatology as a forecast.

    Reference:
        Rasp et al., WeatherBench 2, J. Adv. Model. Earth Syst. 16, 2024; the means are those of WeatherBench-X.
    """
    predicted, true = prediction - climate, truth - climate
    product, first, second = (
        area_mean(x, weights).mean(0) for x in (predicted * true, predicted.square(), true.square())
    )
    return product / (first * second).sqrt()


def climatology(truth: Trajectories) -> Float[Tensor, "channel latitude longitude"]:
    """The mean state over trajectories and times, of the training data: a forecast that knows no initial state."""
    return truth.mean((0, 1))


def event_scores(
    prediction: Float[Tensor, "trajectory time latitude longitude"],
    truth: Float[Tensor, "trajectory time latitude longitude"],
    weights: Float[Tensor, "latitude longitude"],
    threshold: float,
) -> dict[str, list[float | None]]:
    """Scores of "here the field exceeds the threshold" as a forecast, point by point, by lead time.

    Args:
        prediction, truth: one field, such as cyclonic vorticity.
        weights: areas, by which outcomes count.
        threshold: in the unit of the field.

    Returns:
        `hit_rate`, `false_alarm_rate`, `csi`, `frequency_bias` and `sedi` as `contingency_scores` defines them.

    Raises:
        ValueError: no point of the truth exceeds the threshold.
    """
    if not (truth > threshold).any():
        raise ValueError(
            f"no point of the truth exceeds the threshold {threshold:g}; its largest value is "
            f"{truth.nan_to_num(-math.inf).max().item():g}. Lower the threshold"
        )
    here, there = prediction > threshold, truth > threshold
    table = torch.stack(
        [
            area_mean(outcome.double(), weights).mean(0)
            for outcome in (here & there, ~here & there, here & ~there, ~here & ~there)
        ],
        -1,
    )
    scores: dict[str, list[float | None]] = {}
    for row in table.tolist():
        for name, value in contingency_scores(*row).items():
            scores.setdefault(name, []).append(value)
    return scores


def quantile_curve(
    field: Float[Tensor, "*batch latitude longitude"],
    levels: Sequence[float],
    weights: Float[Tensor, "latitude longitude"],
) -> Float[Tensor, " level"]:
    """Quantiles of all values of a field by area: the level q is the value that a share q of the area does not exceed.

    Args:
        field: one field, at any number of times.
        levels: between 0 and 1, such as 0.5, 0.99, 0.999, 0.9999.
        weights: areas, zero where masked.

    Example:
        >>> field = torch.arange(4.0).reshape(1, 2, 2)
        >>> quantile_curve(field, [0.5, 1.0], torch.tensor([[1.0, 1.0], [1.0, 5.0]]))
        tensor([3., 3.])
    """
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels are {list(levels)}; a quantile lies between 0 and 1")
    states = field.double().reshape(-1, 1, *field.shape[-2:])
    return quantiles(states, list(levels), weights.flatten()[None]).flatten().to(field)


def spectra(
    prediction: Trajectories, truth: Trajectories, grid: SphereGrid
) -> dict[str, Float[Tensor, "time channel degree"]]:
    r"""Power of forecast and truth by total wavenumber l, and how well their phases agree.

    .. math:: P_l = \sum_m |a_{lm}|^2, \qquad C_l = \sum_m \Re\,\hat a_{lm} a_{lm}^* / \sqrt{\hat P_l P_l}

    A power ratio below one means missing scales. A ratio near one with low coherence means displaced ones. The sums
    run over trajectories too.

    Returns:
        `power` of the forecast, `power_of_truth`, `power_ratio` and `coherence`.

    Raises:
        ValueError: for a grid that has no quadrature.

    Reference:
        Subich et al., Fixing the double penalty, ICML 2025, https://arxiv.org/abs/2501.19374.
    """
    a, b = grid.harmonics(prediction), grid.harmonics(truth)
    twice = torch.full((a.shape[-1],), 2.0, dtype=torch.float64)  # orders −m and m
    twice[0] = 1

    def power(
        x: Complex[Tensor, "batch time channel degree order"], y: Complex[Tensor, "batch time channel degree order"]
    ) -> Float[Tensor, "time channel degree"]:
        return ((x * y.conj()).real * twice).sum(-1).sum(0)

    predicted, true, cross = power(a, a), power(b, b), power(a, b)
    return {
        "power": predicted,
        "power_of_truth": true,
        "power_ratio": predicted / true,
        "coherence": cross / (predicted * true).sqrt(),
    }


def predictability_horizon(
    first: Trajectories, twin: Trajectories, weights: Weights, dt: float, share: float = 0.5
) -> Float[Tensor, " channel"]:
    r"""The lead time until which twins that start almost alike stay close: no forecast is to blame beyond it.

    Two unrelated states differ by $\sqrt2\,\sigma$ (root mean square), with σ the standard deviation of the truth at a
    point over trajectories and times. The horizon is the last time before the twins' RMSE exceeds a share of it.

    Args:
        first, twin: trajectories from almost equal states, the state at time 0 first.
        weights: areas.
        dt: time step.
        share: of the RMSE of unrelated states.

    Returns:
        In the unit of dt, per channel; infinite where the twins stay close to the end.
    """
    spread = area_mean(first.var((0, 1), correction=0), weights).sqrt()
    close = rmse(twin, first, weights) <= share * math.sqrt(2) * spread
    steps = close.long().cumprod(0).sum(0) - 1
    return torch.where(close.all(0), math.inf, steps.clamp(min=0) * dt).double()
