"""The vocabulary of axes: batch first, then time, then channel, then space; and what a validation answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

State = Float[Tensor, "batch channel *space"]
"""States u, one per batch element; the space axes are last."""

Trajectory = Float[Tensor, "time channel *space"]
"""One trajectory: the states at equally spaced times."""

Trajectories = Float[Tensor, "batch time channel *space"]
"""Several trajectories of equal length."""

PerState = Float[Tensor, "*batch"]
"""One number per state, such as its energy."""

Rate = Callable[[Tensor], Tensor]
"""Anything that maps a state to its rate du/dt: a system's `rate`, a model, a lambda."""


@dataclass(frozen=True, order=True)
class Score:
    """How well a model rolls out: fewer diverged trajectories first, then the smaller error."""

    diverged: int
    error: float


@dataclass(frozen=True)
class Validation:
    """What a validation found: the score that selects the best model, and numbers to log.

    `fields` are truth and prediction of the first rollout, (time, channel, *space), where they are kept for a picture.
    """

    score: Score
    metrics: Mapping[str, float | None]
    fields: tuple[Any, Any] | None = None
