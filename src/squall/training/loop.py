"""The training loop, for one model and for many as one batch: advance, log, validate, save, resume."""

import abc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from squall._types import State, Validation
from squall.data import Transitions
from squall.integrators import Array, IntegratorLike, accepts_step, euler, increment, substeps
from squall.losses import ImbalanceAwareLoss
from squall.models.placement import like_model
from squall.training.sampling import Sampler, UniformSampler
from squall.training.state import (
    Checkpoint,
    Recorder,
    Residual,
    Training,
    TrainingDiverged,
    TrainingResult,
    TrainingSettings,
    adam,
    one_process,
    private_randomness,
)

__all__ = ["Checkpoint", "Recorder", "TrainingDiverged", "TrainingResult", "TrainingSettings", "train"]

if TYPE_CHECKING:
    from lightning_fabric import Fabric
else:  # importing it takes as long as importing torch
    Fabric = Any


Unit = Float[Tensor, "channel *ones"]


class Stepper(abc.ABC):
    """Advances trainings that stand at one step: a single model, or many as a stack.

    Args:
        trainings: resumed.
        at_once: the most steps between two looks at the losses, and at whether to stop.
    """

    def __init__(self, trainings: Sequence[Training], at_once: int = 1) -> None:
        self.trainings, self.at_once = trainings, at_once

    @abc.abstractmethod
    def advance(self, step: int, count: int) -> Float[Tensor, "step training"]:
        """The losses of the `count` steps after `step`; not finite where a training diverged.

        Raises:
            TrainingDiverged: in place of such a loss, where there is more to say.
        """

    def metrics(self) -> dict[str, float]:
        """What is logged beside the loss."""
        return {}

    def pull(self, step: int) -> None:  # noqa: B027
        """Bring the models and optimisers of the trainings to where `advance` left them."""

    def validations(self) -> list[Validation | None]:
        """Of every training, by its own `validate`."""
        return [training.validation() for training in self.trainings]


def run_loop(
    stepper: Stepper, settings: TrainingSettings, writer: Executor | None = None
) -> list[TrainingResult | TrainingDiverged]:
    """Advance trainings until all steps are done, a recorder asks to stop, or all diverged.

    Args:
        stepper: the trainings.
        settings: how long, and how often to log, validate and save.
        writer: lets the recorders write while the next steps are computed; the models of the trainings must then
            change in `pull` alone.

    Returns:
        for each training its result, or what it diverged by: the others go on without it.
    """
    trainings = stepper.trainings
    step, pending = trainings[0].step, None
    started = time.monotonic() - max(training.seconds for training in trainings)
    while step < settings.steps and not _stopping(trainings) and not all(training.diverged for training in trainings):
        losses = stepper.advance(step, _until_due(step, settings, stepper.at_once))
        step += len(losses)
        last = step == settings.steps
        logs, saves = (last or step % every == 0 for every in (settings.log_every, settings.checkpoint_every))
        validates = settings.validate_every > 0 and (last or step % settings.validate_every == 0)
        if pending:
            pending.result()
        _take_losses(stepper, step, losses, time.monotonic() - started, logs)
        if validates or saves:
            stepper.pull(step)
            validations = stepper.validations() if validates else [None] * len(trainings)
            if writer:
                pending = writer.submit(_record, trainings, validations, saves)
            else:
                _record(trainings, validations, saves)
    if pending:
        pending.result()
    stepper.pull(step)
    finished = step >= settings.steps
    if not finished:
        _record(trainings, [None] * len(trainings), save=True)
    return [_result(training, finished) for training in trainings]


def _until_due(step: int, settings: TrainingSettings, most: int) -> int:
    """Steps until something is to be logged, validated or saved, or `most`."""
    periods = [p for p in (settings.log_every, settings.checkpoint_every, settings.validate_every) if p]
    return min(most, settings.steps - step, *(p - step % p for p in periods))


