"""Models of one architecture with different weights, computed as one batch."""

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from squall._process.replay import Replayed
from squall._types import Rate, State
from squall.integrators import IntegratorLike, accepts_step, increment
from squall.models.inputs import Joined

States = Float[Tensor, "member batch channel *space"]


class Stacked:
    """Models of one class and of the same sizes as one rate, from states to rates of all members.

    Each member sees its own states. Any integrator takes it: `integrator(stacked, u, dt)`.

    Args:
        models: the members; the stack holds copies of their numbers.
        device: where the stack lives.

    Raises:
        ValueError: if there is none, or they are of different classes or their parameters differ in names, shapes or
            types.

    >>> stacked = Stacked([nn.Linear(2, 2), nn.Linear(2, 2)])
    >>> stacked(torch.zeros(2, 5, 1, 2)).shape
    torch.Size([2, 5, 1, 2])
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device | str = "cpu") -> None:
        if not models:
            raise ValueError("models is empty: give at least one model to stack")
        if any(_shape(model) != _shape(models[0]) for model in models):
            raise ValueError("the models differ in their parameters or their class: they cannot be computed as one")
        self.device, self._count = torch.device(device), len(models)
        parameters, buffers = torch.func.stack_module_state(list(models))
        self.parameters: dict[str, Tensor] = {name: p.detach().to(self.device) for name, p in parameters.items()}
        self.buffers: dict[str, Tensor] = {name: b.to(self.device) for name, b in buffers.items()}
        self.dtype = next((p.dtype for p in self.parameters.values() if p.is_floating_point()), torch.float32)
        self.skeleton = copy.deepcopy(models[0]).to("meta")

    def __len__(self) -> int:
        return self._count

    def __call__(self, u: States) -> States:
        return torch.vmap(self._one)(self.parameters, self.buffers, u)

    def _one(self, parameters: Any, buffers: Any, u: Joined) -> State:
        return torch.func.functional_call(self.skeleton, (parameters, buffers), (u,))

    def part(self, chosen: slice) -> "Stacked":
        """Some of the members; they share their numbers with this stack."""
        part = copy.copy(self)
        part.parameters = {name: x[chosen] for name, x in self.parameters.items()}
        part.buffers = {name: x[chosen] for name, x in self.buffers.items()}
        part._count = len(range(self._count)[chosen])
        return part

    def member(self, i: int) -> Rate:
        """The rate of one member, from states (batch, channel, *space)."""
        parts = ({name: x[i] for name, x in numbers.items()} for numbers in (self.parameters, self.buffers))
        return partial(self._one, *parts)

    def shared(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "member *shape"]:
        """States for all members alike, on the device and in the precision of the stack, as views."""
        return u.to(self.device, self.dtype).expand(len(self), *u.shape)

    def increment(self, integrator: IntegratorLike, u: State, dt: float) -> States:
        """Every member's mean rate over a step from the same states; see `integrators.increment`."""
        return increment(integrator, self, self.shared(u), dt)

    @accepts_step
    @torch.no_grad()
    def rollout(
        self, integrator: IntegratorLike, first: State, dt: float, steps: int
    ) -> Float[Tensor, "member batch time channel *space"]:
        """Every member's trajectories from the same first states, which come first; see `integrators.rollout`."""
        u = self.shared(first).clone()
        trajectories = u.new_empty((*u.shape[:2], steps + 1, *u.shape[2:]))
        trajectories[:, :, 0] = u
        advance = Replayed(lambda: u.copy_(integrator(self, u, dt)), self.device)
        for n in range(steps):
            advance()
            trajectories[:, :, n + 1] = u
        return trajectories


def _shape(model: nn.Module) -> tuple[type, bool, list[tuple[str, torch.Size, torch.dtype]]]:
    numbers = itertools.chain(model.named_parameters(), model.named_buffers())
    return type(model), model.training, [(name, x.shape, x.dtype) for name, x in numbers]
