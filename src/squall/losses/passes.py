"""What passes over a batch promise to the loss, whatever they run on."""

import abc

from torch import Tensor

from squall.losses.population import Number
from squall.losses.sums import Sums

__all__ = ["MANY", "Passes"]

MANY = 1 << 22
"""Points from which on the temperature moves so little that fewer moments do."""


class Passes(abc.ABC):
    """Passes over one batch of n points with errors l, and μ of mean 1 where they carry a measure."""

    count: int
    """n."""
    moments: tuple[int, int]
    """How many moments of e and of e² pay: the more, the farther the temperature moves without another pass."""
    single: bool
    """Whether in float32."""
    measure: Tensor | None = None
    """μ."""

    @abc.abstractmethod
    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l, NaN or ∞ where an error is not finite."""

    @abc.abstractmethod
    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        """Sums over z = β l and e = exp(z − max z), with so many moments of e and e², see `Sums`."""

    def anticipate(self, beta: float, top: float, scale: float) -> None:  # noqa: B027
        """Start what `gradient` is going to be asked for, if that gains time."""

    @abc.abstractmethod
    def gradient(self, beta: float, top: float, scale: float, factor: Number = 1.0) -> Tensor:
        """scale · factor · (prediction − target) · exp(β l − top), a new tensor, without waiting for a device."""

    @abc.abstractmethod
    def sample(self) -> tuple[Tensor, Tensor | None]:
        """Errors of points all over the batch (of all points of a small one), and their μ."""