def _take_losses(
    stepper: Stepper, step: int, losses: Float[Tensor, "step training"], seconds: float, logs: bool
) -> None:
    """Tell every training its losses up to `step`."""
    finite = losses.isfinite()
    fine = finite.all(0).tolist()
    for i, training in enumerate(stepper.trainings):
        if training.diverged:
            continue
        if not fine[i]:
            first = step - len(losses) + 1 + int(finite[:, i].logical_not().nonzero()[0])
            training.diverged = TrainingDiverged(first, "the prediction became NaN or infinite")
            continue
        training.step, training.seconds = step, seconds
        training.recorder.stepped(step)
        if logs:
            training.log({"loss": losses[-1, i].item(), **stepper.metrics()})


def _record(trainings: Sequence[Training], validations: Sequence[Validation | None], save: bool) -> None:
    for training, validation in zip(trainings, validations, strict=True):
        training.record(validation, save)


def _result(training: Training, finished: bool) -> TrainingResult | TrainingDiverged:
    training.model.eval()
    result = TrainingResult(training.model, training.step, finished, training.history, training.best)
    return training.diverged or result


@accepts_step
def train(
    model: nn.Module,
    transitions: Transitions,
    settings: TrainingSettings | None = None,
    *,
    loss: nn.Module | None = None,
    integrator: IntegratorLike = euler,
    scale: Sequence[float] | None = None,
    sampler: Sampler | None = None,
    substeps: Int[Tensor, " transition"] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    validate: Callable[[nn.Module], Validation] | None = None,
    recorder: Recorder | None = None,
    fabric: Fabric | None = None,
) -> TrainingResult:
    """Train a model on one-step transitions, u' ≈ u + dt Φ(u), with Φ the increment of the integrator.

    Args:
        model: any module from a state to its rate (or, with `integrator=next_state`, to the next state). It is
            trained in place.
        transitions: the training pairs (u, u').
        settings: steps, minibatch, learning rate, residual, seed and how often to log, validate and save.
        loss: `loss(prediction, target)`; the imbalance-aware loss with its default budget if left out.
        integrator: that the model is trained through.
        scale: one number per channel by which residuals are divided before the loss sees them, so that
            channels of different units weigh alike.
        sampler: which transitions make the minibatch of a step; uniform if left out.
        substeps: how many steps of the integrator cover dt, one number per transition; 1 if left out.
        optimizer: over the model's parameters; Adam if left out.
        validate: called with the model every `settings.validate_every` steps.
        recorder: receives every step, log line and checkpoint, and gives the checkpoint to resume from.
        fabric: device, precision and processes; one process on the CPU if left out.

    Returns:
        the result, with the trained model in it.

    Raises:
        TrainingDiverged: if the loss or a weight becomes NaN or infinite.
    """
    settings = settings or TrainingSettings()
    fabric = fabric or one_process()
    sampler = sampler or UniformSampler(len(transitions), settings.batch, settings.seed)
    loss = (loss or ImbalanceAwareLoss()).to(fabric.device)
    optimizer = optimizer or adam(model.parameters(), settings, fabric.device)
    predict: Any
    predict, update = fabric.setup(_Increment(model, integrator, transitions.dt), optimizer)
    training = Training(model, update, loss, recorder or Recorder(), fabric, validate)
    with private_randomness(settings.seed, fabric.device):
        training.resume()
        stepper = _SingleModel(training, predict, Pairs(transitions, settings.residual, scale), sampler, substeps)
        (result,) = run_loop(stepper, settings)
    if isinstance(result, TrainingDiverged):
        raise result
    return result


