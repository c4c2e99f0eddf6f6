"""How well a model predicts: rollouts against the truth, one-step errors, regimes, stability, and what costs nothing.

Every error is a mean of squares unless its name says otherwise. A rollout that leaves the finite numbers is
diverged: it is counted, and a mean over rollouts of which one diverged is `None`, never a number without it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from squall._types import PerState, Rate, Score, Trajectories, Validation
from squall.data import Source, Transitions
from squall.evaluation.growth import DENSE_LIMIT, growth_factor, growth_factors
from squall.evaluation.regimes import REGIMES, regime_thresholds
from squall.integrators import Step, euler, increment, rollout
from squall.models.placement import evaluating, like_model
from squall.models.stacked import Stacked

__all__ = ["Evaluation", "Physics", "RolloutValidation", "evaluate", "evaluate_each", "persistence"]

CHUNK_NUMBERS = 2**24
"""How many numbers of the truth are held at a time."""

BATCH_NUMBERS = 2**18
"""How many numbers a model is given at a time: its hidden layers are hundreds of times larger."""

GROWTH_STATES = 20
"""At how many states, spread evenly over the trajectories, the learned step is linearised; a tenth of it where
the states are too large for their whole Jacobian."""

KEPT_NUMBERS = 2**20
"""How many numbers of the rollouts are kept for figures, of each field."""

VRMSE_FLOOR = 1e-7
"""Added to the variance under the root, as The Well does."""


@runtime_checkable
class Physics(Protocol):
    """What an evaluation asks of a system; a trajectory without one has no energy."""

    def energy(self, u: Tensor) -> PerState: ...


@runtime_checkable
class Phases(Protocol):
    """A system that knows what happens at each point of a trajectory, beside the generic regimes of its speed."""

    regime_names: ClassVar[tuple[str, ...]]

    @property
    def has_regimes(self) -> bool: ...
    def regimes(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """What was found; `to_dict` is what `evaluation.json` holds.

    Attributes:
        rollout: errors over all steps of the rollouts: `states`, `energy`, `mass`, `vrmse` by field, and
            `diverged` of `trajectories`; each mean is `None` if a rollout diverged, and its
            `..._of_finite` is the mean over the others.
        one_step: squared error of the mean rate over one step, divided by the scale: `mean`, `top_1_percent`,
            `max`.
        regimes: for each regime of the truth, the generic ones and those of the system, the `share` of points, the
            one-step `error` and the share of the summed error that falls on it.
        growth: `median` and `max` over states of the growth factor of the learned step.
        baselines: the rollout errors of predictions that cost nothing: the first state for ever, and the mean of
            the truth itself.
        curves: errors and energies over rollout time, one number per step.
        rollouts: some of the predictions, for figures.
    """

    rollout: dict[str, Any]
    one_step: dict[str, float]
    regimes: dict[str, dict[str, float]]
    growth: dict[str, float | None]
    baselines: dict[str, dict[str, Any]]
    curves: dict[str, list[Any]]
    rollouts: "Rollouts" = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fields themselves, as plain numbers."""
        return {name: getattr(self, name) for name in asdict(self) if name != "rollouts"}


@dataclass(frozen=True)
class Rollouts:
    """A few trajectories at some of the times: truth and prediction (trajectory, time, channel, *space), and over the
    steps from those times the squared error of the rate and the system's regimes (-1 where it has none)."""

    time: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    step_error: np.ndarray
    regime: np.ndarray


def evaluate(
    model: Rate,
    source: Source,
    *,
    step: Step = euler,
    system: Physics | None = None,
    scale: Sequence[float] | None = None,
    keep: int = 2,
) -> Evaluation:
    """Roll every trajectory out from its first state and compare.

    States: mean of (û − u)² over trajectories, steps 1…N, channels and points. Energy: mean over trajectories
    and steps of (H(û) − H(u))². Mass: the same of Σ u ΔV, and channels.

    Args:
        model: state → rate; with `step=next_state`, state → next state.
        source: the trajectories of the truth.
        step: the integrator, also one with substeps.
        system: its energy is compared; no energy without it.
        scale: one number per channel by which one-step errors are divided, where channels have different units.
        keep: of how many trajectories the fields are kept.

    Returns:
        the errors.
    """
    (found,) = _evaluate(model, source, step, system, scale, keep)
    return found


