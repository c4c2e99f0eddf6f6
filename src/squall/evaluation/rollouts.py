"""How well a model predicts: rollouts against the truth, one-step errors, regimes, stability, and baselines.

Every error is a mean of squares unless its name says otherwise. A rollout that becomes NaN or infinite is diverged: it
is counted, and a mean over rollouts of which one diverged is `None`, never a number without it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from squall._types import Rate, Score, State, Trajectories, Validation
from squall.data import Source, Transitions
from squall.evaluation.growth import DENSE_LIMIT, growth_factor, growth_factors
from squall.evaluation.points import Points
from squall.evaluation.regimes import regime_thresholds
from squall.evaluation.tallies import Keep, Physics, Regimes, Rollouts, RolloutTally, StepTally
from squall.integrators import IntegratorLike, accepts_step, euler, increment, rollout
from squall.models.placement import evaluating, like_model
from squall.models.stacked import Stacked

__all__ = ["Evaluation", "Keep", "Physics", "RolloutValidation", "Rollouts", "evaluate", "evaluate_each", "persistence"]

CHUNK_NUMBERS = 2**24
"""Numbers of the truth in memory at a time: 64 MB in float32."""

BATCH_NUMBERS = 2**18
"""Numbers passed to a model at a time; bounds memory, as hidden layers are hundreds of times larger."""

GROWTH_STATES = 20
"""At how many states, spread evenly over the trajectories, the learned step is linearised; a tenth of it where
the states are too large for their whole Jacobian."""

SPEEDS = 2**22
"""Numbers of the truth from which the thresholds of the regimes are estimated."""


@dataclass(frozen=True)
class Evaluation:
    """The errors of a model; `to_dict` is what `evaluation.json` holds.

    Attributes:
        rollout: errors over all steps of the rollouts: `states`, `energy`, `mass`, `vrmse` by field, and
            `diverged` of `trajectories`; each mean is `None` if a rollout diverged, and its
            `..._of_finite` is the mean over the others.
        one_step: squared error of the mean rate over one step, divided by the scale: `mean`, `top_1_percent`,
            `max`.
        regimes: for each regime of the truth, the generic ones and those of the system, the `share` of points, the
            one-step `error` and the share of the summed error that falls on it.
        growth: `median` and `max` over states of the growth factor of the learned step.
        baselines: the rollout errors of persistence and of the climatology (`mean state`).
        curves: errors and energies over rollout time.
        rollouts: some of the predictions, for figures.
    """

    rollout: dict[str, Any]
    one_step: dict[str, float]
    regimes: dict[str, dict[str, float]]
    growth: dict[str, float | None]
    baselines: dict[str, dict[str, Any]]
    curves: dict[str, list[Any]]
    rollouts: Rollouts = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fields themselves, as plain numbers."""
        return {name: getattr(self, name) for name in asdict(self) if name != "rollouts"}


@accepts_step
def evaluate(
    model: Rate,
    source: Source,
    *,
    integrator: IntegratorLike = euler,
    system: Physics | None = None,
    scale: Sequence[float] | None = None,
    keep: int | Keep = 2,
) -> Evaluation:
    """Roll every trajectory out from its first state and compare.

    States: mean of (û − u)² over trajectories, steps 1…N, channels and points. Energy: mean over trajectories
    and steps of (H(û) − H(u))². Mass: the same of Σ u ΔV, and channels.

    Args:
        model: state → rate; with `integrator=next_state`, state → next state.
        source: the trajectories of the truth.
        integrator: of the rollouts, also one with substeps.
        system: its energy is compared; no energy without it.
        scale: one number per channel by which one-step errors are divided, where channels have different units.
        keep: of how many trajectories the fields are kept, or a `Keep`.

    Returns:
        the errors.
    """
    keep = Keep(keep) if isinstance(keep, int) else keep
    return _evaluate(_Alone(model), source, integrator, system, scale, [keep])[0]


