"""Many trainings as one batched computation: models that differ only by their weights, minibatches and losses.

Their parameters are stacked, (member, ...), and one pass of `torch.vmap` predicts for all. Adam works number by number,
so that one optimiser over the stacks does for every member what its own would. A loss is computed once for all members
that share it. Each member is a training of its own to the loop: logged, validated, saved and resumed apart.

On a CUDA device the data stay there where they fit, and a step, from the states to Adam, is one CUDA graph: the process
only draws the minibatches, and looks at the losses where something is to be logged, validated or saved.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from squall._process.replay import Replayed
from squall._types import State, Validation
from squall.data import Transitions
from squall.integrators import Implicit, IntegratorLike, accepts_step, euler, increment
from squall.losses import ImbalanceAwareLoss
from squall.losses.loss import Recipe
from squall.models.stacked import Stacked
from squall.training.batches import Batches, beside
from squall.training.loop import Stepper, run_loop
from squall.training.noise import gradient_noise
from squall.training.sampling import Sampler, UniformSampler
from squall.training.settings import TrainingSettings, adam, alone
from squall.training.state import Recorder, Training, TrainingDiverged, TrainingResult, one_process, private_randomness

__all__ = ["Member", "train_together"]

HELD_BYTES = 4 << 30
"""Data up to this size are held on a CUDA device: a small part of the memory of those that train many models."""

STEPS_AT_ONCE = {"cuda": 100}
"""Most steps between two looks at the losses, and at whether to stop; one where a device is not named, as on a CPU.
Each look waits for the device; a hundred steps take a fraction of a second."""

States = Float[Tensor, "member batch channel *space"]


@runtime_checkable
class ValidatesEach(Protocol):
    """A validation that can look at all members at once."""

    def each(self, models: Stacked) -> list[Validation]: ...


@dataclass(frozen=True)
class Member:
    """One training of an ensemble; the arguments of `train` that may differ from member to member.

    Args:
        model: of the same class and sizes as the others'; trained in place.
        loss: an `ImbalanceAwareLoss` or a `MeanSquaredError`.
        sampler: which transitions make its minibatches.
        validate: called with the model every `validate_every` steps; what can validate each of a stack, as
            `RolloutValidation`, is called once for all members where it is the same for all.
        recorder: receives log lines and checkpoints, in a thread of its own, and gives the checkpoint to resume from.
    """

    model: nn.Module
    loss: nn.Module
    sampler: Sampler
    validate: Callable[[nn.Module], Validation] | None = None
    recorder: Recorder = dataclasses.field(default_factory=Recorder)


@accepts_step
def train_together(
    members: Sequence[Member],
    transitions: Transitions,
    settings: TrainingSettings | None = None,
    *,
    integrator: IntegratorLike = euler,
    scale: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> list[TrainingResult | TrainingDiverged]:
    """Train all members at once; each ends where `train` would have brought it, to rounding.

    Args:
        members: the trainings.
        transitions: the training pairs of all.
        settings: steps, minibatch, learning rate and residual of all; the seed in it is not used.
        integrator: that all are trained through.
        scale: one number per channel by which residuals are divided.
        device: where the stacked parameters live.

    Returns:
        for each member its result, or what its training diverged by: the others go on without it.

    Raises:
        ValueError: if there is no member, the models differ in their parameters, a loss is of another class, the
            members stand at different steps, or the settings have an option of a training by itself.
    """
    settings, device = settings or TrainingSettings(), torch.device(device)
    if not members:
        raise ValueError("train_together: there is no member to train")
    if options := alone(settings):
        raise ValueError(f"train_together: training.{options[0]} is set, which only a training by itself has")
    if isinstance(integrator, Implicit):
        raise ValueError(f"train_together: {integrator.name} is implicit: train the members apart")
    if transitions.length > 2:
        raise ValueError(
            f"train_together: the transitions are windows of {transitions.length} states, but must be pairs: train "
            "the members apart"
        )
    losses = _shared_losses([member.loss for member in members], device)
    batches = Batches(transitions, settings, scale)
    with private_randomness(settings.seed, device), ThreadPoolExecutor(1, thread_name_prefix="squall-writer") as writer:
        trainings = _resumed(members, settings)
        models = _stacked(trainings, device)
        minibatches = _Minibatches(batches, [member.sampler for member in members], models)
        return run_loop(_Stack(trainings, models, minibatches, losses, integrator, settings), settings, writer)


def _resumed(members: Sequence[Member], settings: TrainingSettings) -> list[Training]:
    fabric, cpu = one_process(), torch.device("cpu")
    trainings = [
        Training(m.model, adam(m.model.parameters(), settings, cpu), m.loss, m.recorder, fabric, m.validate)
        for m in members
    ]
    for training in trainings:
        training.resume()
    if len(steps := {training.step for training in trainings}) > 1:
        raise ValueError(f"train_together: members stand at the steps {sorted(steps)}; train those of one step")
    return trainings


def _stacked(trainings: Sequence[Training], device: torch.device) -> Stacked:
    try:
        models = Stacked([training.model for training in trainings], device)
    except ValueError as error:
        raise ValueError(f"train_together: {error}; train them apart") from error
    for parameter in models.parameters.values():
        parameter.requires_grad_()
    return models


class _Stack(Stepper):
    """The stacked models with one optimiser; the models of the trainings follow in `pull`."""

    def __init__(
        self,
        trainings: Sequence[Training],
        models: Stacked,
        minibatches: "_Minibatches",
        losses: "Sequence[tuple[Tensor, Recipe]]",
        integrator: IntegratorLike,
        settings: TrainingSettings,
    ) -> None:
        device, step = models.device, trainings[0].step
        super().__init__(trainings, STEPS_AT_ONCE.get(device.type, 1))
        self.models, self.minibatches, self.losses, self.integrator = models, minibatches, losses, integrator
        self.parameters = list(models.parameters.values())
        self.optimizer = adam(self.parameters, settings, device, replayed=device.type == "cuda")
        self._push_moments()
        self.unit = minibatches.batches.unit.to(device, models.dtype)
        self.beside = beside(trainings[0].loss, minibatches.batches, device)
        self.mask = self.beside.get("mask")
        # The memory of a step: what it starts from, where it stands and what it leaves.
        self.u, self.target = minibatches.draw(step)
        self.counter = torch.tensor(step, device=device)
        self.values = torch.zeros(len(trainings), device=device, dtype=models.dtype)
        self.compared = self.u, self.target
        """The last predictions and their targets, for the log."""
        self._one_step = Replayed(self._step, device)

    def advance(self, step: int, count: int) -> Float[Tensor, "step member"]:
        values = self.values.new_empty(count, len(self.trainings))
        for i, row in enumerate(values):
            self._take(step + i)
            self._one_step()
            row.copy_(self.values)
        return values.cpu()

    def _take(self, step: int) -> None:
        """Put a minibatch where the step finds it."""
        u, target = self.minibatches.draw(step)
        if self.models.device.type != "cuda":
            self.u, self.target = u, target
            return
        if u.shape != self.u.shape:
            raise ValueError(
                f"train_together: a sampler draws {u.shape[1]} transitions at step {step} and {self.u.shape[1]} "
                "before; on a CUDA device all minibatches must be of one size: train those members apart"
            )
        self.u.copy_(u)
        self.target.copy_(target)

    def _step(self) -> None:
        """One step of all, from `u` and `target` to `values` and the parameters."""
        batches = self.minibatches.batches
        rate = increment(self.integrator, self.models, self.u, batches.dt)
        if self.mask is not None:
            rate = torch.where(self.mask, rate, 0)
        prediction, target = batches.compared(rate, self.u, self.target, self.unit)
        self.compared = prediction.detach(), target
        fine = ((prediction - target).detach().square().flatten(1).amax(1)).isfinite()
        # A diverged member has no part in the losses, whose checks would stop all.
        shown = torch.where(fine.reshape(-1, *[1] * (prediction.dim() - 1)), prediction, target)
        values = torch.zeros_like(self.values)
        for chosen, recipe in self.losses:
            each = recipe.of_each_group(shown[chosen], target[chosen], self.counter, **self.beside)
            values = values.index_add(0, chosen, each)
        gradients = torch.autograd.grad(values.sum(), self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else gradient.contiguous()
        self.optimizer.step()
        self.values.copy_(torch.where(fine, values.detach(), torch.inf))
        self.counter += 1

    @torch.no_grad()
    def metrics(self) -> list[dict[str, float]]:
        noise, fine = gradient_noise(self.optimizer, len(self.trainings)), self.values.isfinite().tolist()
        return [
            (self._report(training.loss, *compared) if finite else {}) | share
            for training, *compared, share, finite in zip(self.trainings, *self.compared, noise, fine, strict=True)
        ]

    def _report(self, loss: Any, prediction: State, target: State) -> dict[str, float]:
        """The report of a member's loss, which the step itself does without."""
        return loss.recipe.evaluate(prediction, target, step=self.counter - 1, **self.beside).account.numbers()

    def validations(self) -> list[Validation | None]:
        validate = self.trainings[0].validate
        if isinstance(validate, ValidatesEach) and all(t.validate == validate for t in self.trainings):
            called = next(c for c in type(validate).__mro__ if "__call__" in vars(c))
            if "each" in vars(called):  # otherwise a subclass validates in its own way
                return [*validate.each(self.models)]
        return super().validations()

    def pull(self, step: int) -> None:
        weights, buffers = (
            {name: x.detach().cpu() for name, x in numbers.items()}
            for numbers in (self.models.parameters, self.models.buffers)
        )
        moments = {
            name: {key: value.detach().cpu() for key, value in self.optimizer.state[x].items()}
            for name, x in self.models.parameters.items()
        }
        for i, training in enumerate(self.trainings):
            if isinstance(training.loss, ImbalanceAwareLoss):
                training.loss.step.fill_(step)  # where its schedule stands
            with torch.no_grad():
                for name, own in training.model.named_buffers():
                    own.copy_(buffers[name][i])
                for name, own in training.model.named_parameters():
                    own.copy_(weights[name][i])
                    training.optimizer.state[own].update(
                        {key: (x if x.dim() == 0 else x[i].to(own.device)).clone() for key, x in moments[name].items()}
                    )

    def _push_moments(self) -> None:
        """Stack what the members' optimisers hold after a resume."""
        for name, stacked in self.models.parameters.items():
            states = [t.optimizer.state.get(dict(t.model.named_parameters())[name]) or {} for t in self.trainings]
            for key, value in states[0].items():
                together = value.clone() if value.dim() == 0 else torch.stack([state[key] for state in states])
                on = self.models.device if value.dim() or self.models.device.type == "cuda" else value.device
                self.optimizer.state[stacked][key] = together.to(on)


