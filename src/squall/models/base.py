"""The interface of the models."""

import abc

import torch
from torch import nn

from squall._types import State


class RateModel(nn.Module, abc.ABC):
    """A model of the rate du/dt of a state u on a periodic grid, translation-equivariant by construction.

    Call it with states of shape (batch, channel, *space); the rate has the same shape. A model of one's own
    need not inherit from this class: any `torch.nn.Module` with such a call goes wherever these go.

    Args:
        channels: number of fields.
        hidden: width of the two hidden layers.
        dimensions: of space, 1 to 3.
    """

    def __init__(self, channels: int, hidden: int, dimensions: int) -> None:
        super().__init__()
        for name, value, most in [
            ("channels", channels, None),
            ("hidden", hidden, None),
            ("dimensions", dimensions, 3),
        ]:
            if value < 1 or (most is not None and value > most):
                allowed = "at least 1" if most is None else f"1 to {most}"
                raise ValueError(f"{type(self).__name__}: {name} is {value}, but must be {allowed}")
        self.channels, self.hidden, self.dimensions = channels, hidden, dimensions

    @abc.abstractmethod
    def forward(self, u: State) -> State:
        """The rate du/dt at the states u, in units of u per unit of the time that it was trained on."""

    def extra_repr(self) -> str:
        return f"channels={self.channels}, hidden={self.hidden}, dimensions={self.dimensions}"

    def _check(self, u: State) -> None:
        name = type(self).__name__
        if u.dim() != self.dimensions + 2 or u.shape[1] != self.channels:
            raise ValueError(
                f"{name}: the state has shape {tuple(u.shape)}, but this model takes "
                f"(batch, channel, *space) with {self.channels} channel(s) and {self.dimensions} axes "
                "of space; see its arguments channels and dimensions"
            )
        dtype = next(self.parameters()).dtype
        if u.dtype != dtype and not torch.is_autocast_enabled(u.device.type):
            raise TypeError(
                f"{name}: the state is {u.dtype} and the weights are {dtype}; convert one of them, "
                "as by model.to(u.dtype)"
            )
