"""The training loop, for one model and for many as one batch: advance, log, validate, save, resume."""

import abc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from squall._types import Validation
from squall.data import Transitions
from squall.integrators import Implicit, IntegratorLike, accepts_step, euler
from squall.losses import ImbalanceAwareLoss, MeanSquaredError
from squall.losses.accumulate import Accumulation
from squall.losses.distributed import RefusedElsewhere
from squall.models.placement import like_model
from squall.training.batches import Batch, Batches, beside, refuse_without_leads, takes
from squall.training.noise import gradient_noise
from squall.training.sampling import Sampler, UniformSampler
from squall.training.settings import TrainingSettings, adam, learning_rate_at
from squall.training.sharded import shard
from squall.training.state import (
    Checkpoint,
    Recorder,
    Training,
    TrainingDiverged,
    TrainingResult,
    averaged,
    draw_randomness,
    load_state,
    one_process,
    private_randomness,
    random_state,
    set_random_state,
)
from squall.training.unrolled import Unrolled

__all__ = ["Checkpoint", "Recorder", "TrainingDiverged", "TrainingResult", "TrainingSettings", "refuse_shared", "train"]

if TYPE_CHECKING:
    from lightning_fabric import Fabric
else:  # importing it takes as long as importing torch
    Fabric = Any


class Stepper(abc.ABC):
    """Advances resumed trainings that stand at one step: a single model, or many as a stack.

    There are at most `at_once` steps between two looks at the losses, and at whether to stop.
    """

    def __init__(self, trainings: Sequence[Training], at_once: int = 1) -> None:
        self.trainings, self.at_once = trainings, at_once

    @abc.abstractmethod
    def advance(self, step: int, count: int) -> Float[Tensor, "step training"]:
        """The losses of the `count` steps after `step`; not finite where a training diverged.

        Raises:
            TrainingDiverged: in place of such a loss, where there is more to say.
        """

    @abc.abstractmethod
    def metrics(self) -> list[dict[str, float]]:
        """What is logged of every training."""

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
    while not _ended(trainings, step, settings) and not _stopping(trainings):
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
    if step < settings.steps:
        _record(trainings, [None] * len(trainings), save=True)
    finished = step >= settings.steps or _out_of_patience(trainings, settings)
    return [_result(training, finished) for training in trainings]


def _ended(trainings: Sequence[Training], step: int, settings: TrainingSettings) -> bool:
    over = step >= settings.steps or _out_of_patience(trainings, settings)
    return over or all(training.diverged for training in trainings)


def _out_of_patience(trainings: Sequence[Training], settings: TrainingSettings) -> bool:
    return settings.patience > 0 and all(training.unimproved >= settings.patience for training in trainings)


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
    metrics = stepper.metrics() if logs else []
    for i, training in enumerate(stepper.trainings):
        if training.diverged:
            continue
        if not fine[i]:
            first = step - len(losses) + 1 + int(finite[:, i].logical_not().nonzero()[0])
            training.diverged = TrainingDiverged(first, "the prediction became NaN or infinite")
            continue
        training.step, training.seconds = step, seconds
        if logs:  # first: whoever shows the step shows the loss with it
            training.log({"loss": losses[-1, i].item(), **metrics[i]})
        training.recorder.stepped(step)


def _record(trainings: Sequence[Training], validations: Sequence[Validation | None], save: bool) -> None:
    for training, validation in zip(trainings, validations, strict=True):
        training.record(validation, save)