def evaluate_each(
    models: Stacked,
    source: Source,
    *,
    step: Step = euler,
    system: Physics | None = None,
    scale: Sequence[float] | None = None,
    keep: int = 2,
) -> list[Evaluation]:
    """What `evaluate` finds of every member of a stack, to rounding; they are rolled out as one.

    Args:
        models: the members.
        source, step, system, scale, keep: as `evaluate` takes them.
    """
    return _evaluate(models, source, step, system, scale, keep)


def _evaluate(
    model: Rate | Stacked,
    source: Source,
    step: Step,
    system: Physics | None,
    scale: Sequence[float] | None,
    keep: int,
) -> list[Evaluation]:
    """One for every member of a stack; of a model the only one."""
    if source.trajectories == 0:
        raise ValueError("evaluate: the source holds no trajectory")
    members = range(_members(model))
    with torch.no_grad(), _evaluating(model):
        rollouts = [_RolloutTally(source, system, keep) for _ in members]
        _add_rollouts(rollouts, model, source, step)
        regimes = _Regimes(source, system)
        steps = [_StepTally(source, regimes, scale, rollouts[0].frames) for _ in members]
        for indices, truth in _chunks(source, model):
            labels = regimes.of(truth)
            for tally, rates in zip(steps, _mean_rates(model, step, truth, source.dt), strict=True):
                tally.add(truth, rates, labels, keep=keep - indices[0])
        growths = _growth(model, source, step, GROWTH_STATES)
        mean = _mean_state(source)
        baselines = {
            "persistence": _baseline(source, system, persistence),
            "mean state": _baseline(source, system, mean.expand_as),
        }
    return [
        Evaluation(
            rollout=rolled.errors(),
            one_step=stepped.errors(),
            regimes=stepped.regimes(),
            growth=growth,
            baselines=baselines,
            curves=rolled.curves(),
            rollouts=Rollouts(*rolled.rollouts(), *stepped.fields()),
        )
        for rolled, stepped, growth in zip(rollouts, steps, growths, strict=True)
    ]


def persistence(truth: Trajectories) -> Trajectories:
    """The prediction that nothing ever changes: the first state, for ever."""
    return truth[:, :1].expand_as(truth)


@dataclass(frozen=True)
class RolloutValidation:
    """Rolls trajectories out during a training; an object to give to `train(validate=...)`.

    Args:
        source: the validation trajectories.
        step: the integrator that the model is trained through.
        scale: one number per channel, in whose units the channels count alike for the score; 1 if left out.
        states: at how many states the growth factor is taken; a tenth of it where states are large.
    """

    source: Source
    step: Step = euler
    scale: Sequence[float] | None = None
    states: int = 5

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", tuple(map(float, self.scale)))

    def __call__(self, model: nn.Module) -> Validation:
        (found,) = self._validate(model)
        return found

    def each(self, models: Stacked) -> list[Validation]:
        """The validation of every member of a stack, to rounding."""
        return self._validate(models)

    def _validate(self, model: nn.Module | Stacked) -> list[Validation]:
        with torch.no_grad(), _evaluating(model):
            tallies = [_RolloutTally(self.source, None, keep=0, scale=self.scale) for _ in range(_members(model))]
            _add_rollouts(tallies, model, self.source, self.step)
            growths = _growth(model, self.source, self.step, self.states)
        return [_validation(tally.errors(), growth["max"]) for tally, growth in zip(tallies, growths, strict=True)]


def _validation(errors: dict[str, Any], growth: float | None) -> Validation:
    error = errors["scaled_of_finite"]
    score = Score(errors["diverged"], math.inf if error is None else error)
    metrics = {
        "rollout_states": errors["states"],
        "rollout_states_of_finite": errors["states_of_finite"],
        "score": error,
        "diverged": errors["diverged"],
        "growth_factor": growth,
    }
    return Validation(score, metrics)


def _members(model: Rate | Stacked) -> int:
    return len(model) if isinstance(model, Stacked) else 1


def _evaluating(model: Rate | Stacked) -> AbstractContextManager[None]:
    return evaluating(model.skeleton if isinstance(model, Stacked) else model)


