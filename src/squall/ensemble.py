"""Many trainings as one batched computation: models that differ only by their weights, minibatches and losses.

Their parameters are stacked, (member, ...), and one pass of `torch.vmap` predicts for all. Adam works number by number,
so that one optimiser over the stacks does for every member what its own would. A loss is computed once for all members
that share it. Each member stays a training of its own for its recorder: logged, validated, saved and resumed apart.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squall.data import Transitions
from squall.integrators import Step, euler, increment
from squall.losses import ImbalanceAwareLoss
from squall.losses.recipe import Recipe
from squall.sampling import Sampler
from squall.training import (
    Course,
    Recorder,
    TrainingDiverged,
    TrainingResult,
    TrainingSettings,
    Validation,
    adam,
    one_process,
    pair,
)

__all__ = ["Member", "train_together"]


@dataclass(frozen=True)
class Member:
    """One training of an ensemble; the arguments of `train` that may differ from member to member.

    Args:
        model: of the same class and sizes as the others'; trained in place.
        loss: an `ImbalanceAwareLoss` or a `MeanSquaredError`.
        sampler: which transitions make its minibatches.
        validate: called with the model every `validate_every` steps.
        recorder: told of log lines and checkpoints; says where to resume.
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
    stack = _Stack(members, settings, step, transitions.dt, torch.device(device))
    units = torch.tensor(scale or (1.0,), dtype=torch.float64)
    started = time.monotonic() - max(course.seconds for course in stack.courses)
    while stack.step < settings.steps and not any(m.recorder.stopping() for m in members) and stack.alive.any():
        indices = torch.cat([member.sampler(stack.step) for member in members])
        u, target = (x.unflatten(0, (len(members), -1)) for x in pair(transitions, indices, settings.residual))
        values = stack.advance(u, target, units, settings.residual == "state", transitions.dt)
        stack.tell(values, settings, time.monotonic() - started)
    return stack.results(settings)


