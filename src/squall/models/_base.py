"""What the models share: their interface, and the network that they apply at every point."""

import abc
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

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

    def _check(self, u: Tensor) -> None:
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


@final
class PointNetwork(nn.Module):
    r"""y = W₃ tanh(W₂ tanh(W₁ x + b₁) + b₂) + b₃, at every row x.

    The weights are drawn orthogonal and the biases are zero. A row is a point of the grid, so the hidden
    layers, which are convolutions of width 1, are plain matrix products.

    Args:
        inputs: length of x.
        hidden: width of both hidden layers.
        outputs: length of y.
        bias: whether there is a b₃.
        generator: draws the weights; PyTorch's default one if left out.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, bias: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.first = _linear(inputs, hidden, bias=True, generator=generator)
        self.second = _linear(hidden, hidden, bias=True, generator=generator)
        self.last = _linear(hidden, outputs, bias=bias, generator=generator)

    def forward(self, rows: Float[Tensor, "row column"]) -> Float[Tensor, "row output"]:
        # in place: no derivative needs what goes into a tanh
        return self.last(self.second(self.first(rows).tanh_()).tanh_())


def _linear(inputs: int, outputs: int, *, bias: bool, generator: torch.Generator | None) -> nn.Linear:
    # Made on the meta device, because the constructor would draw weights from the global generator.
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device=torch.get_default_device())
    nn.init.orthogonal_(layer.weight, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