@accepts_step
def evaluate_each(
    models: Stacked,
    source: Source,
    *,
    integrator: IntegratorLike = euler,
    system: Physics | None = None,
    scale: Sequence[float] | None = None,
    keep: int | Keep | Sequence[Keep] = 2,
) -> list[Evaluation]:
    """The evaluation of every member of a stack, to rounding; they are rolled out as one.

    Args:
        models: the members.
        source, integrator, system, scale: as `evaluate` takes them.
        keep: as `evaluate` takes it, or one for every member.
    """
    keep = Keep(keep) if isinstance(keep, int) else keep
    keeps = [keep] * len(models) if isinstance(keep, Keep) else keep
    return _evaluate(models, source, integrator, system, scale, keeps)


OfOne = Float[Tensor, "1 *shape"]


class _Alone:
    """One model under the interface of a stack."""

    device = None

    def __init__(self, model: Rate) -> None:
        self.skeleton = model

    def __len__(self) -> int:
        return 1

    def __call__(self, u: OfOne) -> OfOne:
        return self.skeleton(u[0])[None]

    def shared(self, u: Float[Tensor, "*shape"]) -> OfOne:
        return like_model(self.skeleton, u)[None]

    def rollout(self, integrator: IntegratorLike, first: State, dt: float, steps: int) -> OfOne:
        return rollout(integrator, self.skeleton, like_model(self.skeleton, first), dt, steps)[None]


Models = Stacked | _Alone


def _evaluate(
    models: Models,
    source: Source,
    integrator: IntegratorLike,
    system: Physics | None,
    scale: Sequence[float] | None,
    keeps: Sequence[Keep],
) -> list[Evaluation]:
    if source.trajectories == 0:
        raise ValueError("evaluate: the source holds no trajectory")
    with torch.no_grad(), evaluating(models.skeleton):
        rolled = _roll_out(models, source, integrator, [RolloutTally(source, system, keep) for keep in keeps])
        regimes = Regimes(source.dt, regime_thresholds(_some_speeds(source), Points(source).weights), system)
        stepped = [StepTally(source, regimes, scale, keep) for keep in keeps]
        for indices, truth in _chunks(source, models):
            labels = regimes.of(truth)
            for tally, rates in zip(stepped, _mean_rates(models, integrator, truth, source.dt), strict=True):
                tally.add(indices, truth, rates, labels)
        growths = _growth(models, source, integrator, GROWTH_STATES)
        climatology = _mean_state(source)
        baselines = {
            "persistence": _baseline(source, system, persistence),
            "mean state": _baseline(source, system, climatology.expand_as),
        }
    return [
        Evaluation(
            rollout=rollouts.errors(),
            one_step=steps.errors(),
            regimes=steps.regimes(),
            growth=growth,
            baselines=baselines,
            curves=rollouts.curves(),
            rollouts=Rollouts(*rollouts.fields(), *steps.fields()),
        )
        for rollouts, steps, growth in zip(rolled, stepped, growths, strict=True)
    ]


def persistence(truth: Trajectories) -> Trajectories:
    """The prediction that the first state stays."""
    return truth[:, :1].expand_as(truth)


@accepts_step
@dataclass(frozen=True)
class RolloutValidation:
    """Rolls trajectories out during a training; an object to give to `train(validate=...)`.

    Args:
        source: the validation trajectories.
        integrator: that the model is trained through.
        scale: one number per channel, in whose units the channels count alike for the score; 1 if left out.
        states: at how many states the growth factor is taken; a tenth of it where states are large.
    """

    source: Source
    integrator: IntegratorLike = euler
    scale: Sequence[float] | None = None
    states: int = 5

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", tuple(map(float, self.scale)))

    def __call__(self, model: nn.Module) -> Validation:
        return self._validate(_Alone(model))[0]

    def each(self, models: Stacked) -> list[Validation]:
        """The validation of every member of a stack, to rounding."""
        return self._validate(models)

    def _validate(self, models: Models) -> list[Validation]:
        with torch.no_grad(), evaluating(models.skeleton):
            tallies = [RolloutTally(self.source, None, None, self.scale) for _ in range(len(models))]
            _roll_out(models, self.source, self.integrator, tallies)
            growths = _growth(models, self.source, self.integrator, self.states)
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