class _Stack:
    """The stacked parameters with their optimiser, and each member's own course."""

    def __init__(
        self, members: Sequence[Member], settings: TrainingSettings, step: Step, dt: float, device: torch.device
    ) -> None:
        self.members, self.device = members, device
        shapes = [{name: p.shape for name, p in member.model.named_parameters()} for member in members]
        if any(these != shapes[0] for these in shapes):
            raise ValueError("train_together: the models differ in their parameters; train them apart")
        self.losses = _shared_losses([member.loss for member in members], device)
        self.courses = [_course(member, settings) for member in members]
        steps = {course.step for course in self.courses}
        if len(steps) > 1:
            raise ValueError(f"train_together: members stand at the steps {sorted(steps)}; train those of one step")
        self.step = steps.pop()
        self.alive = torch.ones(len(members), dtype=torch.bool)
        self.diverged: dict[int, TrainingDiverged] = {}
        self.parameters, self.buffers = torch.func.stack_module_state([member.model for member in members])
        self.parameters = {name: p.detach().to(device).requires_grad_() for name, p in self.parameters.items()}
        self.buffers = {name: b.to(device) for name, b in self.buffers.items()}
        self.optimizer = adam(self.parameters.values(), settings, device)
        self._push_moments()
        skeleton = copy.deepcopy(members[0].model).to("meta")

        def one(parameters: Any, buffers: Any, u: Tensor) -> Tensor:
            def rate(v: Tensor) -> Tensor:
                return torch.func.functional_call(skeleton, (parameters, buffers), (v,))

            return increment(step, rate, u, dt)

        self.predict = torch.vmap(one)
        self.dtype = next(iter(self.parameters.values())).dtype

    def advance(self, u: Tensor, target: Tensor, units: Tensor, states: bool, dt: float) -> Tensor:
        """One step of all; the losses (member,), not finite for a member that diverged.

        Args:
            u, target: (member, batch, channel, *space).
            units: by which the residuals are divided, one number per channel.
            states: whether the loss compares states.
        """
        u, target = u.to(self.device, self.dtype), target.to(self.device, self.dtype)
        prediction = self.predict(self.parameters, self.buffers, u)
        if states:
            prediction = u + dt * prediction
        unit = units.to(prediction).reshape(-1, *[1] * (prediction.dim() - 3))
        prediction, target = prediction / unit, target / unit
        fine = ((prediction - target).detach().square().flatten(1).amax(1)).isfinite()
        # A diverged member has no part in the losses, whose checks would stop all.
        shown = torch.where(fine.reshape(-1, *[1] * (prediction.dim() - 1)), prediction, target)
        values = torch.zeros(len(self.members), device=self.device, dtype=self.dtype)
        for chosen, recipe in self.losses:
            found = recipe.of_each_group(shown[chosen], target[chosen], torch.tensor(self.step))
            values = values.index_add(0, chosen, found)
        self.optimizer.zero_grad()
        values.sum().backward()
        self.optimizer.step()
        self.step += 1
        return torch.where(fine, values.detach(), torch.inf).cpu()

    def tell(self, values: Tensor, settings: TrainingSettings, seconds: float) -> None:
        """Log, validate and save what is due, member by member."""
        last = self.step == settings.steps
        due = {
            "log": last or self.step % settings.log_every == 0,
            "validate": settings.validate_every and (last or self.step % settings.validate_every == 0),
            "save": last or self.step % settings.checkpoint_every == 0,
        }
        for i, (member, course) in enumerate(zip(self.members, self.courses, strict=True)):
            if not self.alive[i]:
                continue
            course.step, course.seconds = self.step, seconds
            if not values[i].isfinite():
                self._lose(i, TrainingDiverged(self.step, "the prediction left the finite numbers"))
                continue
            member.recorder.stepped(self.step)
            if due["log"]:
                course.log({"loss": values[i].item()})
            if due["validate"] or due["save"]:
                self._pull(i)
            try:
                if due["validate"] and member.validate:
                    course.validate(member.validate)
                if due["save"]:
                    course.save()
            except TrainingDiverged as error:
                self._lose(i, error)

    def results(self, settings: TrainingSettings) -> list[TrainingResult | TrainingDiverged]:
        """What became of each member; its model holds its last weights."""
        found: list[TrainingResult | TrainingDiverged] = []
        for i, course in enumerate(self.courses):
            if i in self.diverged:
                found.append(self.diverged[i])
                continue
            self._pull(i)
            finished = self.step >= settings.steps
            if not finished:
                try:
                    course.save()
                except TrainingDiverged as error:
                    found.append(error)
                    continue
            course.model.eval()
            found.append(TrainingResult(course.model, course.step, finished, course.history, course.best))
        return found

    def _lose(self, i: int, error: TrainingDiverged) -> None:
        self.alive[i] = False
        self.diverged[i] = error

    def _pull(self, i: int) -> None:
        """Bring a member's model and optimiser to where its slice of the stacks is."""
        course = self.courses[i]
        if isinstance(course.loss, ImbalanceAwareLoss):
            course.loss.step.fill_(self.step)  # where its schedule stands
        with torch.no_grad():
            for (name, own), stacked in zip(course.model.named_parameters(), self.parameters.values(), strict=True):
                assert self.parameters[name] is stacked
                own.copy_(stacked[i])
                for key, value in self.optimizer.state[stacked].items():
                    part = value if value.dim() == 0 else value[i]
                    course.optimizer.state[own][key] = part.detach().clone().to(own.device if value.dim() else "cpu")

    def _push_moments(self) -> None:
        """Stack what the members' optimisers hold after a resume."""
        for name, stacked in self.parameters.items():
            states = [
                course.optimizer.state.get(dict(course.model.named_parameters())[name]) for course in self.courses
            ]
            if states[0]:
                for key, value in states[0].items():
                    parts = [state[key] for state in states if state]
                    together = value.clone() if value.dim() == 0 else torch.stack(parts)
                    self.optimizer.state[stacked][key] = together.to(self.device)


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