def _result(training: Training, finished: bool) -> TrainingResult | TrainingDiverged:
    if training.average is not None:
        load_state(training.model, training.average.module.state_dict())
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
    conditions: tuple[str, ...] = (),
) -> TrainingResult:
    """Train a model on transitions, u' ≈ u + dt Φ(u), with Φ the increment of the integrator, or on several steps.

    Masked points get no weight, and cells count by their areas, where the data have masks or areas.

    Args:
        model: any module from a state to its rate (or, with `integrator=next_state`, to the next state), or from
            several states and conditions (batch, history · channel + condition, *space). It is trained in place.
        transitions: the training windows: as many next states as `settings.unroll`, and the history that the model
            takes.
        settings: how long, how often and how.
        loss: `loss(prediction, target)`, with `mask`, `measure` and `index` (of the transitions) where it takes them;
            the imbalance-aware loss with its default budget if left out.
        integrator: that the model is trained through. An implicit one takes the next state of the data for that of its
            equation, so that a step costs one evaluation, unless several steps are unrolled or `substeps` given.
        scale: one number per channel by which residuals are divided before the loss sees them, so that
            channels of different units weigh alike.
        sampler: which transitions make the minibatch of a step; uniform if left out.
        substeps: how many steps of the integrator cover dt, one number per transition; 1 if left out.
        optimizer: over the model's parameters; Adam if left out.
        validate: called with the model every `settings.validate_every` steps.
        recorder: receives every step, log line and checkpoint, and gives the checkpoint to resume from.
        fabric: device, precision and processes, launched; one process on the CPU if left out. Several processes share
            every minibatch and train what one would, to rounding.
        conditions: names of the conditions that the model takes, in the order of its channels.

    Returns:
        the result, with the trained model in it.

    Raises:
        TrainingDiverged: if the loss or a weight becomes NaN or infinite.
        ValueError: if the loss, the transitions or the validation do not fit the settings.
    """
    settings = settings or TrainingSettings()
    _refuse_misfits(settings, transitions, loss, validate)
    fabric = fabric or one_process()
    sampler = sampler or UniformSampler(len(transitions), settings.batch, settings.seed)
    loss = (loss or ImbalanceAwareLoss()).to(fabric.device)
    refuse_shared(settings, loss, fabric.world_size)
    batches = Batches(transitions, settings, scale, conditions)
    unrolled = Unrolled(model, integrator, transitions.dt, settings, transitions.source.mask)
    predict, update, average = _placed(unrolled, optimizer, settings, fabric)
    training = Training(model, update, loss, recorder or Recorder(), fabric, validate, average)
    rates = [group["lr"] for group in update.param_groups]
    with private_randomness(settings.seed, fabric.device):
        training.resume()
        known = isinstance(integrator, Implicit) and settings.unroll == 1 and substeps is None
        stepper = _SingleModel(training, predict, batches, settings, sampler, substeps, rates, known)
        (result,) = run_loop(stepper, settings)
    if isinstance(result, TrainingDiverged):
        raise result
    return result


def _placed(
    unrolled: Unrolled, optimizer: torch.optim.Optimizer | None, settings: TrainingSettings, fabric: Fabric
) -> tuple[Any, Any, AveragedModel | None]:
    """The model and its optimizer on the device or spread over processes, and the average of the weights."""
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    model, strategy = unrolled.model, fabric.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        optimizer = optimizer or adam(model.parameters(), settings, fabric.device)
        return *fabric.setup(unrolled, optimizer), averaged(model, settings.average)
    if optimizer is not None:
        raise ValueError("the model is to be sharded, which replaces its parameters: leave the optimizer out")
    average = averaged(model, settings.average)  # before: a sharded model cannot be copied
    predict = fabric.setup_module(unrolled, move_to_device=False)
    if average is not None:
        shard(strategy.precision.convert_module(average.module), strategy.device_mesh["data_parallel"])
    if unrolled.mask is not None:
        unrolled.mask = unrolled.mask.to(fabric.device)
    return predict, fabric.setup_optimizers(adam(model.parameters(), settings, fabric.device)), average


def _refuse_misfits(
    settings: TrainingSettings, transitions: Transitions, loss: nn.Module | None, validate: object
) -> None:
    if transitions.unroll != settings.unroll:
        raise ValueError(
            f"the transitions have {transitions.unroll} next state(s), but training.unroll is {settings.unroll}: make "
            f"them by Transitions(source, unroll={settings.unroll})"
        )
    if settings.accumulate > 1 and not isinstance(loss, ImbalanceAwareLoss | MeanSquaredError | None):
        raise ValueError(
            f"training.accumulate is {settings.accumulate}, which is exact for ImbalanceAwareLoss and MeanSquaredError "
            f"only, got {type(loss).__name__}"
        )
    refuse_without_leads(loss, settings)
    if settings.patience and validate is None:
        raise ValueError("training.patience is set, but nothing validates: there is no score to wait for")


def refuse_shared(settings: TrainingSettings, loss: nn.Module, processes: int) -> None:
    """Refuse a training that several processes would not bring to where one does.

    Raises:
        ValueError: for a loss that knows nothing of other processes, or a minibatch with too few transitions.
    """
    if processes == 1:
        return
    if not isinstance(loss, ImbalanceAwareLoss | MeanSquaredError):
        raise ValueError(
            f"{type(loss).__name__} sees the part of the minibatch that its own process holds, so that {processes} "
            "processes would train something else than one: use ImbalanceAwareLoss (imbalance-aware) or "
            "MeanSquaredError (mse), or one process"
        )
    if loss.recipe.weighing.differentiate:
        raise ValueError(
            f"differentiate_weights needs the whole minibatch in one process, but there are {processes}: leave it out, "
            "or use one process"
        )
    if settings.batch // processes < settings.accumulate:
        raise ValueError(
            f"training.batch is {settings.batch}, too few for {processes} processes with training.accumulate = "
            f"{settings.accumulate}: each takes at least {processes * settings.accumulate}"
        )


