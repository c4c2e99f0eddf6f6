"""The vocabulary of axes: batch first, then time, then channel, then space."""

from collections.abc import Callable

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
