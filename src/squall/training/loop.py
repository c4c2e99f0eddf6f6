"""The training loop: minibatches of transitions, one loss, Adam, and somebody who watches."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from squall._process.extras import explain_missing_extra
from squall._types import Score, Validation
from squall.data import Transitions
from squall.integrators import Step, euler, increment, substeps
from squall.losses import ImbalanceAwareLoss
from squall.models.placement import like_model
from squall.training.sampling import Sampler, UniformSampler

__all__ = [
    "Checkpoint",
    "Recorder",
    "TrainingDiverged",
    "TrainingResult",
    "TrainingSettings",
    "train",
]

if TYPE_CHECKING:
    from lightning_fabric import Fabric
else:  # importing it takes as long as importing torch, and who comes for the loss alone does not need it
    Fabric = Any

Residual = Literal["rate", "state"]


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how often.

    Args:
        steps: number of optimiser steps.
        batch: transitions in a minibatch, over all ranks together.
        learning_rate: of Adam.
        residual: what the loss compares: the mean rate over the step, (u' − u)/dt, or the next state u'. The
            squared error of the rate is 1/dt² times that of the state, and a temperature has its unit.
        seed: draws the initial weights and the minibatches.
        log_every: steps between two lines of metrics.
        validate_every: steps between two rollouts of the validation trajectories; 0 for none.
        checkpoint_every: steps between two checkpoints.
    """

    steps: int = 10_000
    batch: int = 200
    learning_rate: float = 1e-3
    residual: Residual = "rate"
    seed: int = 0
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name, least in {
            "steps": 1,
            "batch": 1,
            "log_every": 1,
            "validate_every": 0,
            "checkpoint_every": 1,
            "seed": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"training.{name} is {getattr(self, name)}, but must be at least {least}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"training.learning_rate is {self.learning_rate}, but must be a positive number")
        if self.residual not in get_args(Residual):
            raise ValueError(f"training.residual is {self.residual!r}, but must be one of {get_args(Residual)}")


class TrainingDiverged(RuntimeError):
    """The loss or a weight left the finite numbers at `step`."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what
        super().__init__(
            f"training diverged at step {step}: {what}. A smaller learning rate, a higher temperature, float64 "
            "or normalised data may help"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingDiverged, (self.step, self.what)


@dataclass(frozen=True)
class Checkpoint:
    """A training after `step` steps: the weights, and all else that the rest of it depends on."""

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


class Recorder:
    """Watches a training, and may hand it the checkpoint to go on from. This one does neither."""

    def resume(self) -> Checkpoint | None:
        """The checkpoint to go on from."""
        return None

    def resume_best(self) -> Checkpoint | None:
        """The best checkpoint until then."""
        return None

    def stopping(self) -> bool:
        """Whether to save and stop before the next step."""
        return False

    def stepped(self, step: int) -> None:
        """`step` steps are done."""

    def logged(self, metrics: dict[str, Any]) -> None:
        """A line of metrics."""

    def saved(self, checkpoint: Checkpoint) -> None:
        """The latest checkpoint."""

    def improved(self, checkpoint: Checkpoint, validation: Validation) -> None:
        """The checkpoint that rolls out best so far."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained model.

    `model` holds the last weights and `best`, after a validation, those that rolled out best, with the step
    they come from; `history` is every line of metrics. `finished` is false after a stop that was asked for.
    """

    model: nn.Module
    step: int
    finished: bool
    history: list[dict[str, Any]]
    best: Checkpoint | None


class _Increment(nn.Module):
    """The mean rate over one step as one module, so that a wrapper such as DDP sees one forward pass."""

    def __init__(self, model: nn.Module, step: Step, dt: float) -> None:
        super().__init__()
        self.model, self.step, self.dt = model, step, dt

    def forward(self, u: Tensor, counts: Tensor | None = None) -> Tensor:
        """Over one step, or, where `counts` (batch,) says so, over several shorter steps that cover it."""
        if counts is None:
            return increment(self.step, self._predict, u, self.dt)
        found = torch.empty_like(u)
        for count in counts.unique().tolist():
            chosen = counts == count
            found[chosen] = increment(substeps(self.step, count), self._predict, u[chosen], self.dt)
        return found

    def _predict(self, u: Tensor) -> Tensor:
        found = self.model(u)
        if found.shape != u.shape:
            raise ValueError(
                f"the model maps states of shape {tuple(u.shape)} to {tuple(found.shape)}, but must keep the shape "
                "(batch, channel, *space)"
            )
        return found


def train(
    model: nn.Module,
    transitions: Transitions,
    settings: TrainingSettings | None = None,
    *,
    loss: nn.Module | None = None,
    step: Step = euler,
    scale: Sequence[float] | None = None,
    sampler: Sampler | None = None,
    substeps: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    validate: Callable[[nn.Module], Validation] | None = None,
    recorder: Recorder | None = None,
    fabric: Fabric | None = None,
) -> TrainingResult:
    """Train a model on one-step transitions, u' ≈ u + dt Φ(u), with Φ the increment of `step`.

    Args:
        model: any module from a state to its rate (or, with `step=next_state`, to the next state). It is
            trained in place.
        transitions: the training pairs (u, u').
        settings: steps, minibatch, learning rate, residual, seed and how often to log, validate and save.
        loss: `loss(prediction, target)`; the imbalance-aware loss with its default budget if left out.
        step: the integrator that the model is trained through.
        scale: one number per channel by which residuals are divided before the loss sees them, so that
            channels of different units weigh alike.
        sampler: which transitions make the minibatch of a step; uniform if left out.
        substeps: how many steps of `step` cover dt, one number per transition; 1 if left out.
        optimizer: over the model's parameters; Adam if left out.
        validate: called with the model every `settings.validate_every` steps.
        recorder: told of every step, log line and checkpoint; says where to resume.
        fabric: device, precision and processes; one process on the CPU if left out.

    Returns:
        the result, with the trained model in it.

    Raises:
        TrainingDiverged: if the loss or a weight leaves the finite numbers.
    """
    settings = settings or TrainingSettings()
    recorder = recorder or Recorder()
    fabric = fabric or one_process()
    sampler = sampler or UniformSampler(len(transitions), settings.batch, settings.seed)
    loss = (loss or ImbalanceAwareLoss()).to(fabric.device)
    predict: Any
    update: Any
    optimizer = optimizer or adam(model.parameters(), settings, fabric.device)
    predict, update = fabric.setup(_Increment(model, step, transitions.dt), optimizer)
    trial = Course(model, update, loss, recorder, fabric)

    with _private_randomness(settings.seed, fabric.device):
        trial.resume()
        model.train()
        started = time.monotonic() - trial.seconds
        while trial.step < settings.steps and not _stopping(recorder, fabric):
            mine = sampler(trial.step)[fabric.global_rank :: fabric.world_size]
            u, target = pair(transitions, mine, settings.residual)
            u, target = like_model(model, u), like_model(model, target)
            prediction = predict(u) if substeps is None else predict(u, substeps[mine].to(u.device))
            if settings.residual == "state":
                prediction = u + transitions.dt * prediction
            value = _loss_value(loss, prediction, target, scale or (1.0,), trial.step + 1)

            update.zero_grad()
            fabric.backward(value)
            update.step()
            trial.step += 1
            trial.seconds = time.monotonic() - started

            recorder.stepped(trial.step)
            last = trial.step == settings.steps
            if last or trial.step % settings.log_every == 0:
                trial.log({"loss": value.item(), **_report(loss)})
            if validate and settings.validate_every and (last or trial.step % settings.validate_every == 0):
                trial.validate(validate)
            if last or trial.step % settings.checkpoint_every == 0:
                trial.save()

        finished = trial.step >= settings.steps
        if not finished:
            trial.save()
    model.eval()
    return TrainingResult(model, trial.step, finished, trial.history, trial.best)


@dataclass
class Course:
    """A training under way: what it has, where it stands, and how that is saved and restored."""

    model: nn.Module
    optimizer: Any
    loss: nn.Module
    recorder: Recorder
    fabric: Fabric
    step: int = 0
    seconds: float = 0.0
    score: Score | None = None
    best: Checkpoint | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def log(self, metrics: dict[str, Any]) -> None:
        line = {"step": self.step, **metrics, "seconds": round(self.seconds, 3)}
        self.history.append(line)
        self.recorder.logged(line)

    def validate(self, validate: Callable[[nn.Module], Validation]) -> None:
        self.model.eval()
        found = validate(self.model)
        self.model.train()
        self.validated(found)

    def validated(self, found: Validation) -> None:
        self.log({"validation": dict(found.metrics)})
        if self.score is None or found.score < self.score:
            self.score = found.score
            self.best = self.checkpoint()
            self.recorder.improved(self.best, found)

    def save(self) -> None:
        self.recorder.saved(self.checkpoint())

    def checkpoint(self) -> Checkpoint:
        weights = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.state_dict().items()
        }
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise TrainingDiverged(self.step, f"the weight {name!r} is not finite")
        state = {
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "loss": copy.deepcopy(self.loss.state_dict()),
            "random": _random_state(self.fabric.device),
            "precision": copy.deepcopy(self.fabric.strategy.precision.state_dict()),
            "seconds": self.seconds,
            "score": self.score and (self.score.diverged, self.score.error),
        }
        return Checkpoint(self.step, weights, state)

    def resume(self) -> None:
        checkpoint = self.recorder.resume()
        if checkpoint is None:
            return
        self.model.load_state_dict(checkpoint.weights)
        load_optimizer(self.optimizer, checkpoint.state["optimizer"])
        self.loss.load_state_dict(checkpoint.state["loss"])
        self.fabric.strategy.precision.load_state_dict(checkpoint.state["precision"])
        _set_random_state(checkpoint.state["random"], self.fabric.device)
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.score = checkpoint.state["score"] and Score(*checkpoint.state["score"])
        self.best = self.recorder.resume_best()


@explain_missing_extra()
def one_process() -> Fabric:
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1)


def adam(
    parameters: Iterable[Tensor], settings: TrainingSettings, device: torch.device, *, replayed: bool = False
) -> torch.optim.Optimizer:
    """Adam, in one pass on a CPU over plain parameters: that pass knows no complex numbers and no strides.

    `replayed`: as part of a CUDA graph, likewise in one pass, which counts its steps on the device.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("the model has no parameters: there is nothing to train")
    plain = all(p.is_floating_point() and p.is_contiguous() for p in parameters)
    fused = plain and (replayed or device.type == "cpu")
    return torch.optim.Adam(parameters, settings.learning_rate, fused=fused or None, capturable=replayed)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Load what another run of this or an earlier version saved, for how this one computes."""
    bare = getattr(optimizer, "optimizer", optimizer)  # within the one of Fabric
    fused = [group.get("fused") for group in bare.param_groups]
    optimizer.load_state_dict(state)
    for group, ours in zip(bare.param_groups, fused, strict=True):
        if "fused" in group:
            group["fused"] = ours
    for parameter, values in bare.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _stopping(recorder: Recorder, fabric: Fabric) -> bool:
    """Whether any process was asked to stop: all stop at the same step."""
    asked = recorder.stopping()
    if fabric.world_size == 1:
        return asked
    return bool(fabric.all_reduce(torch.tensor(float(asked), device=fabric.device), reduce_op="sum"))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _private_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """What a model draws (dropout) follows the seed, and the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def pair(transitions: Transitions, indices: Tensor, residual: Residual) -> tuple[Tensor, Tensor]:
    """States and what is to be predicted, in the precision of the data: float32 differences lose digits."""
    u, u_next = transitions.fetch(indices)
    return u, residual_of(u, u_next, transitions.dt, residual)


def residual_of(u: Tensor, u_next: Tensor, dt: float, residual: Residual) -> Tensor:
    """What is to be predicted of a transition: the mean rate over the step, or the next state."""
    return (u_next - u) / dt if residual == "rate" else u_next


def _loss_value(loss: nn.Module, prediction: Tensor, target: Tensor, scale: Sequence[float], step: int) -> Tensor:
    unit = prediction.new_tensor(scale).reshape(-1, *[1] * (prediction.dim() - 2))
    try:
        value = loss(prediction / unit, target / unit)
    except ValueError as error:  # the shapes fit: some number is not finite
        raise TrainingDiverged(step, str(error)) from error
    if not torch.isfinite(value):
        raise TrainingDiverged(step, f"the loss is {value.item()}")
    return value


def _report(loss: nn.Module) -> dict[str, float]:
    report = getattr(loss, "report", None)
    return {} if report is None else {name: x for name, x in report().items() if isinstance(x, float)}
