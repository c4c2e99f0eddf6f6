"""Many trainings as one batched computation: models that differ only by their weights, minibatches and losses.

Their parameters are stacked, (member, ...), and one pass of `torch.vmap` predicts for all. Adam works number by number,
so that one optimiser over the stacks does for every member what its own would. A loss is computed once for all members
that share it. Each member stays a training of its own for its recorder: logged, validated, saved and resumed apart.

On a CUDA device the data stay there where they fit, and a step, from the states to Adam, is one CUDA graph: the process
only draws the minibatches, and looks at the losses where something is to be logged, validated or saved.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from squall._process.replay import Replayed
from squall._types import Validation
from squall.data import Transitions
from squall.integrators import Step, euler, increment
from squall.losses import ImbalanceAwareLoss
from squall.losses.loss import Recipe
from squall.models.stacked import Stacked
from squall.training.loop import (
    Course,
    Recorder,
    TrainingDiverged,
    TrainingResult,
    TrainingSettings,
    adam,
    one_process,
    pair,
    residual_of,
)
from squall.training.sampling import Sampler, UniformSampler

__all__ = ["Member", "train_together"]

HELD_BYTES = 4 << 30
"""Data up to this size are held on a CUDA device."""

STEPS_AT_ONCE = {"cuda": 100}
"""Most steps between two looks at the losses, and at whether to stop; one where a device is not named, as on a CPU."""


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
        recorder: told of log lines and checkpoints, by a thread of their own; says where to resume.
    """

    model: nn.Module
    loss: nn.Module
    sampler: Sampler
    validate: Callable[[nn.Module], Validation] | None = None
    recorder: Recorder = dataclasses.field(default_factory=Recorder)