class _SingleModel(Stepper):
    """One model, in as many processes as its fabric has."""

    def __init__(
        self, training: Training, predict: nn.Module, pairs: "Pairs", sampler: Sampler, substeps: Tensor | None
    ) -> None:
        super().__init__([training])
        self.training, self.predict, self.pairs = training, predict, pairs
        self.sampler, self.substeps = sampler, substeps
        self.unit = like_model(training.model, pairs.unit)

    def advance(self, step: int, count: int) -> Float[Tensor, "step training"]:
        model, fabric, update = self.training.model, self.training.fabric, self.training.optimizer
        mine = self.sampler(step)[fabric.global_rank :: fabric.world_size]
        u, target = (like_model(model, x) for x in self.pairs.fetch(mine))
        rate = self.predict(u) if self.substeps is None else self.predict(u, self.substeps[mine].to(u.device))
        value = self._loss(*self.pairs.compared(rate, u, target, self.unit), step + 1)
        update.zero_grad()
        fabric.backward(value)
        update.step()
        return value.detach().reshape(1, 1).cpu()

    def _loss(self, prediction: State, target: State, step: int) -> Float[Tensor, ""]:
        try:
            value = self.training.loss(prediction, target)
        except ValueError as error:  # the shapes fit: some number is not finite
            raise TrainingDiverged(step, str(error)) from error
        if not torch.isfinite(value):
            raise TrainingDiverged(step, f"the loss is {value.item()}")
        return value

    def metrics(self) -> dict[str, float]:
        report = getattr(self.training.loss, "report", dict)
        return {name: x for name, x in report().items() if isinstance(x, float)}


class _Increment(nn.Module):
    """The mean rate over one step as one module, so that a wrapper such as DDP sees one forward pass."""

    def __init__(self, model: nn.Module, integrator: IntegratorLike, dt: float) -> None:
        super().__init__()
        self.model, self.integrator, self.dt = model, integrator, dt

    def forward(self, u: State, counts: Int[Tensor, " batch"] | None = None) -> State:
        """Over one step, or, where `counts` says so, over several shorter steps that cover it."""
        if counts is None:
            return increment(self.integrator, self._rate, u, self.dt)
        rates = torch.empty_like(u)
        for count in counts.unique().tolist():
            chosen = counts == count
            rates[chosen] = increment(substeps(self.integrator, count), self._rate, u[chosen], self.dt)
        return rates

    def _rate(self, u: State) -> State:
        rate = self.model(u)
        if rate.shape != u.shape:
            raise ValueError(
                f"the model maps states of shape {tuple(u.shape)} to {tuple(rate.shape)}, but must keep the shape "
                "(batch, channel, *space)"
            )
        return rate


class Pairs:
    """What the loss compares: rates or next states of transitions, divided by the scale of their channel."""

    def __init__(self, transitions: Transitions, residual: Residual, scale: Sequence[float] | None) -> None:
        self.transitions, self.dt, self.residual = transitions, transitions.dt, residual
        unit = torch.tensor(scale or (1.0,), dtype=torch.float64)
        self.unit = unit.reshape(-1, *[1] * len(transitions.source.space))

    def fetch(self, indices: Int[Tensor, " batch"]) -> tuple[State, State]:
        """States and targets in the precision of the data: float32 differences lose digits."""
        u, u_next = self.transitions.fetch(indices)
        return u, self.target(u, u_next)

    def target(self, u: State, u_next: State) -> State:
        """The mean rate over the step, or the next state."""
        return (u_next - u) / self.dt if self.residual == "rate" else u_next

    def compared(self, rate: Array, u: Array, target: Array, unit: Unit) -> tuple[Array, Array]:
        """Prediction and target, (..., batch, channel, *space), for the loss; `unit` where and as they are."""
        prediction = u + self.dt * rate if self.residual == "state" else rate
        return prediction / unit, target / unit


def _stopping(trainings: Sequence[Training]) -> bool:
    """Whether a recorder of any process asks to stop: all stop at the same step."""
    stopping, fabric = any(training.recorder.stopping() for training in trainings), trainings[0].fabric
    if fabric.world_size == 1:
        return stopping
    return bool(fabric.all_reduce(torch.tensor(float(stopping), device=fabric.device), reduce_op="sum"))
