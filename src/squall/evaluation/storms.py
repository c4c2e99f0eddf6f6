"""Storms as a forecaster counts them: centres found, matched between forecast and truth, missed, or false alarms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from squall._process.extras import explain_missing_extra
from squall.evaluation.sphere import SphereGrid, great_circle

MATCH_KM = 1000.0
"""The distance within which a forecast storm is taken for a true one: the size of a storm of middle latitudes."""


@dataclass(frozen=True, eq=False)
class Storms:
    """Centres of storms at one time: degrees, and the value of the field there, the strongest first."""

    latitude: Float[np.ndarray, " storm"]
    longitude: Float[np.ndarray, " storm"]
    intensity: Float[np.ndarray, " storm"]

    def __len__(self) -> int:
        return len(self.intensity)


@dataclass(frozen=True, eq=False)
class Match:
    """Storms of a forecast matched with those of the truth.

    Attributes:
        distance: position error of every matched pair, km.
        intensity: that of the forecast minus that of the truth, of every pair.
        missed: storms of the truth without a partner.
        false_alarms: storms of the forecast without a partner.
    """

    distance: Float[np.ndarray, " pair"]
    intensity: Float[np.ndarray, " pair"]
    missed: int
    false_alarms: int


def cyclonic(
    vorticity: Float[Tensor, "*batch latitude longitude"], grid: SphereGrid
) -> Float[Tensor, "*batch latitude longitude"]:
    """The vorticity with the sign of the hemisphere: positive in a cyclone of either."""
    return vorticity * torch.from_numpy(np.sign(grid.latitude)).to(vorticity)[:, None]


def find_storms(
    field: Float[Tensor, "latitude longitude"], grid: SphereGrid, threshold: float, separation: float = 800.0
) -> Storms:
    """Maxima of a field, such as cyclonic vorticity or the negative height anomaly, that reach a threshold.

    A centre is a point not below its eight neighbours. Of two centres closer than the separation the stronger counts.
    A field with NaN, as of a rollout that diverged, has no storms.

    Args:
        field: large where there is a storm.
        grid: of the field.
        threshold: the smallest intensity of a storm, in the unit of the field.
        separation: km.
    """
    values = field.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        return Storms(*(np.zeros(0) for _ in range(3)))
    edge = np.pad(values, ((1, 1), (0, 0)), constant_values=-np.inf)
    edge = (
        np.pad(edge, ((0, 0), (1, 1)), mode="wrap")
        if grid.closes
        else np.pad(edge, ((0, 0), (1, 1)), constant_values=-np.inf)
    )
    around = np.lib.stride_tricks.sliding_window_view(edge, (3, 3)).max((2, 3))
    rows, columns = np.nonzero((values >= around) & (values >= threshold))
    order = np.argsort(-values[rows, columns], kind="stable")
    latitude, longitude = grid.latitude[rows[order]], grid.longitude[columns[order]]
    kept: list[int] = []
    for i in range(len(order)):
        if not (great_circle(latitude[kept], longitude[kept], latitude[i], longitude[i]) < separation).any():
            kept.append(i)
    return Storms(latitude[kept], longitude[kept], values[rows, columns][order][kept])


def match_storms(forecast: Storms, truth: Storms, within: float = MATCH_KM) -> Match:
    """Pair each storm with at most one of the other set: as many pairs as possible within the distance, the nearest.

    Args:
        forecast, truth: the storms of one time.
        within: the largest distance of a pair, km.
    """
    with explain_missing_extra():
        from scipy.optimize import linear_sum_assignment
    distance = great_circle(
        forecast.latitude[:, None], forecast.longitude[:, None], truth.latitude[None], truth.longitude[None]
    )
    far = 1e6  # more than all distances together: a pair within reach always pays
    rows, columns = linear_sum_assignment(np.where(distance <= within, distance, far))
    near = distance[rows, columns] <= within
    rows, columns = rows[near], columns[near]
    return Match(
        distance[rows, columns],
        forecast.intensity[rows] - truth.intensity[columns],
        len(truth) - len(rows),
        len(forecast) - len(rows),
    )


def storm_scores(
    forecast: Float[Tensor, "trajectory time latitude longitude"],
    truth: Float[Tensor, "trajectory time latitude longitude"],
    grid: SphereGrid,
    threshold: float,
    *,
    within: float = MATCH_KM,
    separation: float = 800.0,
) -> dict[str, list[float | None]]:
    """Scores of storm centres by lead time, over all trajectories.

    Args:
        forecast, truth: intensities, such as `cyclonic` vorticity, at the same times.
        grid: of the fields.
        threshold: the smallest intensity of a storm, in the unit of the field.
        within: the largest distance of a matched pair, km.
        separation: the smallest distance of two storms of one time, km.

    Returns:
        By lead time `hits`, `missed` and `false_alarms` (numbers of storms), `csi` hits / (hits + missed + false
        alarms), and of the hits the means of `position_error` (km) and `intensity_bias` (unit of the field); `None`
        where there is no storm to say it of.

    Raises:
        ValueError: no point of the truth reaches the threshold.
    """
    if not (truth >= threshold).any():
        raise ValueError(
            f"no point of the truth reaches the storm threshold {threshold:g}; its largest value is "
            f"{truth.max().item():g}. Lower the threshold"
        )
    scores: dict[str, list[Any]] = {}
    for time in range(truth.shape[1]):
        pairs = []
        for f, t in zip(forecast[:, time], truth[:, time], strict=True):
            predicted, true = (find_storms(u, grid, threshold, separation) for u in (f, t))
            pairs.append(match_storms(predicted, true, within))
        for name, value in summary(pairs).items():
            scores.setdefault(name, []).append(value)
    return scores


def summary(pairs: Sequence[Match]) -> dict[str, float | None]:
    """The scores of matched storms of several times; see `storm_scores`."""
    distance, intensity = (np.concatenate([getattr(p, name) for p in pairs]) for name in ("distance", "intensity"))
    hits, missed, alarms = len(distance), sum(p.missed for p in pairs), sum(p.false_alarms for p in pairs)
    total = hits + missed + alarms
    return {
        "hits": hits,
        "missed": missed,
        "false_alarms": alarms,
        "csi": hits / total if total else None,
        "position_error": float(distance.mean()) if hits else None,
        "intensity_bias": float(intensity.mean()) if hits else None,
    }