def train_together(
    members: Sequence[Member],
    transitions: Transitions,
    settings: TrainingSettings | None = None,
    *,
    step: Step = euler,
    scale: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> list[TrainingResult | TrainingDiverged]:
    """Train all members at once; each ends where `train` would have brought it, to rounding.

    Args:
        members: the trainings.
        transitions: the training pairs of all.
        settings: steps, minibatch, learning rate and residual of all; the seed in it is not used.
        step: the integrator that all are trained through.
        scale: one number per channel by which residuals are divided.
        device: where the stacked parameters live.

    Returns:
        for each member its result, or what its training diverged by: the others go on without it.

    Raises:
        ValueError: if there is no member, the models differ in their parameters, a loss is of another kind, or the
            members stand at different steps.
    """
    settings = settings or TrainingSettings()
    if not members:
        raise ValueError("train_together: there is no member to train")
    with ThreadPoolExecutor(1, thread_name_prefix="squall-writer") as writer:
        stack = _Stack(members, transitions, settings, step, scale or (1.0,), torch.device(device), writer)
        started = time.monotonic() - max(course.seconds for course in stack.courses)
        while stack.step < settings.steps and not any(m.recorder.stopping() for m in members) and stack.alive.any():
            values = stack.advance()
            stack.tell(values, time.monotonic() - started)
        return stack.results()


class _Stack:
    """The stacked models with their optimiser, and each member's own course."""

    def __init__(
        self,
        members: Sequence[Member],
        transitions: Transitions,
        settings: TrainingSettings,
        step: Step,
        scale: Sequence[float],
        device: torch.device,
        writer: Executor,
    ) -> None:
        self.members, self.settings = members, settings
        self.losses = _shared_losses([member.loss for member in members], device)
        self.courses = [_course(member, settings) for member in members]
        steps = {course.step for course in self.courses}
        if len(steps) > 1:
            raise ValueError(f"train_together: members stand at the steps {sorted(steps)}; train those of one step")
        self.step = steps.pop()
        self.alive = torch.ones(len(members), dtype=torch.bool)
        self.diverged: dict[int, TrainingDiverged] = {}
        self.models = _stacked(members, device)
        self.parameters = list(self.models.parameters.values())
        self.optimizer = adam(self.parameters, settings, device, replayed=device.type == "cuda")
        self._push_moments()
        self.minibatches = _Minibatches(transitions, [member.sampler for member in members], settings, self.models)
        self.integrator, self.dt = step, transitions.dt
        self.unit = torch.tensor(scale, dtype=self.models.dtype, device=device)
        # The memory of a step: what it starts from, where it stands and what it leaves.
        self.u, self.target = self.minibatches.draw(self.step)
        self.counter = torch.tensor(self.step, device=device)
        self.values = torch.zeros(len(members), device=device, dtype=self.models.dtype)
        self._one_step = Replayed(self._step, device)
        self._writer, self._written = writer, Future[None]()
        self._written.set_result(None)

    def advance(self) -> Tensor:
        """Steps of all up to where something is due; the losses, (step, member), not finite where a member diverged."""
        values = self.values.new_empty(self._until_due(), len(self.members))
        for row in values:
            self._take(*self.minibatches.draw(self.step))
            self._one_step()
            row.copy_(self.values)
            self.step += 1
        return values.cpu()

    def _take(self, u: Tensor, target: Tensor) -> None:
        """Put a minibatch where the step finds it."""
        if self.models.device.type != "cuda":
            self.u, self.target = u, target
            return
        if u.shape != self.u.shape:
            raise ValueError(
                f"train_together: a sampler draws {u.shape[1]} transitions at step {self.step} and {self.u.shape[1]} "
                "before; on a CUDA device all minibatches must be of one size: train those members apart"
            )
        self.u.copy_(u)
        self.target.copy_(target)

    def _until_due(self) -> int:
        """How many steps until something is due, or until a look at the losses."""
        settings, most = self.settings, STEPS_AT_ONCE.get(self.models.device.type, 1)
        periods = [p for p in (settings.log_every, settings.checkpoint_every, settings.validate_every) if p]
        return min(most, settings.steps - self.step, *(p - self.step % p for p in periods))

    def _step(self) -> None:
        """One step of all, from `u` and `target` to `values` and the parameters."""
        prediction = increment(self.integrator, self.models, self.u, self.dt)
        if self.settings.residual == "state":
            prediction = self.u + self.dt * prediction
        unit = self.unit.reshape(-1, *[1] * (prediction.dim() - 3))
        prediction, target = prediction / unit, self.target / unit
        fine = ((prediction - target).detach().square().flatten(1).amax(1)).isfinite()
        # A diverged member has no part in the losses, whose checks would stop all.
        shown = torch.where(fine.reshape(-1, *[1] * (prediction.dim() - 1)), prediction, target)
        values = torch.zeros_like(self.values)
        for chosen, recipe in self.losses:
            found = recipe.of_each_group(shown[chosen], target[chosen], self.counter)
            values = values.index_add(0, chosen, found)
        gradients = torch.autograd.grad(values.sum(), self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else gradient.contiguous()
        self.optimizer.step()
        self.values.copy_(torch.where(fine, values.detach(), torch.inf))
        self.counter += 1

    def tell(self, values: Tensor, seconds: float) -> None:
        """Log, validate and save what is due after these steps, member by member.

        What is due is written while the next steps are computed.
        """
        settings, last = self.settings, self.step == self.settings.steps
        validates = bool(settings.validate_every) and (last or self.step % settings.validate_every == 0)
        saves = last or self.step % settings.checkpoint_every == 0
        self._written.result()
        if validates or saves:
            self._pull()
        validations = self._validations() if validates else None
        for i, (member, course) in enumerate(zip(self.members, self.courses, strict=True)):
            if not self.alive[i]:
                continue
            course.step, course.seconds = self.step, seconds
            if not values[:, i].isfinite().all():
                first = self.step - len(values) + int((~values[:, i].isfinite()).nonzero()[0])
                self._lose(i, TrainingDiverged(first + 1, "the prediction left the finite numbers"))
                continue
            member.recorder.stepped(self.step)
            if last or self.step % settings.log_every == 0:
                course.log({"loss": values[-1, i].item()})
            if validates and validations is None and member.validate:
                try:
                    course.validate(member.validate)
                except TrainingDiverged as error:
                    self._lose(i, error)
        if validates or saves:
            self._written = self._writer.submit(self._write, validations, saves)

    def _write(self, validations: list[Validation] | None, saves: bool) -> None:
        """Let the recorders of all members write, in a thread of its own: files take longer than a step."""
        for i, course in enumerate(self.courses):
            if not self.alive[i]:
                continue
            try:
                if validations is not None:
                    course.validated(validations[i])
                if saves:
                    course.save()
            except TrainingDiverged as error:
                self._lose(i, error)

    def _validations(self) -> list[Validation] | None:
        """Of all members at once, None where they have to be validated one by one."""
        validate = self.members[0].validate
        if not isinstance(validate, ValidatesEach) or not all(member.validate == validate for member in self.members):
            return None
        called = next(c for c in type(validate).__mro__ if "__call__" in vars(c))
        return validate.each(self.models) if "each" in vars(called) else None  # a subclass may validate otherwise

    def results(self) -> list[TrainingResult | TrainingDiverged]:
        """What became of each member; its model holds its last weights."""
        self._written.result()
        self._pull()
        finished = self.step >= self.settings.steps
        found: list[TrainingResult | TrainingDiverged] = []
        for i, course in enumerate(self.courses):
            if i not in self.diverged and not finished:
                try:
                    course.save()
                except TrainingDiverged as error:
                    self._lose(i, error)
            course.model.eval()
            result = TrainingResult(course.model, course.step, finished, course.history, course.best)
            found.append(self.diverged.get(i, result))
        return found

    def _lose(self, i: int, error: TrainingDiverged) -> None:
        self.alive[i] = False
        self.diverged[i] = error

    def _pull(self) -> None:
        """Bring every member's model and optimiser to where its slice of the stacks is."""
        weights, buffers = (
            {name: x.detach().cpu() for name, x in numbers.items()}
            for numbers in (self.models.parameters, self.models.buffers)
        )
        moments = {
            name: {key: value.detach().cpu() for key, value in self.optimizer.state[x].items()}
            for name, x in self.models.parameters.items()
        }
        for i, course in enumerate(self.courses):
            if isinstance(course.loss, ImbalanceAwareLoss):
                course.loss.step.fill_(self.step)  # where its schedule stands
            with torch.no_grad():
                for name, own in course.model.named_buffers():
                    own.copy_(buffers[name][i])
                for name, own in course.model.named_parameters():
                    own.copy_(weights[name][i])
                    course.optimizer.state[own].update(
                        {key: (x if x.dim() == 0 else x[i].to(own.device)).clone() for key, x in moments[name].items()}
                    )

    def _push_moments(self) -> None:
        """Stack what the members' optimisers hold after a resume."""
        for name, stacked in self.models.parameters.items():
            states = [
                course.optimizer.state.get(dict(course.model.named_parameters())[name]) for course in self.courses
            ]
            if states[0]:
                for key, value in states[0].items():
                    parts = [state[key] for state in states if state]
                    together = value.clone() if value.dim() == 0 else torch.stack(parts)
                    on = self.models.device if value.dim() or self.models.device.type == "cuda" else value.device
                    self.optimizer.state[stacked][key] = together.to(on)


def _stacked(members: Sequence[Member], device: torch.device) -> Stacked:
    try:
        models = Stacked([member.model for member in members], device)
    except ValueError as error:
        raise ValueError(f"train_together: {error}; train them apart") from error
    for parameter in models.parameters.values():
        parameter.requires_grad_()
    return models


class _Minibatches:
    """The minibatches of all members, (member, batch, channel, *space), on the device of the stack."""

    def __init__(
        self, transitions: Transitions, samplers: Sequence[Sampler], settings: TrainingSettings, models: Stacked
    ) -> None:
        self.transitions, self.settings, self.models = transitions, settings, models
        self.samplers: list[Sampler] = []
        """Each once: of members of one seed."""
        self.whose: list[int] = []
        for sampler in samplers:
            known = [i for i, other in enumerate(self.samplers) if _draw_alike(sampler, other)]
            self.whose.append(known[0] if known else len(self.samplers))
            self.samplers += [] if known else [sampler]
        source = transitions.source
        held = models.device.type == "cuda" and source.nbytes <= HELD_BYTES
        self.states = source.read().to(models.device) if held else None

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """States, and what is to be predicted."""
        drawn = [sampler(step) for sampler in self.samplers]
        indices = torch.stack([drawn[i] for i in self.whose])
        if self.states is None:
            u, target = pair(self.transitions, indices.flatten(), self.settings.residual)
        else:
            places = torch.stack(self.transitions.locate(indices.flatten()))
            trajectories, starts = places.pin_memory().to(self.models.device, non_blocking=True)
            u, u_next = self.states[trajectories, starts], self.states[trajectories, starts + 1]
            target = residual_of(u, u_next, self.transitions.dt, self.settings.residual)
        shape = (len(self.whose), -1)
        u, target = (x.to(self.models.device, self.models.dtype).unflatten(0, shape) for x in (u, target))
        return u, target


def _draw_alike(a: Sampler, b: Sampler) -> bool:
    return a is b or (type(a) is type(b) is UniformSampler and a == b)


def _course(member: Member, settings: TrainingSettings) -> Course:
    optimizer = adam(member.model.parameters(), settings, torch.device("cpu"))
    course = Course(member.model, optimizer, member.loss, member.recorder, one_process())
    course.resume()
    return course


def _shared_losses(losses: Sequence[nn.Module], device: torch.device) -> list[tuple[Tensor, Recipe]]:
    """The members of every distinct loss, and that loss with the members as its groups."""
    groups: list[tuple[list[int], Recipe]] = []
    for i, loss in enumerate(losses):
        recipe = getattr(loss, "recipe", None)
        if not isinstance(recipe, Recipe) or recipe.over != "all":
            raise ValueError(
                f"train_together: a loss is {loss!r}, but must be an ImbalanceAwareLoss or a MeanSquaredError "
                "over='all'; train that member apart"
            )
        for indices, other in groups:
            if other == recipe:
                indices.append(i)
                break
        else:
            groups.append(([i], recipe))
    return [
        (torch.tensor(indices, device=device), dataclasses.replace(recipe, over="sample", group=None))
        for indices, recipe in groups
    ]