class _SingleModel(Stepper):
    """One model, in as many processes as its fabric has."""

    def __init__(
        self,
        training: Training,
        predict: Any,
        batches: Batches,
        settings: TrainingSettings,
        sampler: Sampler,
        substeps: Int[Tensor, " transition"] | None,
        rates: Sequence[float],
        known: bool,
    ) -> None:
        super().__init__([training])
        self.known = known
        """Whether steps take the next state from the data."""
        self.training, self.predict, self.batches, self.settings = training, predict, batches, settings
        self.sampler, self.substeps, self.rates = sampler, substeps, rates
        self.unit = like_model(training.model, batches.unit)
        self.beside = beside(training.loss, batches, training.fabric.device)
        self.indexed = takes(training.loss, "index")
        self.scheduled = settings.schedule != "constant" or settings.warmup > 0

    def advance(self, step: int, count: int) -> Float[Tensor, "step training"]:
        fabric, update, settings = self.training.fabric, self.training.optimizer, self.settings
        batch = self.batches.draw(self.sampler(step), step, fabric.global_rank, fabric.world_size)
        batch = batch.on(partial(like_model, self.training.model))
        draw_randomness(settings.seed, step, fabric.global_rank, fabric.world_size)
        update.zero_grad()
        if settings.accumulate == 1:
            value = self._value(self.training.loss, batch, step + 1)
            fabric.backward(value)
        else:
            value = self._accumulated(batch.split(settings.accumulate), step + 1)
        if settings.clip:
            fabric.clip_gradients(self.predict, update, max_norm=settings.clip, error_if_nonfinite=False)
        self._set_learning_rate(step)
        update.step()
        if self.training.average is not None:
            self.training.average.update_parameters(self.training.model)
        return value.detach().reshape(1, 1).cpu()

    def _value(self, loss: Callable[..., Any], batch: Batch, step: int) -> Any:
        """The loss of a minibatch, or of a part of it."""
        batch = batch.repeated(getattr(self.training.loss, "members", 1))  # forecasts that it compares
        counts = None if self.substeps is None else self.substeps[batch.numbers].to(batch.window.device)
        following = self.batches.following(batch) if self.known else None
        change = self.predict(batch.window, batch.conditions, counts, following)
        prediction, target = self.batches.compared(change, batch.window[:, -1], batch.target, self.unit)
        index = {"index": batch.numbers} if self.indexed else {}
        return self._finite(lambda: loss(prediction, target, **self.beside, **index), step)

    def _finite(self, value: Callable[[], Any], step: int) -> Any:
        """What a loss returns, if it is finite."""
        try:
            result = value()
        except (ValueError, RefusedElsewhere) as error:  # the shapes fit: some number is not finite
            raise TrainingDiverged(step, str(error)) from error
        if result is not None and not torch.isfinite(result):
            raise TrainingDiverged(step, f"the loss is {result.item()}")
        if result is not None and torch.is_grad_enabled() and not result.requires_grad:
            raise ValueError(
                "the loss has no gradient: the model detaches its result from its parameters, or computes it without "
                "gradients"
            )
        return result

    def _accumulated(self, parts: Sequence[Batch], step: int) -> Float[Tensor, ""]:
        """The loss of the whole minibatch; its gradient is added up part by part."""
        loss, fabric = self.training.loss, self.training.fabric
        own: Any = torch.tensor([float(len(part.numbers)) for part in parts], device=fabric.device)
        sizes = fabric.all_reduce(own, reduce_op="sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        shares, of_part = [size / sum(sizes) for size in sizes], loss
        if isinstance(loss, ImbalanceAwareLoss):  # its weights depend on all parts: they are looked at first
            whole = Accumulation(loss)
            shares, of_part = [1.0] * len(parts), whole.loss
            random = random_state(fabric.device)
            with torch.no_grad():
                for part in parts:
                    self._value(whole.observe, part, step)
            set_random_state(random, fabric.device)  # the same dropout in both passes
        value = torch.zeros((), device=fabric.device)
        for part, share in zip(parts, shares, strict=True):
            with fabric.no_backward_sync(self.predict, enabled=part is not parts[-1]):
                piece = share * self._value(of_part, part, step)
                fabric.backward(piece)
            value = value + piece.detach()
        return value

    def _set_learning_rate(self, step: int) -> None:
        if not self.scheduled:
            return
        factor = learning_rate_at(step, self.settings)
        for group, largest in zip(self.training.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = largest * factor

    def metrics(self) -> list[dict[str, float]]:
        report = getattr(self.training.loss, "report", dict)
        if self.settings.accumulate > 1 and isinstance(self.training.loss, MeanSquaredError):
            report = dict  # its report is of the last part
        metrics = {name: x for name, x in report().items() if isinstance(x, float)}
        rate = {"learning_rate": self.training.optimizer.param_groups[0]["lr"]} if self.scheduled else {}
        return [metrics | rate | noise for noise in gradient_noise(self.training.optimizer)]


def _stopping(trainings: Sequence[Training]) -> bool:
    """Whether a recorder of any process asks to stop: all stop at the same step."""
    stopping, fabric = any(training.recorder.stopping() for training in trainings), trainings[0].fabric
    if fabric.world_size == 1:
        return stopping
    return bool(fabric.all_reduce(torch.tensor(float(stopping), device=fabric.device), reduce_op="sum"))
