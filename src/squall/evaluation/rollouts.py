"""How well a model predicts: rollouts against the truth, one-step errors, regimes, stability, and baselines.

Every error is a mean of squares unless its name says otherwise. A rollout that becomes NaN or infinite is diverged: it
is counted, and a mean over rollouts of which one diverged is `None`, never a number without it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from squall._types import Rate, Score, Trajectories, Validation
from squall.data import Description, Source
from squall.evaluation.exchange import to_xarray
from squall.evaluation.pieces import pieces
from squall.evaluation.points import Points
from squall.evaluation.regimes import regime_thresholds
from squall.evaluation.rolling import Alone, Models, Task, chunks, growth, mean_rates, roll_out, sample
from squall.evaluation.scores import ScoreTally, Scoring
from squall.evaluation.tallies import Keep, Physics, Regimes, Rollouts, RolloutTally, StepTally
from squall.integrators import IntegratorLike, accepts_step, euler
from squall.models.inputs import Inputs
from squall.models.placement import evaluating
from squall.models.stacked import Stacked

if TYPE_CHECKING:
    import xarray

GROWTH_STATES = 20
"""At how many states, spread evenly over the trajectories, the learned step is linearised; a tenth of it where
the states are too large for their whole Jacobian."""


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
        scores: by field: `nrmse` (mean over trajectories) and `nrmse_p99` (the 99th percentile of them), `valid_time`
            (median over trajectories), `spectrum` by band (else `no_spectrum` says why not), `events`; `conserved`
            quantities; and `storms`, where a field for them is named. See `squall.evaluation.scores`.
        growth: `median` and `max` over states of the growth factor of the learned step.
        baselines: the rollout errors and scores of persistence and of the climatology (`mean state`).
        curves: errors, scores and energies over lead time.
        rollouts: some of the predictions, for figures.
        description: names, units and axes of the fields.
    """

    rollout: dict[str, Any]
    one_step: dict[str, float]
    regimes: dict[str, dict[str, float]]
    scores: dict[str, Any]
    growth: dict[str, float | None]
    baselines: dict[str, dict[str, Any]]
    curves: dict[str, Any]
    rollouts: Rollouts = field(repr=False)
    description: Description = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fields themselves, as plain numbers."""
        names = (item.name for item in fields(self))
        return {name: getattr(self, name) for name in names if name not in ("rollouts", "description")}

    def to_xarray(self) -> "xarray.Dataset":
        """The kept fields and the scores by lead time as an `xarray.Dataset`, with coordinates and units."""
        return to_xarray(self)


@accepts_step
def evaluate(
    model: Rate,
    source: Source,
    *,
    integrator: IntegratorLike = euler,
    system: Physics | None = None,
    scale: Sequence[float] | None = None,
    keep: int | Keep = 2,
    inputs: Inputs = Inputs(),  # noqa: B008
    steps: int | None = None,
    stride: int | None = None,
    scoring: Scoring = Scoring(),  # noqa: B008
) -> Evaluation:
    """Roll out from the first state of every trajectory, or from many times of it, and compare.

    States: mean of (û − u)² over trajectories, steps 1…N, channels and points. Energy: mean over trajectories
    and steps of (H(û) − H(u))². Mass: the same of Σ u ΔV, and channels. Means over points count a point by its area,
    and leave masked points out; masked points are held in a rollout.

    Args:
        model: state → rate; with `integrator=next_state`, state → next state.
        source: the trajectories of the truth.
        integrator: of the rollouts, also one with substeps.
        system: its energy is compared; no energy without it.
        scale: one number per channel by which one-step errors are divided, where channels have different units.
        keep: of how many trajectories the fields are kept, or a `Keep`.
        inputs: the past states and conditions that the model sees beside the present state.
        steps: of a rollout; by default whole trajectories. Where they have gaps, or are a part in time of a single one,
            pieces of at most half their length, from eight starts or more.
        stride: distance of the starts, in states; by default pieces of given `steps` do not overlap.
        scoring: what is an event, until when a forecast is valid, which quantities are conserved.

    Returns:
        the errors.

    Raises:
        squall.data.DataError: where the trajectories are too short, or lack a condition.
    """
    keep = Keep(keep) if isinstance(keep, int) else keep
    task = _task(source, integrator, inputs, steps, stride)
    return _evaluate(Alone(model), task, system, scale, [keep], scoring)[0]


@accepts_step
def evaluate_each(
    models: Stacked,
    source: Source,
    *,
    integrator: IntegratorLike = euler,
    system: Physics | None = None,
    scale: Sequence[float] | None = None,
    keep: int | Keep | Sequence[Keep] = 2,
    inputs: Inputs = Inputs(),  # noqa: B008
    steps: int | None = None,
    stride: int | None = None,
    scoring: Scoring = Scoring(),  # noqa: B008
) -> list[Evaluation]:
    """The evaluation of every member of a stack, to rounding.

    They are rolled out as one; where they see more than the present state or points are masked, one after the other.

    Args:
        models: the members.
        source, integrator, system, scale, inputs, steps, stride, scoring: as `evaluate` takes them.
        keep: as `evaluate` takes it, or one for every member.
    """
    keep = Keep(keep) if isinstance(keep, int) else keep
    keeps = [keep] * len(models) if isinstance(keep, Keep) else keep
    task = _task(source, integrator, inputs, steps, stride)
    parts = _parts(models, task)
    if len(parts) == 1:
        return _evaluate(models, task, system, scale, keeps, scoring)
    with evaluating(models.skeleton):
        pairs = zip(parts, keeps, strict=True)
        return [_evaluate(part, task, system, scale, [keep], scoring)[0] for part, keep in pairs]


def _task(source: Source, integrator: IntegratorLike, inputs: Inputs, steps: int | None, stride: int | None) -> Task:
    if source.trajectories == 0:
        raise ValueError("evaluate: the source holds no trajectory: give one with at least one")
    return Task(pieces(source, inputs.history, steps, stride), integrator, inputs)


def _parts(models: Models, task: Task) -> Sequence[Models]:
    """What is rolled out together."""
    if isinstance(models, Stacked) and not task.plain:
        return [Alone(models.member(i), models) for i in range(len(models))]
    return [models]


def _evaluate(
    models: Models,
    task: Task,
    system: Physics | None,
    scale: Sequence[float] | None,
    keeps: Sequence[Keep],
    scoring: Scoring,
) -> list[Evaluation]:
    truth = task.truth
    with torch.no_grad(), evaluating(models.skeleton):
        some, speeds = sample(truth)
        climatology = _mean_state(truth)

        def scores() -> ScoreTally:
            return ScoreTally(truth, scoring, some, climatology)

        rolled = [RolloutTally(truth, system, keep, scores=scores()) for keep in keeps]
        roll_out(models, task, rolled)
        regimes = Regimes(truth.dt, regime_thresholds(speeds, Points(truth).weights), system)
        stepped = [StepTally(truth, regimes, scale, keep) for keep in keeps]
        for indices, states in chunks(task.source, models):
            later = states[:, task.inputs.history - 1 :]
            labels = regimes.of(later)
            for tally, rates in zip(stepped, mean_rates(models, task, indices, states), strict=True):
                tally.add(indices, later, rates, labels)
        growths = growth(models, task, GROWTH_STATES)
        baselines = {
            "persistence": _baseline(truth, system, persistence, scores()),
            "mean state": _baseline(truth, system, climatology.expand_as, scores()),
        }
    return [
        Evaluation(
            rollout=rollouts.errors(),
            one_step=steps.errors(),
            regimes=steps.regimes(),
            scores=rollouts.scores.scores() if rollouts.scores else {},
            growth=factors,
            baselines=baselines,
            curves=rollouts.curves(),
            rollouts=Rollouts(**rollouts.fields(), **steps.fields()),
            description=truth.description,
        )
        for rollouts, steps, factors in zip(rolled, stepped, growths, strict=True)
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
        inputs, steps, stride: as `evaluate` takes them.
        picture: keep truth and prediction of the first trajectory, at some of the times.
    """

    source: Source
    integrator: IntegratorLike = euler
    scale: Sequence[float] | None = None
    states: int = 5
    inputs: Inputs = Inputs()  # noqa: RUF009
    steps: int | None = None
    stride: int | None = None
    picture: bool = False

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", tuple(map(float, self.scale)))

    def __call__(self, model: nn.Module) -> Validation:
        return self._validate(Alone(model))[0]

    def each(self, models: Stacked) -> list[Validation]:
        """The validation of every member of a stack, to rounding."""
        return self._validate(models)

    def _validate(self, models: Models) -> list[Validation]:
        task = _task(self.source, self.integrator, self.inputs, self.steps, self.stride)
        validations = []
        times = 128 if len(self.source.space) == 1 else 4
        keep = Keep(1, times, ("truth", "prediction")) if self.picture else None
        with torch.no_grad(), evaluating(models.skeleton):
            for part in _parts(models, task):
                tallies = [RolloutTally(task.truth, None, keep, self.scale) for _ in range(len(part))]
                roll_out(part, task, tallies)
                growths = growth(part, task, self.states)
                pairs = zip(tallies, growths, strict=True)
                validations += [_validation(tally, factors["max"]) for tally, factors in pairs]
        return validations