class _Minibatches:
    """The minibatches of all members, on the device of the stack."""

    def __init__(self, batches: Batches, samplers: Sequence[Sampler], models: Stacked) -> None:
        self.batches, self.models = batches, models
        self.samplers: list[Sampler] = []
        """Each once: of members of one seed."""
        self.whose: list[int] = []
        for sampler in samplers:
            known = [i for i, other in enumerate(self.samplers) if _draw_alike(sampler, other)]
            self.whose.append(known[0] if known else len(self.samplers))
            self.samplers += [] if known else [sampler]
        source = batches.transitions.source
        wrong = batches.settings.corrupt_share > 0
        held = models.device.type == "cuda" and source.nbytes <= HELD_BYTES and not wrong
        self.states = source.read().to(models.device) if held else None

    def draw(self, step: int) -> tuple[States, States]:
        """States and targets."""
        drawn = [sampler(step) for sampler in self.samplers]
        indices = torch.stack([drawn[i] for i in self.whose])
        if self.states is None:
            batch = self.batches.draw(indices.flatten())
            u, target = batch.window[:, -1], batch.target
        else:
            at = torch.stack(self.batches.transitions.locate(indices.flatten()))
            trajectories, starts = at.pin_memory().to(self.models.device, non_blocking=True)
            u, u_next = self.states[trajectories, starts], self.states[trajectories, starts + 1]
            target = self.batches.target(u, u_next.unsqueeze(1))
        shape = (len(self.whose), -1)
        u, target = (x.to(self.models.device, self.models.dtype).unflatten(0, shape) for x in (u, target))
        return u, target


def _draw_alike(a: Sampler, b: Sampler) -> bool:
    return a is b or (type(a) is type(b) is UniformSampler and a == b)


def _shared_losses(losses: Sequence[nn.Module], device: torch.device) -> list[tuple[Tensor, Recipe]]:
    """The members of every distinct loss, and that loss with the members as its groups."""
    groups: list[tuple[Recipe, list[int]]] = []
    for i, loss in enumerate(losses):
        recipe = getattr(loss, "recipe", None)
        if not isinstance(recipe, Recipe) or recipe.over != "all":
            raise ValueError(
                f"train_together: a loss is {loss!r}, but must be an ImbalanceAwareLoss or a MeanSquaredError "
                "over='all'; train that member apart"
            )
        known = [members for other, members in groups if other == recipe]
        if known:
            known[0].append(i)
        else:
            groups.append((recipe, [i]))
    return [
        (torch.tensor(members, device=device), dataclasses.replace(recipe, over="sample", group=None))
        for recipe, members in groups
    ]