def _chunks(source: Source, model: Rate | Stacked | None = None) -> Iterator[tuple[list[int], Tensor]]:
    """The trajectories, as many at a time as memory allows, in float64; for a stack where it computes."""
    members, device = (len(model), model.device) if isinstance(model, Stacked) else (1, None)
    size = (source.steps + 1) * source.channels * math.prod(source.space)
    count = max(1, CHUNK_NUMBERS // (size * members))
    for start in range(0, source.trajectories, count):
        indices = list(range(start, min(start + count, source.trajectories)))
        yield indices, source.read(indices).to(device, torch.float64)


def _roll_out(model: Rate | Stacked, step: Step, truth: Tensor, dt: float) -> Iterator[Tensor]:
    """The trajectories (batch, time, channel, *space) that every member predicts."""
    firsts = truth[:, 0].split(_states_at_a_time(truth[0, 0], model))
    if isinstance(model, Stacked):
        rolled = torch.cat([model.rollout(step, first, dt, truth.shape[1] - 1) for first in firsts], 1)
    else:
        parts = [rollout(step, model, like_model(model, first), dt, truth.shape[1] - 1) for first in firsts]
        rolled = torch.cat(parts)[None]
    return (one.to(truth) for one in rolled)


def _add_rollouts(tallies: Sequence["_RolloutTally"], model: Rate | Stacked, source: Source, step: Step) -> None:
    """Roll every trajectory out, for each member into its tally."""
    for indices, truth in _chunks(source, model):
        for tally, prediction in zip(tallies, _roll_out(model, step, truth, source.dt), strict=True):
            tally.add(indices, truth, prediction)


def _states_at_a_time(state: Tensor, model: Rate | Stacked) -> int:
    return max(1, BATCH_NUMBERS // (state.numel() * _members(model)))


def _mean_state(source: Source) -> Tensor:
    """The mean of the truth over trajectories and times, (channel, *space): no constant predicts it better."""
    total = torch.zeros(source.shape[2:], dtype=torch.float64)
    for _, truth in _chunks(source):
        total += truth.sum((0, 1))
    return total / (source.trajectories * (source.steps + 1))


def _broadcast(per_channel: Sequence[float], like: Tensor) -> Tensor:
    """One number per channel, against trajectories (batch, time, channel, *space)."""
    return like.new_tensor(per_channel).reshape(-1, *[1] * (like.dim() - 3))


def _cell_volumes(source: Source) -> Tensor:
    """ΔV of every point, (*space): the product of the spacings, or of the cells' widths where they differ."""
    widths = [torch.from_numpy(np.gradient(x) if len(x) > 1 else np.ones(1)) for x in source.coordinates]
    return functools.reduce(lambda volumes, width: volumes[..., None] * width, widths, torch.ones(()).double())


class _RolloutTally:
    """Gathers the errors of rollouts, chunk by chunk; keeps one number per trajectory and step."""

    def __init__(self, source: Source, system: Physics | None, keep: int, scale: Sequence[float] | None = None) -> None:
        self.source, self.system, self.keep = source, system, keep
        self.scale = torch.tensor([1.0] * source.channels if scale is None else list(scale), dtype=torch.float64)
        self.volumes = _cell_volumes(source)
        self.states: list[Tensor] = []
        self.scaled: list[Tensor] = []
        self.vrmse: list[Tensor] = []
        self.energies: list[tuple[Tensor, Tensor]] = []
        self.mass: list[Tensor] = []
        self.diverged: list[Tensor] = []
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, indices: list[int], truth: Tensor, prediction: Tensor) -> None:
        """One chunk of trajectories, with the state at time 0, (batch, time, channel, *space)."""
        kept = max(0, min(self.keep - indices[0], len(indices)))
        if kept:
            self.kept.append((truth[:kept, self.frames].cpu(), prediction[:kept, self.frames].cpu()))
        truth, prediction = truth[:, 1:], prediction[:, 1:]
        self.diverged.append(~torch.isfinite(prediction).flatten(1).all(1))
        squared = (prediction - truth).square().flatten(3)
        self.states.append(squared.mean((2, 3)))
        self.scaled.append((squared.mean((1, 3)) / self.scale.to(truth).square()).mean(1))
        variance = truth.flatten(3).var(-1, correction=0)
        self.vrmse.append((squared.mean(-1) / (variance + VRMSE_FLOOR)).sqrt().mean(1))
        mass = ((prediction - truth) * self.volumes.to(truth)).flatten(3).sum(-1)
        self.mass.append(mass.square().mean(-1))
        if self.system is not None:
            self.energies.append((_energy(self.system, truth), _energy(self.system, prediction)))

    @property
    def frames(self) -> slice:
        """The times of which the fields are kept."""
        times = self.source.steps + 1
        per_frame = self.source.channels * math.prod(self.source.space)
        count = max(2, min(times, KEPT_NUMBERS // (per_frame * max(1, self.keep))))
        return slice(None, None, math.ceil(times / count))

    def errors(self) -> dict[str, Any]:
        diverged = torch.cat(self.diverged)
        per_trajectory = {
            "states": torch.cat(self.states).mean(1),
            "scaled": torch.cat(self.scaled),
            "mass": torch.cat(self.mass).mean(1),
        }
        if self.energies:
            truth, prediction = (torch.cat(part) for part in zip(*self.energies, strict=True))
            per_trajectory["energy"] = (prediction - truth).square().mean(1)
        vrmse = torch.cat(self.vrmse)
        found: dict[str, Any] = {"trajectories": len(diverged), "diverged": int(diverged.sum())}
        for name, values in per_trajectory.items():
            found |= _mean(name, values, diverged)
        found["vrmse"] = {
            name: _mean("mean", vrmse[:, i], diverged)["mean"] for i, name in enumerate(self.source.fields)
        }
        found["per_trajectory"] = {name: _numbers(values, diverged) for name, values in per_trajectory.items()}
        return found

    def curves(self) -> dict[str, list[Any]]:
        diverged = torch.cat(self.diverged)
        states = torch.cat(self.states)
        time = [self.source.dt * (i + 1) for i in range(states.shape[1])]
        found: dict[str, list[Any]] = {"time": time, "states": _column_means(states, diverged)}
        if self.energies:
            truth, prediction = (torch.cat(part) for part in zip(*self.energies, strict=True))
            found["energy"] = _column_means((prediction - truth).square(), diverged)
            found["energy_truth"] = [row.tolist() for row in truth[: self.keep]]
            found["energy_prediction"] = [
                [x if math.isfinite(x) else None for x in row.tolist()] for row in prediction[: self.keep]
            ]
        return found

    def rollouts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times, truth and prediction of what was kept."""
        if not self.kept:
            return np.zeros(0), np.zeros(0), np.zeros(0)
        truth, prediction = (torch.cat(part).float().numpy() for part in zip(*self.kept, strict=True))
        return np.arange(self.source.steps + 1)[self.frames] * self.source.dt, truth, prediction


def _energy(system: Physics, u: Tensor) -> Tensor:
    return system.energy(u.flatten(0, 1)).reshape(u.shape[:2])


def _mean(name: str, values: Tensor, diverged: Tensor) -> dict[str, float | None]:
    finite = values[~diverged]
    mean = finite.mean().item() if len(finite) else None
    return {name: None if diverged.any() else mean, f"{name}_of_finite": mean}


def _numbers(values: Tensor, diverged: Tensor) -> list[float | None]:
    return [None if bad else x for x, bad in zip(values.tolist(), diverged.tolist(), strict=True)]


def _column_means(values: Tensor, diverged: Tensor) -> list[float | None]:
    """Mean over the trajectories at each step, until the first of them leaves the finite numbers."""
    return [x if math.isfinite(x) else None for x in values.mean(0).tolist()]


def _baseline(source: Source, system: Physics | None, predict: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    tally = _RolloutTally(source, system, keep=0)
    for indices, truth in _chunks(source):
        tally.add(indices, truth, predict(truth))
    errors = tally.errors()
    return {name: errors[name] for name in ("states", "energy", "mass") if name in errors}


def _growth(model: Rate | Stacked, source: Source, step: Step, states: int) -> list[dict[str, float | None]]:
    """Median and largest growth factor of every member."""
    transitions = Transitions(source)
    if source.channels * math.prod(source.space) > DENSE_LIMIT:
        states = max(1, states // 10)
    chosen = torch.linspace(0, len(transitions) - 1, min(states, len(transitions))).round().long()
    u, _ = transitions.fetch(chosen)
    if isinstance(model, Stacked):
        every = growth_factors(step, model, u, source.dt)
    else:
        every = growth_factor(step, model, like_model(model, u), source.dt)[None]
    return [_finite({"median": one.nanmedian().item(), "max": one.max().item()}) for one in every]


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _mean_rates(model: Rate | Stacked, step: Step, truth: Tensor, dt: float) -> Iterator[Tensor]:
    """The mean rate over every step of the truth, (batch, steps, channel, *space), as every member has it."""
    u = truth[:, :-1]
    pieces = u.flatten(0, 1).split(_states_at_a_time(truth[0, 0], model))
    if isinstance(model, Stacked):
        rates = torch.cat([increment(step, model, model.shared(piece), dt) for piece in pieces], 1)
    else:
        rates = torch.cat([increment(step, model, like_model(model, piece), dt) for piece in pieces])[None]
    return (one.to(truth).reshape(u.shape) for one in rates)


class _Regimes:
    """The divisions of all points and steps of the truth into regimes: the generic one, and the system's own."""

    def __init__(self, source: Source, system: Physics | None) -> None:
        self.dt, self.thresholds = source.dt, regime_thresholds(_some_speeds(source))
        self.system = system if isinstance(system, Phases) and system.has_regimes else None
        self.names = [tuple(REGIMES.values())] + ([] if self.system is None else [self.system.regime_names])

    def of(self, truth: Tensor) -> list[Tensor]:
        """For each division the regime of every point and step, (batch, steps, channel, *space)."""
        states = truth.cpu()
        labels = [self.thresholds.label(_rates(states, self.dt).abs())]
        if self.system is not None:
            labels.append(self.system.regimes(states))
        return [label.to(truth.device) for label in labels]


def _rates(truth: Tensor, dt: float) -> Tensor:
    return truth.diff(dim=1) / dt


class _StepTally:
    """Gathers the squared errors of the mean rate over one step, of every step: all, and by regime."""

    def __init__(self, source: Source, regimes: _Regimes, scale: Sequence[float] | None, frames: slice) -> None:
        self.source, self.names, self.scale, self.frames = source, regimes.names, scale, frames
        self.physical = regimes.system is not None
        self.totals, self.counts = ([torch.zeros(len(names)).double() for names in self.names] for _ in range(2))
        numbers = source.trajectories * source.steps * source.channels * math.prod(source.space)
        self.top = max(1, math.ceil(numbers / 100))
        self.largest = torch.zeros(0, dtype=torch.float64)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, truth: Tensor, found: Tensor, labels: list[Tensor], keep: int) -> None:
        """One chunk of trajectories and the learned rates; the fields of the first `keep` are kept."""
        error = found - _rates(truth, self.source.dt)
        if self.scale is not None:
            error = error / _broadcast(self.scale, truth)
        squared = error.square()
        for label, total, count in zip(labels, self.totals, self.counts, strict=True):
            inside = [label == i for i in range(len(total))]
            total += torch.stack([squared[chosen].sum() for chosen in inside]).cpu()
            count += torch.stack([chosen.sum() for chosen in inside]).cpu()
        candidates = torch.cat([self.largest.to(squared), squared.flatten()])
        self.largest = candidates.topk(min(self.top, len(candidates))).values
        if keep > 0:
            shown = labels[-1] if self.physical else torch.full_like(labels[-1], -1)
            self.kept.append((squared[:keep, self.frames].cpu(), shown[:keep, self.frames].cpu()))

    def errors(self) -> dict[str, float]:
        mean = (self.totals[0].sum() / self.counts[0].sum()).item()
        return {"mean": mean, "top_1_percent": self.largest.mean().item(), "max": self.largest.max().item()}

    def regimes(self) -> dict[str, dict[str, float]]:
        found = {}
        for names, total, count in zip(self.names, self.totals, self.counts, strict=True):
            share, part, error = count / count.sum(), total / total.sum(), total / count.clamp(min=1)
            for name, *numbers in zip(names, share.tolist(), error.tolist(), part.tolist(), strict=True):
                found[name] = dict(zip(("share", "error", "share_of_error"), numbers, strict=True))
        return found

    def fields(self) -> tuple[np.ndarray, np.ndarray]:
        """The squared errors and the system's regimes of what was kept."""
        if not self.kept:
            return np.zeros(0), np.zeros(0)
        squared, labels = (torch.cat(part) for part in zip(*self.kept, strict=True))
        return squared.float().numpy(), labels.to(torch.int8).numpy()


def _some_speeds(source: Source, limit: int = 2**22) -> Tensor:
    """|du/dt| at transitions spread evenly over the source, as many as fit the limit."""
    per_transition = source.channels * math.prod(source.space)
    stride = math.ceil(source.trajectories * source.steps * per_transition / limit)
    speeds = []
    for indices, truth in _chunks(source):
        rate = (truth[:, 1:] - truth[:, :-1]).flatten(0, 1) / source.dt
        offset = -indices[0] * source.steps % stride
        speeds.append(rate[offset::stride].abs())
    return torch.cat(speeds)