def _validation(tally: RolloutTally, growth: float | None) -> Validation:
    errors = tally.errors()
    error = errors["scaled_of_finite"]
    score = Score(errors["diverged"], math.inf if error is None else error)
    metrics = {
        "rollout_states": errors["states"],
        "rollout_states_of_finite": errors["states_of_finite"],
        "score": error,
        "diverged": errors["diverged"],
        "growth_factor": growth,
    }
    fields = tally.fields()
    picture = (fields["truth"][0], fields["prediction"][0]) if "truth" in fields else None
    return Validation(score, metrics, picture)


def _mean_state(source: Source) -> Float[Tensor, "channel *space"]:
    """The climatology, the mean of the truth over trajectories and times: no constant predicts it better."""
    total = torch.zeros(source.shape[2:], dtype=torch.float64)
    for _, truth in chunks(source):
        total += truth.sum((0, 1))
    return total / (source.trajectories * (source.steps + 1))


def _baseline(
    source: Source, system: Physics | None, predict: Callable[[Tensor], Tensor], scores: ScoreTally
) -> dict[str, Any]:
    """The errors and scores of a rollout, of which each is a number or numbers by field."""
    tally = RolloutTally(source, system, None, scores=scores)
    for indices, truth in chunks(source):
        tally.add(indices, truth, predict(truth).to(truth))
    errors = tally.errors()
    return {name: errors[name] for name in ("states", "energy", "mass", "vrmse") if name in errors} | scores.scores()
