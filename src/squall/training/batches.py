"""Minibatches: windows of states, what stands beside them, and what the loss compares."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from squall._types import State, Trajectories
from squall.data import Normalization, Transitions
from squall.integrators import Array
from squall.losses import ImbalanceAwareLoss
from squall.models.inputs import Conditions, Inputs, Window, read_conditions
from squall.training.settings import TrainingSettings

Unit = Float[Tensor, "channel *ones"]

Target = Float[Tensor, "batch channel *lead_and_space"]
"""(batch, channel, *space); (batch, channel, lead, *space) where several lead times are compared."""

Indices = Int[Tensor, " batch"]


class Batch(NamedTuple):
    """A minibatch, or a part of it.

    Attributes:
        window: states up to the present one, noise included, (batch, history, channel, *space).
        target: the mean rate from the present state to each lead time, times lead, or the states then.
        conditions: at the times of the steps, (batch, step or 1, condition, *space).
        numbers: of the transitions.
    """

    window: Window
    target: Target
    conditions: Conditions | None
    numbers: Indices

    def on(self, to: Callable[[Tensor], Tensor]) -> "Batch":
        """With its real numbers on the device and in the precision that `to` brings them to."""
        conditions = None if self.conditions is None else to(self.conditions)
        return Batch(to(self.window), to(self.target), conditions, self.numbers)

    def repeated(self, members: int) -> "Batch":
        """Every transition `members` times, member by member."""
        return self if members == 1 else Batch(*(None if x is None else torch.cat([x] * members) for x in self))  # pyright: ignore[reportArgumentType]

    def split(self, count: int) -> "list[Batch]":
        """`count` parts of about equal size."""
        if count == 1:
            return [self]
        parts = [[None] * count if x is None else x.tensor_split(count) for x in self]
        return [Batch(*part) for part in zip(*parts, strict=True)]  # pyright: ignore[reportArgumentType]


class Batches:
    """Minibatches of transitions; residuals are divided by the scale of their channel.

    Args:
        transitions: windows of `history` states and `unroll` next ones.
        settings: residual, lead times, noise and seed.
        scale: one number per channel; 1 if left out.
        conditions: names of the model's.
    """

    def __init__(
        self,
        transitions: Transitions,
        settings: TrainingSettings,
        scale: Sequence[float] | None,
        conditions: tuple[str, ...] = (),
    ) -> None:
        self.transitions, self.dt, self.settings = transitions, transitions.dt, settings
        self.inputs = Inputs(transitions.history, conditions)
        self.residual, source = settings.residual, transitions.source
        self.leads = settings.leads
        unit = torch.tensor(scale or (1.0,), dtype=torch.float64)
        self.unit = unit.reshape(-1, *[1] * (len(source.space) + (self.leads > 1)))
        self._noise = self._error = None
        if settings.input_noise or settings.corrupt_share:
            std = torch.tensor(Normalization.fit(source).std, dtype=source.dtype)
            std = std.reshape(-1, *[1] * len(source.space))
            self._noise = settings.input_noise * std if settings.input_noise else None
            self._error = settings.corrupt_by * std if settings.corrupt_share else None

    def draw(self, indices: Indices, step: int = 0, rank: int = 0, world: int = 1) -> Batch:
        """The share of one of `world` processes, in the precision of the data: float32 differences lose digits."""
        mine = indices[rank::world]
        history, unroll = self.transitions.history, self.transitions.unroll
        if history == unroll == 1:
            u, future = self.transitions.fetch(mine)
            window, future = u.unsqueeze(1), future.unsqueeze(1)
        else:
            states = self.transitions.windows(mine)
            window, future = states[:, :history].contiguous(), states[:, history:]
        if self._noise is not None:
            window = window + self._noise * self._normal(len(indices), window, step)[rank::world]
        if self._error is not None:
            future = future + self._error * self._wrong(mine, future)
        u, future = window[:, -1], future[:, -self.leads :]
        return Batch(window, self.target(u, future), self._conditions(mine), mine)

    def _normal(self, batch: int, window: Window, step: int) -> Float[Tensor, "_batch history channel *space"]:
        """Standard normal numbers for the whole minibatch, a function of seed and step alone."""
        generator = np.random.default_rng((self.settings.seed, step, 1))
        return torch.from_numpy(generator.standard_normal((batch, *window.shape[1:]), np.float32)).to(window.dtype)

    def _wrong(self, indices: Indices, future: Trajectories) -> Trajectories:
        """±1 in the wrong cells of each transition, 0 elsewhere: a function of `corrupt_seed` and its number alone."""
        share, seed = self.settings.corrupt_share, self.settings.corrupt_seed
        drawn = [np.random.default_rng((seed, i)).random(future.shape[1:]) for i in indices.tolist()]
        cells = torch.from_numpy(np.stack(drawn))
        return (cells < share / 2).to(future.dtype) - (cells >= 1 - share / 2).to(future.dtype)

    def _conditions(self, indices: Indices) -> Conditions | None:
        names, skipped = self.inputs.conditions, self.transitions.history - 1
        if not names:
            return None
        trajectories, starts = self.transitions.locate(indices)
        length = self.transitions.unroll
        return read_conditions(self.transitions.source, names, trajectories, starts + skipped, length)

    def target(self, u: State, future: Float[Tensor, "batch lead channel *space"]) -> Target:
        """What is predicted: (û − u)/dt, the mean rate times the number of steps, or û."""
        if self.leads == 1:
            return (future[:, 0] - u) / self.dt if self.residual == "rate" else future[:, 0]
        future = future.transpose(1, 2)
        return (future - u.unsqueeze(2)) / self.dt if self.residual == "rate" else future

    def following(self, batch: Batch) -> State:
        """The next states of the data, where one lead time is compared."""
        return batch.window[:, -1] + self.dt * batch.target if self.residual == "rate" else batch.target

    def compared(self, change: Array, u: Float[Tensor, "..."], target: Array, unit: Unit) -> tuple[Array, Array]:
        """Prediction and target for the loss, from (û − u)/dt; `unit` where and as they are."""
        if self.residual == "state":
            change = (u if self.leads == 1 else u.unsqueeze(2)) + self.dt * change
        return change / unit, target / unit


def beside(loss: nn.Module, batches: Batches, device: torch.device) -> dict[str, Shaped[Tensor, "..."]]:
    """Mask and areas of the data, as the loss takes them beside prediction and target.

    Raises:
        ValueError: if the loss takes none.
    """
    source = batches.transitions.source
    mask, measure = source.mask, source.measure if batches.settings.areas else None
    if mask is not None and batches.leads > 1:
        mask = mask.unsqueeze(1)  # (channel, lead, *space)
    given = {"mask": mask, "measure": measure}
    for name, value in given.items():
        if value is not None and not takes(loss, name):
            what = "points are masked" if name == "mask" else "cells have unequal areas"
            raise ValueError(
                f"{source.name}: {what}, but {type(loss).__name__} takes no {name}: use a loss that is called as "
                f"loss(prediction, target, mask=..., measure=...)"
                + ("" if name == "mask" else ", or set training.areas: false")
            )
    return {name: value.to(device) for name, value in given.items() if value is not None}


def refuse_without_leads(loss: nn.Module | None, settings: TrainingSettings) -> None:
    """Refuse a loss that is normalised in each lead time where it sees only one.

    Raises:
        ValueError: naming the options.
    """
    if settings.leads == 1 and isinstance(loss, ImbalanceAwareLoss) and loss.recipe.over == "lead":
        raise ValueError(
            f"over='lead' normalises in each lead time, but with training.unroll {settings.unroll} and unroll_gradient "
            f"'{settings.unroll_gradient}' the loss sees one: unroll several steps with 'all' or 'step', or use "
            "over='all'"
        )


def takes(loss: nn.Module, name: str) -> bool:
    """Whether a loss can be called with an argument of this name."""
    parameters: Any = inspect.signature(loss.forward).parameters
    open_ended = name != "index" and any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or open_ended
