"""Scores of rollouts by field and lead time: relative errors, valid time, spectra, events, conserved quantities.

Masked points never count, and the others count by their area; a score that a diverged rollout enters is `None`.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float, Int64
from torch import Tensor

from squall._types import State, Trajectories
from squall.data import DataError, Source
from squall.evaluation.basin import basin_spectrum
from squall.evaluation.on_sphere import SphereTally, storm_field
from squall.evaluation.points import PerField, Points, PointValues, cell_volumes
from squall.evaluation.regimes import quantiles
from squall.evaluation.sphere import is_on_sphere

BANDS = ("low", "mid", "high")
"""Of wave numbers, equally wide on a logarithmic axis up to the highest that the grid resolves."""

BASIN = "modes of the Laplacian on the points that count, with no flux through coasts and open ends"

LEAST_SHARE = 0.25
"""Of points that count, for spectra beside a mask."""

LARGEST_RATIO = 4.0
"""Of the areas of two cells, for spectra along the grid: that of the equator and 75 degrees of latitude."""

PIECE_NUMBERS = 2**21
"""Numbers of the truth that are scored at a time; a score takes up to ten arrays of them."""

Quantity = Callable[[State], Float[Tensor, " batch"]]
"""A conserved quantity: one number per state."""


@dataclass(frozen=True)
class Scoring:
    """What counts as an event and as a valid forecast.

    Args:
        events: values above this quantile of the truth are events; or by field a value above which they are.
        correlation: a forecast is valid until its correlation with the truth falls below this.
        nrmse: and until its nRMSE exceeds this.
        conserved: quantities by name, each a function from states (batch, channel, *space) to one number per state,
            or the name of a field for its integral over space.
        storms: on latitudes and longitudes, the field whose maxima are storms, or with a minus before it minima, such
            as "vorticity" (cyclonic) or "-msl".
        storm_share: a maximum is a storm from this quantile of the truth on.
    """

    events: float | Mapping[str, float] = 0.99
    correlation: float = 0.8
    nrmse: float = 0.4
    conserved: Mapping[str, Quantity | str] = field(default_factory=dict)
    storms: str | None = None
    storm_share: float = 0.995

    def __post_init__(self) -> None:
        if not 0 < self.storm_share < 1:
            raise ValueError(f"storm_share is {self.storm_share}, but must be a quantile between 0 and 1")
        if isinstance(self.events, int | float) and not 0 < self.events < 1:
            raise ValueError(
                f"events is {self.events}, but must be a quantile between 0 and 1, or a value for every field by name"
            )

    def check(self, source: Source) -> None:
        """Refuse names that the source does not have."""
        names = [*(self.events if isinstance(self.events, Mapping) else ())]
        names += [x for x in self.conserved.values() if isinstance(x, str)]
        if self.storms is not None:
            names.append(storm_field(self.storms)[0])
        if unknown := [name for name in names if name not in source.fields]:
            raise DataError(f"no field '{unknown[0]}': the data have {', '.join(source.fields)}")
        if self.storms is not None and not is_on_sphere(source):
            raise DataError(
                f"storms need latitude and longitude, in this order, but the axes are {list(source.description.axes)}"
            )


def nrmse(error: PerField, power: PerField) -> PerField:
    r"""The error relative to the truth.

    .. math:: \sqrt{\sum μ m (û - u)^2 / \sum μ m u^2}

    Args:
        error: the mean of (û − u)².
        power: the mean of u².

    Reference:
        Takamoto et al., PDEBench, NeurIPS 2022.
    """
    return (error / power.clamp(min=torch.finfo(power.dtype).tiny)).sqrt()


def correlation(prediction: PointValues, truth: PointValues, points: Points) -> PerField:
    """Pearson's correlation over the points of every field; NaN where the truth is constant."""
    a = prediction - points.by_field(prediction)[..., None]
    b = truth - points.by_field(truth)[..., None]
    norms = points.by_field(a.square()) * points.by_field(b.square())
    return points.by_field(a * b) / norms.sqrt()


