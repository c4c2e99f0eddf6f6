"""The network that the models apply at every point."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from squall.models.fast.point_network import fast_point_network
from squall.models.formulas import Bias, First, Last, Second


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

    @property
    def weights(self) -> tuple[First, Bias, Second, Bias, Last]:
        """W₁, b₁, W₂, b₂, W₃."""
        return self.first.weight, self.first.bias, self.second.weight, self.second.bias, self.last.weight

    def forward(self, rows: Float[Tensor, "row column"]) -> Float[Tensor, "row output"]:
        y = fast_point_network(rows, *self.weights)
        return y if self.last.bias is None else y + self.last.bias


def _linear(inputs: int, outputs: int, *, bias: bool, generator: torch.Generator | None) -> nn.Linear:
    # Made on the meta device, because the constructor would draw weights from the global generator.
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device=torch.get_default_device())
    nn.init.orthogonal_(layer.weight, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
