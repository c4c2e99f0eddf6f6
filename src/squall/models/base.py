"""The interface of the models."""

import abc

import torch
from torch import nn

from squall._types import State


class RateModel(nn.Module, abc.ABC):
    """A model of the rate du/dt of a state u on a periodic grid, translation-equivariant by construction.

    Call it with states of shape (batch, channel, *space); the rate has the same shape. Your own
    model need not inherit from this class: any `torch.nn.Module` with this call works in its place.

    Args:
        channels: number of fields.
        hidden: width of the two hidden layers.
        dimensions: of space, 1 to 3.
    """

    def __init__(self, channels: int, hidden: int, dimensions: int) -> None:
        super().__init__()
        check_sizes(self, channels=channels, hidden=hidden, dimensions=dimensions)
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
        check_precision(self, u)


def check_precision(model: nn.Module, u: State) -> None:
    """Refuse states in another precision than the weights."""
    dtype = next(model.parameters()).dtype
    if u.dtype != dtype and not torch.is_autocast_enabled(u.device.type):
        raise TypeError(
            f"{type(model).__name__}: the state is {u.dtype} and the weights are {dtype}; convert one of them, as by "
            "model.to(u.dtype)"
        )


def check_sizes(model: nn.Module, **sizes: int) -> None:
    """Refuse a size that is smaller than 1 (than 0 of inputs that are optional), and more than three dimensions."""
    for name, value in sizes.items():
        least = 0 if name in ("conditions", "film", "noise") else 1
        if value < least or (name == "dimensions" and value > 3):
            allowed = "1 to 3" if name == "dimensions" else f"at least {least}"
            raise ValueError(f"{type(model).__name__}: {name} is {value}, but must be {allowed}")
