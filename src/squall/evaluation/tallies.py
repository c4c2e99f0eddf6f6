"""Errors gathered over chunks of trajectories, and what is kept of the fields for figures."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from squall._types import PerState, State, Trajectories
from squall.data import Source
from squall.evaluation.points import Points, cell_volumes
from squall.evaluation.regimes import REGIMES, RegimeThresholds
from squall.evaluation.scores import ScoreTally

KEPT_NUMBERS = 2**20
"""Numbers of the rollouts kept for figures, per field: more than the pixels that show them, 4 MB in float32."""

VRMSE_FLOOR = 1e-12
"""Of the mean of u², added to the variance under the root: the rounding of a field in float32, so that a constant one
has a finite number. The Well adds 1e-7 itself, which is no different for fields of order 1; vorticity in 1/s has a
variance of 1e-10."""

FIELDS = ("truth", "prediction", "step_error", "regime")
"""What can be kept of a rollout for figures."""

PerStep = Float[Tensor, "trajectory step"]
PerTrajectory = Float[Tensor, " trajectory"]
Rates = Float[Tensor, "batch step channel *space"]
Diverged = Bool[Tensor, " trajectory"]
Labels = Int[Tensor, "batch step channel *space"]


@runtime_checkable
class Physics(Protocol):
    """What an evaluation asks of a system; a trajectory without one has no energy."""

    def energy(self, u: State) -> PerState: ...


@runtime_checkable
class Phases(Protocol):
    """A system that knows what happens at each point of a trajectory, beside the generic regimes of its speed."""

    regime_names: ClassVar[tuple[str, ...]]

    @property
    def has_regimes(self) -> bool: ...
    def regimes(self, u: Trajectories) -> Labels: ...


@dataclass(frozen=True)
class Keep:
    """What an evaluation keeps for figures, beside its errors.

    Args:
        trajectories: of how many, the first ones.
        times: about how many, equally spaced, of fields and curves, the latter to six digits. Left out, it is all
            times of the curves, and as many of the fields as make 2²⁰ numbers.
        fields: some of `FIELDS`.
        dtype: of truth and prediction, as NumPy names it.
    """

    trajectories: int = 2
    times: int | None = None
    fields: tuple[str, ...] = FIELDS
    dtype: str = "f4"

    def frames(self, source: Source) -> slice:
        """The times of which the fields are kept."""
        states, per_state = source.steps + 1, source.channels * math.prod(source.space)
        count = max(2, min(states, KEPT_NUMBERS // (per_state * max(1, self.trajectories))))
        stride = math.ceil(states / count)
        if self.times is not None:
            stride *= max(1, (len(range(0, states, stride)) - 1) // (self.times - 1))
        return slice(None, None, stride)

    def curve(self, values: list[float | None]) -> list[float | None]:
        """A curve at the times that are kept, the last among them."""
        if self.times is None:
            return values
        stride = max(1, len(values) // (self.times - 1))
        return [x if x is None else float(f"{x:.6g}") for x in values[::-1][::stride][::-1]]


@dataclass(frozen=True)
class Rollouts:
    """Fields of a few trajectories at some of the times; None for what is not kept.

    Attributes:
        time: the times.
        truth, prediction: (trajectory, time, channel, *space).
        step_error: the squared error of the rate over the step from each time.
        regime: the system's regimes over the same steps, -1 where it has none.
    """

    time: np.ndarray
    truth: np.ndarray | None = None
    prediction: np.ndarray | None = None
    step_error: np.ndarray | None = None
    regime: np.ndarray | None = None

    def arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """What is kept, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