def _chunks(source: Source, models: Models | None = None) -> Iterator[tuple[list[int], Trajectories]]:
    """The trajectories, as many at a time as memory allows, in float64; for a stack where it computes."""
    members, device = (1, None) if models is None else (len(models), models.device)
    size = (source.steps + 1) * source.channels * math.prod(source.space)
    count = max(1, CHUNK_NUMBERS // (size * members))
    for start in range(0, source.trajectories, count):
        indices = list(range(start, min(start + count, source.trajectories)))
        yield indices, source.read(indices).to(device, torch.float64)


def _batches(states: State, models: Models) -> Sequence[State]:
    """The states, as many at a time as fit the memory of the hidden layers."""
    return states.split(max(1, BATCH_NUMBERS // (states[0].numel() * len(models))))


def _roll_out(
    models: Models, source: Source, integrator: IntegratorLike, tallies: list[RolloutTally]
) -> list[RolloutTally]:
    """Roll every trajectory out, for each member into its tally."""
    for indices, truth in _chunks(source, models):
        firsts = _batches(truth[:, 0], models)
        predictions = torch.cat([models.rollout(integrator, u, source.dt, source.steps) for u in firsts], 1)
        for tally, prediction in zip(tallies, predictions, strict=True):
            tally.add(indices, truth, prediction.to(truth))
    return tallies


def _mean_rates(
    models: Models, integrator: IntegratorLike, truth: Trajectories, dt: float
) -> Iterator[Float[Tensor, "batch step channel *space"]]:
    """The mean rate over every step of the truth, as every member has it."""
    u = truth[:, :-1]
    pieces = _batches(u.flatten(0, 1), models)
    rates = torch.cat([increment(integrator, models, models.shared(piece), dt) for piece in pieces], 1)
    return (rate.to(truth).reshape(u.shape) for rate in rates)


def _mean_state(source: Source) -> Float[Tensor, "channel *space"]:
    """The climatology, the mean of the truth over trajectories and times: no constant predicts it better."""
    total = torch.zeros(source.shape[2:], dtype=torch.float64)
    for _, truth in _chunks(source):
        total += truth.sum((0, 1))
    return total / (source.trajectories * (source.steps + 1))


def _baseline(source: Source, system: Physics | None, predict: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    tally = RolloutTally(source, system, None)
    for indices, truth in _chunks(source):
        tally.add(indices, truth, predict(truth))
    errors = tally.errors()
    return {name: errors[name] for name in ("states", "energy", "mass") if name in errors}


def _growth(models: Models, source: Source, integrator: IntegratorLike, states: int) -> list[dict[str, float | None]]:
    """Median and largest growth factor of every member."""
    transitions = Transitions(source)
    if source.channels * math.prod(source.space) > DENSE_LIMIT:
        states = max(1, states // 10)
    chosen = torch.linspace(0, len(transitions) - 1, min(states, len(transitions))).round().long()
    u, _ = transitions.fetch(chosen)
    if isinstance(models, Stacked):
        factors = growth_factors(integrator, models, u, source.dt)
    else:
        factors = growth_factor(integrator, models.skeleton, models.shared(u)[0], source.dt)[None]
    numbers = ({"median": row.nanmedian().item(), "max": row.max().item()} for row in factors)
    return [{name: x if math.isfinite(x) else None for name, x in pair.items()} for pair in numbers]


def _some_speeds(source: Source) -> State:
    """|du/dt| at transitions spread evenly over the source, as many as `SPEEDS` allows."""
    stride = math.ceil(source.trajectories * source.steps * source.channels * math.prod(source.space) / SPEEDS)
    speeds = []
    for indices, truth in _chunks(source):
        rate = truth.diff(dim=1).flatten(0, 1) / source.dt
        offset = -indices[0] * source.steps % stride
        speeds.append(rate[offset::stride].abs())
    return torch.cat(speeds)
