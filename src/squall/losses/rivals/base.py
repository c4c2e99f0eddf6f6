"""What the rivals share: one interface, and the checked points of a batch."""

import abc
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from squall.losses.checks import check_any, check_finite, check_pair, combined_measure


class Points(NamedTuple):
    """A batch, masked points replaced by 0; all of one shape."""

    prediction: Tensor
    target: Tensor
    error: Tensor
    """e = prediction − target, with its sign."""
    share: Tensor
    """p = μ/Σμ: 1/n without a measure, 0 where masked."""


def points(prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None) -> Points:
    """Check a batch; arguments and errors as for `ImbalanceAwareLoss`."""
    prediction, target = check_pair(prediction, target, "all")
    total = combined_measure(mask, measure, prediction)
    if mask is not None:  # replaced before the subtraction: 0 · NaN would be the gradient
        prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
    error = prediction - target
    check_finite(error.detach().abs(), prediction, target)
    if total is None:
        return Points(prediction, target, error, error.new_tensor(1 / error.numel()).expand(error.shape))
    everything = total.sum(dtype=torch.float64)
    check_any(float(everything))
    return Points(prediction, target, error, (total / everything).to(error.dtype))


class Rival(nn.Module, abc.ABC):
    """A loss(prediction, target, *, mask=None, measure=None) → scalar of tensors (batch, channel, *space)."""

    axes: tuple[int, int] | None = None
    """The least and the largest number of axes of space; None: any shape."""
    refuses: MappingProxyType[str, str] = MappingProxyType({})
    """The arguments that have no meaning for this loss, with the reason."""

    def forward(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; arguments and errors as for `ImbalanceAwareLoss`."""
        name = type(self).__name__
        for argument, given in (("mask", mask), ("measure", measure)):
            require(given is None or argument not in self.refuses, f"{name}: {self.refuses.get(argument)}")
        if self.axes is not None and not self.axes[0] <= prediction.dim() - 2 <= self.axes[1]:
            few, most = self.axes
            axes = f"{few} to {most} axes" if most > few else f"{few} axes"
            raise ValueError(f"{name} takes (batch, channel, *space), {axes} of space; got {[*prediction.shape]}")
        return self.value(points(prediction, target, mask, measure))

    @abc.abstractmethod
    def value(self, batch: Points) -> Tensor:
        """The loss of checked points."""


def require(holds: bool, message: str) -> None:
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(message)


def ascending(x: Tensor) -> Tensor:
    """The values sorted along the last axis; on a CPU by NumPy, which is up to 30 times as fast."""
    x = x.detach()
    return torch.from_numpy(np.sort(x.numpy())) if x.device.type == "cpu" else x.sort().values


def descending(errors: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The errors in one row, the largest first, and their shares in float64, which add up to 1."""
    errors, share = errors.detach().flatten(), share.flatten()
    if share.stride() == (0,):  # every point counts alike: the order itself does not matter
        return ascending(errors).flip(0), torch.full_like(errors, 1 / len(errors), dtype=torch.float64)
    errors, order = torch.where(share > 0, errors, -torch.inf).sort(descending=True)
    share = share[order].double()
    return errors, share / share.sum()


def root(x: Tensor) -> Tensor:
    """√x, with derivative 0 at 0, where that of torch.sqrt is infinite."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x/y for y ≥ 0, and 0 where y = 0."""
    return torch.where(y > 0, x / torch.where(y > 0, y, 1), 0)