class RolloutTally:
    """Errors of rollouts, one number per trajectory and step."""

    def __init__(
        self,
        source: Source,
        system: Physics | None,
        keep: Keep | None,
        scale: Sequence[float] | None = None,
        scores: ScoreTally | None = None,
    ) -> None:
        self.scores = scores
        self.source, self.system, self.keep = source, system, keep or Keep(0, fields=())
        self.scale = torch.tensor(scale or [1.0] * source.channels, dtype=torch.float64)
        self.points, self.volumes = Points(source), cell_volumes(source)
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, indices: list[int], truth: Trajectories, prediction: Trajectories) -> None:
        """One chunk of trajectories, with the state at time 0."""
        kept = max(0, min(self.keep.trajectories - indices[0], len(indices)))
        for name, field in (("truth", truth), ("prediction", prediction)):
            if kept and name in self.keep.fields:
                self.parts[name].append(self.points.hidden(field[:kept, self.keep.frames(self.source)]).cpu())
        if self.scores is not None:
            self.scores.add(truth, prediction)
        truth, prediction = truth[:, 1:], prediction[:, 1:]
        points, volumes = self.points, self.volumes.to(truth)
        squared = (prediction - truth).square().flatten(3)
        mass = points.summed(((prediction - truth) * volumes).flatten(3))
        floor = VRMSE_FLOOR * points.by_field(truth.square().flatten(3))
        variance = (points.variance(truth.flatten(3)) + floor).clamp(min=torch.finfo(floor.dtype).tiny)
        errors = {
            "diverged": ~torch.isfinite(prediction).flatten(1).all(1),
            "states": points.everywhere(squared),
            "scaled": points.over_fields(points.over_time(squared) / self.scale.to(truth).square()),
            "vrmse": (points.by_field(squared) / variance).sqrt().mean(1),
            "mass": mass.square().mean(-1),
        }
        if self.system is not None:
            errors |= {"energy_truth": self._energy(truth), "energy_prediction": self._energy(prediction)}
        for name, values in errors.items():
            self.parts[name].append(values)

    def _energy(self, u: Trajectories) -> PerStep:
        assert self.system is not None
        return self.system.energy(u.flatten(0, 1)).reshape(u.shape[:2])

    def _all(self, name: str) -> Shaped[Tensor, "trajectory *rest"]:
        return torch.cat(self.parts[name])

    def _energy_error(self) -> PerStep:
        return (self._all("energy_prediction") - self._all("energy_truth")).square()

    def errors(self) -> dict[str, Any]:
        """Means over steps and trajectories."""
        diverged, vrmse = self._all("diverged"), self._all("vrmse")
        per_trajectory = {"states": self._all("states").mean(1), "scaled": self._all("scaled")}
        per_trajectory["mass"] = self._all("mass").mean(1)
        if self.system is not None:
            per_trajectory["energy"] = self._energy_error().mean(1)
        errors: dict[str, Any] = {"trajectories": len(diverged), "diverged": int(diverged.sum())}
        for name, values in per_trajectory.items():
            errors |= _mean(name, values, diverged)
        errors["vrmse"] = {
            name: _mean("mean", vrmse[:, i], diverged)["mean"] for i, name in enumerate(self.source.fields)
        }
        errors["per_trajectory"] = {
            name: [None if bad else x for x, bad in zip(values.tolist(), diverged.tolist(), strict=True)]
            for name, values in per_trajectory.items()
        }
        return errors

    def curves(self) -> dict[str, list[Any]]:
        """Means over trajectories at every step, until the first trajectory diverges; energies of single ones."""
        states, curve = self._all("states"), self.keep.curve
        time: list[float | None] = [self.source.dt * (i + 1) for i in range(states.shape[1])]
        curves: dict[str, list[Any]] = {"time": curve(time), "states": curve(_finite(states.mean(0)))}
        if self.system is not None:
            curves["energy"] = curve(_finite(self._energy_error().mean(0)))
            for name in ("energy_truth", "energy_prediction"):
                curves[name] = [curve(_finite(row)) for row in self._all(name)[: self.keep.trajectories]]
        return curves if self.scores is None else curves | self.scores.curves(curve)

    def fields(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """What `Rollouts` has of them: the times, and truth and prediction where they are kept."""
        time = np.arange(self.source.steps + 1)[self.keep.frames(self.source)] * self.source.dt
        names = [name for name in ("truth", "prediction") if self.parts[name]]
        return {"time": time} | {name: self._all(name).float().numpy().astype(self.keep.dtype) for name in names}


class Regimes:
    """The divisions of all points and steps of the truth into regimes: the generic one, and the system's own."""

    def __init__(self, dt: float, thresholds: RegimeThresholds, system: Physics | None) -> None:
        self.dt, self.thresholds = dt, thresholds
        self.system = system if isinstance(system, Phases) and system.has_regimes else None
        self.names = [tuple(REGIMES.values())] + ([] if self.system is None else [self.system.regime_names])

    def of(self, truth: Trajectories) -> list[Labels]:
        """For each division the regime of every point and step."""
        states = truth.cpu()
        labels = [self.thresholds.label((states.diff(dim=1) / self.dt).abs())]
        if self.system is not None:
            labels.append(self.system.regimes(states))
        return [label.to(truth.device) for label in labels]


class Largest:
    """The largest of many values, which are added piece by piece.

    Args:
        total: how many are kept, rounded up; of weighted values, up to which sum of weights.
    """

    def __init__(self, total: float) -> None:
        self.total = max(1, math.ceil(total))
        self.values, self.weights = torch.zeros(2, 0, dtype=torch.float64)

    def add(self, values: Float[Tensor, " n"], weights: Float[Tensor, " n"] | None = None) -> None:
        candidates = torch.cat([self.values.to(values), values])
        if weights is None:
            self.values = candidates.topk(min(self.total, len(candidates))).values
            return
        weights = torch.cat([self.weights.to(weights), weights])
        order = candidates.argsort(descending=True)
        before = weights[order].cumsum(0) - weights[order]
        order = order[before < self.total]
        self.values, self.weights = candidates[order], weights[order]

    def mean(self) -> float:
        """The mean of the values that are kept; the last one counts as far as the sum of weights reaches."""
        if len(self.weights) == 0:
            return self.values.mean().item()
        weights = torch.minimum(self.weights, self.total - (self.weights.cumsum(0) - self.weights))
        return ((self.values * weights).sum() / weights.sum()).item()


class StepTally:
    """Squared errors of the mean rate over one step, of every step: all, and by regime."""

    def __init__(self, source: Source, regimes: Regimes, scale: Sequence[float] | None, keep: Keep) -> None:
        self.source, self.names, self.scale, self.keep = source, regimes.names, scale, keep
        self.physical, self.points = regimes.system is not None, Points(source)
        self.totals, self.counts = ([torch.zeros(len(names)).double() for names in self.names] for _ in range(2))
        states = source.trajectories * source.steps
        weights = self.points.weights
        numbers = source.channels * math.prod(source.space) if weights is None else weights.sum().item()
        self.largest = Largest(states * numbers / 100)
        self.kept: dict[str, list[Tensor]] = {"step_error": [], "regime": []}

    def add(self, indices: list[int], truth: Trajectories, rates: Rates, labels: list[Labels]) -> None:
        """One chunk of trajectories with the learned rates of every step."""
        error = rates - truth.diff(dim=1) / self.source.dt
        if self.scale is not None:
            error = error / error.new_tensor(self.scale).reshape(-1, *[1] * (error.dim() - 3))
        squared = error.square()
        self._count(squared, labels)
        kept, frames = self.keep.trajectories - indices[0], self.keep.frames(self.source)
        shown = labels[-1] if self.physical else torch.full_like(labels[-1], -1)
        for name, field in (("step_error", self.points.hidden(squared)), ("regime", shown)):
            if kept > 0 and name in self.keep.fields:
                self.kept[name].append(field[:kept, frames].cpu())

    def _count(self, squared: Rates, labels: list[Labels]) -> None:
        weights, weighted = self.points.weights, squared
        if weights is not None:
            weights = weights.to(squared).reshape(squared.shape[2:]).expand_as(squared)
            weighted = self.points.weighted(squared.flatten(3)).reshape(squared.shape)
        for label, total, count in zip(labels, self.totals, self.counts, strict=True):
            inside = [label == i for i in range(len(total))]
            total += torch.stack([weighted[chosen].sum() for chosen in inside]).cpu()
            counts = [chosen.sum() if weights is None else weights[chosen].sum() for chosen in inside]
            count += torch.stack(counts).cpu()
        if weights is None:
            self.largest.add(squared.flatten())
        else:
            self.largest.add(squared[weights > 0], weights[weights > 0])

    def errors(self) -> dict[str, float]:
        mean = (self.totals[0].sum() / self.counts[0].sum()).item()
        return {"mean": mean, "top_1_percent": self.largest.mean(), "max": self.largest.values.max().item()}

    def regimes(self) -> dict[str, dict[str, float]]:
        regimes = {}
        for names, total, count in zip(self.names, self.totals, self.counts, strict=True):
            share, part, error = count / count.sum(), total / total.sum(), total / count.clamp(min=1)
            for name, *numbers in zip(names, share.tolist(), error.tolist(), part.tolist(), strict=True):
                regimes[name] = dict(zip(("share", "error", "share_of_error"), numbers, strict=True))
        return regimes

    def fields(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """What `Rollouts` has of the squared errors and of the system's regimes, where they are kept."""
        types = {"step_error": torch.float32, "regime": torch.int8}
        return {name: torch.cat(parts).to(types[name]).numpy() for name, parts in self.kept.items() if parts}


def _mean(name: str, values: PerTrajectory, diverged: Diverged) -> dict[str, float | None]:
    finite = values[~diverged]
    mean = finite.mean().item() if len(finite) else None
    return {name: None if diverged.any() else mean, f"{name}_of_finite": mean}


def _finite(values: Float[Tensor, " step"]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values.tolist()]