def valid_time(
    curve: Float[Tensor, "trajectory step channel"], limit: float, dt: float, above: bool
) -> Float[Tensor, "trajectory channel"]:
    """The last lead time before a curve first crosses a limit, or becomes NaN; the whole time where it never does.

    Args:
        curve: at lead times dt, 2 dt, ….
        limit: that it has to keep to.
        dt: time step.
        above: whether the forecast is valid above the limit (correlation), else below (error).

    Reference:
        Pathak et al., Phys. Rev. Lett. 120, 2018 (error 0.4); Lippe et al., NeurIPS 2023 (correlation 0.8).

    >>> valid_time(torch.tensor([0.1, 0.3, 0.5, 0.2]).reshape(1, 4, 1), 0.4, dt=0.5, above=False)
    tensor([[1.]], dtype=torch.float64)
    """
    valid = curve >= limit if above else curve <= limit
    return valid.long().cumprod(1).sum(1) * torch.tensor(dt, dtype=torch.float64)


@functools.lru_cache(maxsize=32)
def shells(space: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[Int64[Tensor, " mode"], Float[Tensor, " mode"]]:
    """The band of every coefficient of `torch.fft.rfftn`, -1 for the mean, and how often it counts (2: conjugate).

    The wave number k is in waves along the longest side of the domain. The bands are equal parts of log k from 1 to
    the largest k that the coarsest axis resolves; shorter waves are in the highest.
    """
    longest, resolved = _resolved(space, spacing)
    axes = [np.fft.fftfreq(n, h) for n, h in zip(space[:-1], spacing[:-1], strict=True)]
    axes.append(np.fft.rfftfreq(space[-1], spacing[-1]))
    k = longest * np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij", sparse=True)))
    band = np.floor(len(BANDS) * np.log(np.maximum(k, 1.0)) / math.log(resolved) + 1e-9)
    band = np.where(k < 0.5, -1, np.minimum(band, len(BANDS) - 1))
    times = np.full(k.shape, 2.0)
    times[..., 0] = 1
    if space[-1] % 2 == 0:
        times[..., -1] = 1
    return torch.from_numpy(band.astype(np.int64).ravel()), torch.from_numpy(times.ravel())


def _resolved(space: Sequence[int], spacing: Sequence[float]) -> tuple[float, float]:
    """The longest side of the domain, and how many waves of the coarsest axis fit into it."""
    longest = max(n * h for n, h in zip(space, spacing, strict=True))
    return longest, max(2.0, min(longest / (2 * h) for n, h in zip(space, spacing, strict=True) if n > 1))


def spectrum(
    prediction: Trajectories,
    truth: Trajectories,
    spacing: Sequence[float],
    boundary: Sequence[str],
    measure: Float[Tensor, "*space"] | None = None,
) -> Float[Tensor, "quantity batch step channel band"]:
    """Power of prediction and truth and their cross-power Re û* u, summed over the wave numbers of a band.

    Power ratio: Σ|û|² / Σ|u|². Coherence: Σ Re û* u / √(Σ|û|² Σ|u|²). Axes that are not periodic are tapered by a Hann
    window, after the mean was taken off. With the areas of the cells, `measure`, the waves are those of u √area.

    Reference:
        Subich et al., Fixing the double penalty, ICML 2025 (power and coherence by wave number).
    """
    space = truth.shape[3:]
    band, times = shells(tuple(space), tuple(spacing))
    window = torch.ones((), dtype=truth.dtype)
    area = torch.ones((), dtype=truth.dtype) if measure is None else measure.to(truth).sqrt()
    for n, end in zip(space, boundary, strict=True):
        hann = torch.hann_window(n + 2, periodic=False, dtype=truth.dtype)[1:-1]
        window = window[..., None] * (torch.ones_like(hann) if end == "periodic" else hann)
    dims = tuple(range(3, truth.dim()))

    def transform(u: Trajectories) -> Complex[Tensor, "batch step channel mode"]:
        return torch.fft.rfftn(
            (u - u.mean(dims, keepdim=True)) * window.to(u) * area.to(u), dim=dims, norm="forward"
        ).flatten(3)

    a, b = transform(prediction), transform(truth)
    powers = torch.stack([(x * y.conj()).real for x, y in ((a, a), (b, b), (a, b))]) * times.to(truth)
    sums = powers.new_zeros(*powers.shape[:-1], len(BANDS) + 1)
    return sums.index_add_(-1, band.to(sums.device) + 1, powers)[..., 1:]


def contingency_scores(
    hits: float, misses: float, false_alarms: float, correct_negatives: float
) -> dict[str, float | None]:
    r"""Scores of forecasts of events from the table of outcomes; `None` where one is not defined.

    With the hit rate H = a/(a + c) and the false-alarm rate F = b/(b + d): critical success index a/(a + b + c),
    frequency bias (a + b)/(a + c), and the symmetric extremal dependence index

    .. math:: SEDI = \frac{\ln F - \ln H - \ln(1 - F) + \ln(1 - H)}{\ln F + \ln H + \ln(1 - F) + \ln(1 - H)}

    Args:
        hits: a. misses: c. false_alarms: b. correct_negatives: d.

    Reference:
        Ferro and Stephenson, Weather and Forecasting 26, 2011.

    >>> contingency_scores(30, 10, 20, 940)["csi"]
    0.5
    """

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole > 0 else None

    H, F = ratio(hits, hits + misses), ratio(false_alarms, false_alarms + correct_negatives)
    sedi = None
    if H is not None and F is not None and 0 < H < 1 and 0 < F < 1:
        logs = math.log(F), math.log(H), math.log1p(-F), math.log1p(-H)
        sedi = (logs[0] - logs[1] - logs[2] + logs[3]) / sum(logs)
    elif H == 1 and F == 0:
        sedi = 1.0
    return {
        "hit_rate": H,
        "false_alarm_rate": F,
        "csi": ratio(hits, hits + misses + false_alarms),
        "frequency_bias": ratio(hits + false_alarms, hits + misses),
        "sedi": sedi,
    }


def quantity(source: Source, chosen: Quantity | str) -> Quantity:
    """A conserved quantity; of a field by its name the integral over space, Σ u ΔV."""
    if not isinstance(chosen, str):
        return chosen
    channel, points = source.fields.index(chosen), Points(source)
    volumes = cell_volumes(source).expand(source.shape[2:])
    return lambda u: points.summed((u * volumes.to(u)).flatten(2)[:, None])[:, 0, channel]


class ScoreTally:
    """Gathers what the scores need over chunks of trajectories.

    Args:
        source: the truth.
        scoring: thresholds and conserved quantities.
        sample: some states of the truth, from which quantiles and means are estimated.
        climatology: the mean state of the truth.
    """

    def __init__(
        self, source: Source, scoring: Scoring, sample: State, climatology: Float[Tensor, "channel *space"]
    ) -> None:
        scoring.check(source)
        self.source, self.scoring, self.points = source, scoring, Points(source)
        weights, flat = self.points.weights, sample.flatten(2)[:, None]
        self.mean = self.points.by_field(flat).mean((0, 1))
        if isinstance(scoring.events, Mapping):
            self.thresholds = torch.tensor([scoring.events.get(name, math.inf) for name in source.fields]).double()
        else:
            self.thresholds = quantiles(flat[:, 0], [scoring.events], weights).flatten()
        self.no_spectrum = _no_spectrum(source)
        self.spacing = None if self.no_spectrum else [h for h in source.spacing if h is not None]
        self.quantities = {name: quantity(source, chosen) for name, chosen in scoring.conserved.items()}
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self.sphere = None
        if is_on_sphere(source):
            self.sphere = SphereTally(source, climatology, sample, scoring.storms, scoring.storm_share)

    def add(self, truth: Trajectories, prediction: Trajectories) -> None:
        """One chunk of trajectories, with the state at time 0."""
        count = max(1, PIECE_NUMBERS // truth[0].numel())
        for pair in zip(truth.split(count), prediction.split(count), strict=True):
            self._add(*pair)

    def _add(self, truth: Trajectories, prediction: Trajectories) -> None:
        for name, of in self.quantities.items():
            for side, states in (("truth", truth), ("prediction", prediction)):
                try:
                    values = of(states.flatten(0, 1)).reshape(states.shape[:2])
                except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                    raise DataError(f"the conserved quantity '{name}' maps no states to numbers: {error}") from error
                self.parts[f"{name} {side}"].append(values.double().cpu())
        truth, prediction = truth[:, 1:], prediction[:, 1:]
        if self.sphere is not None:
            self.sphere.add(truth, prediction)
        if self.spacing is not None:
            self.parts["spectrum"].append(self._spectrum(prediction, truth, self.spacing).cpu())
        truth, prediction = truth.flatten(3), prediction.flatten(3)
        values = {
            "error": self.points.by_field((prediction - truth).square()),
            "power": self.points.by_field(truth.square()),
            "correlation": correlation(prediction, truth, self.points),
            "events": self._events(truth, prediction),
        }
        for name, value in values.items():
            self.parts[name].append(value.cpu())

    def _spectrum(
        self, prediction: Trajectories, truth: Trajectories, spacing: Sequence[float]
    ) -> Float[Tensor, "quantity batch step channel band"]:
        source = self.source
        if source.mask is None:
            return spectrum(prediction, truth, spacing, source.boundary, source.measure)
        longest, resolved = _resolved(source.space, spacing)
        edges = [2 * math.pi * resolved ** (i / len(BANDS)) / longest for i in range(1, len(BANDS))]
        return basin_spectrum(prediction, truth, source.mask, spacing, source.boundary, edges, source.measure)

    def _events(self, truth: PointValues, prediction: PointValues) -> Float[Tensor, "batch step channel six"]:
        """Hits, misses, false alarms, correct negatives as shares, and both anomalies where the truth has an event."""
        limits = self.thresholds.to(truth)[:, None]
        here, there = truth > limits, prediction > limits
        anomalies = [torch.where(here, u - self.mean.to(u)[:, None], 0.0) for u in (prediction, truth)]
        table = [(x & y).to(truth) for x, y in ((here, there), (here, ~there), (~here, there), (~here, ~there))]
        return torch.stack([self.points.by_field(x) for x in (*table, *anomalies)], -1)

    def _all(self, name: str) -> Float[Tensor, "..."]:
        return torch.cat(self.parts[name], 1 if name == "spectrum" else 0)

    def scores(self) -> dict[str, Any]:
        """Over all lead times, by field."""
        error, power = self._all("error"), self._all("power")
        relative = nrmse(error.mean(1, keepdim=True), power.mean(1, keepdim=True))[:, 0]
        relative = relative.nan_to_num(math.inf, math.inf)
        limits, dt = self.scoring, self.source.dt
        times = {
            "nrmse": valid_time(nrmse(error, power), limits.nrmse, dt, above=False),
            "correlation": valid_time(self._all("correlation"), limits.correlation, dt, above=True),
        }
        scores: dict[str, Any] = {
            "nrmse": self._by_field(relative.mean(0)),
            "nrmse_p99": self._by_field(torch.from_numpy(np.quantile(relative.numpy(), 0.99, axis=0, method="higher"))),
            "valid_time": {name: self._by_field(time.median(0).values) for name, time in times.items()},
            "events": {},
            "spectrum": {},
            "conserved": {},
        }
        finite = error.isfinite().all((0, 1))
        table = self._all("events").mean((0, 1))
        for i, name in enumerate(self.source.fields):
            if math.isfinite(self.thresholds[i]):
                values = contingency_scores(*table[i, :4].tolist()) | {"relative_intensity": _ratio(*table[i, 4:])}
                # What is not defined is left out, as None stands for a number that became NaN or infinite.
                values = {key: x if finite[i] else None for key, x in values.items() if x is not None or not finite[i]}
                scores["events"][name] = {"threshold": self.thresholds[i].item(), **values}
        if self.spacing is not None:
            bands = self._all("spectrum").sum((1, 2))
            if self.source.mask is not None:
                scores["spectrum_of"] = BASIN
            scores["spectrum"] = {
                name: {band: _coherence(*bands[:, i, j]) for j, band in enumerate(BANDS)}
                for i, name in enumerate(self.source.fields)
            }
        else:
            scores["no_spectrum"] = self.no_spectrum
        if self.sphere is not None:
            scores |= self.sphere.scores()
        for name in self.quantities:
            truth, prediction = self._all(f"{name} truth"), self._all(f"{name} prediction")
            scores["conserved"][name] = {
                "error": _number((prediction - truth)[:, 1:].square().mean()),
                "drift": _number(_drift(prediction)[-1]),
                "drift_of_truth": _number(_drift(truth)[-1]),
            }
        return scores

    def curves(self, thin: Callable[[list[float | None]], list[float | None]]) -> dict[str, Any]:
        """The same by lead time, means over trajectories."""
        fields = self.source.fields

        def by_field(values: Float[Tensor, "step channel"]) -> dict[str, list[float | None]]:
            return {name: thin(list(map(_number, values[:, i]))) for i, name in enumerate(fields)}

        curves: dict[str, Any] = {
            "nrmse": by_field(nrmse(self._all("error"), self._all("power")).mean(0)),
            "correlation": by_field(self._all("correlation").mean(0)),
        }
        finite, table = self._all("error").isfinite().all(0), self._all("events").mean(0)
        csi = table[..., 0] / table[..., :3].sum(-1)
        curves["csi"] = by_field(csi.where(finite, torch.nan))
        if self.spacing is not None:
            predicted, true, cross = self._all("spectrum").sum(1)
            for key, values in (("power_ratio", predicted / true), ("coherence", cross / (predicted * true).sqrt())):
                curves[key] = {band: by_field(values[..., j]) for j, band in enumerate(BANDS)}
        if self.sphere is not None:
            curves["acc"] = by_field(self.sphere.acc())
            if storms := self.sphere.storm_curves():
                curves["storms"] = {name: thin(curve) for name, curve in storms.items()}
        if self.quantities:
            drifts = {name: _drift(self._all(f"{name} prediction"))[1:] for name in self.quantities}
            curves["conserved"] = {name: thin(list(map(_number, drift))) for name, drift in drifts.items()}
        return curves

    def _by_field(self, values: Float[Tensor, " channel"]) -> dict[str, float | None]:
        return dict(zip(self.source.fields, map(_number, values), strict=True))


def _no_spectrum(source: Source) -> str:
    """Why there are no spectra of the source; "" where there are."""
    mask, measure = source.mask, source.measure
    share = 1.0 if mask is None else float(mask.flatten(1).double().mean(1).min())
    if share < LEAST_SHARE:
        return f"only {share:.0%} of the points of a field count: too few for waves"
    counted = None if measure is None else (measure if mask is None else measure[mask.any(0)])
    if counted is not None and counted.max() > LARGEST_RATIO * counted.min():
        return (
            f"areas of cells differ by more than {LARGEST_RATIO:g} to 1; squall.evaluation.weather.spectra has the "
            "spectra of a whole sphere"
        )
    if None in source.spacing:
        return "points are not equally spaced"
    return "" if max(source.space) > 2 else "an axis needs more than two points"


def _drift(values: Float[Tensor, "trajectory time"]) -> Float[Tensor, " time"]:
    """Root mean square over trajectories of Q(t) − Q(0)."""
    return (values - values[:, :1]).square().mean(0).sqrt()


def _number(value: Float[Tensor, ""]) -> float | None:
    return value.item() if math.isfinite(value) else None


def _ratio(part: Float[Tensor, ""], whole: Float[Tensor, ""]) -> float | None:
    return _number(part / whole)


def _coherence(
    predicted: Float[Tensor, ""], true: Float[Tensor, ""], cross: Float[Tensor, ""]
) -> dict[str, float | None]:
    return {"power_ratio": _ratio(predicted, true), "coherence": _ratio(cross, (predicted * true).sqrt())}
