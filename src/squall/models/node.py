"""NODE: the rate of every point from its neighbourhood, by a network."""

from typing import final

import torch

from squall._types import State
from squall.models.base import RateModel
from squall.models.point_network import PointNetwork
from squall.models.stencil import neighbourhoods, points_last


@final
class NODE(RateModel):
    r"""The neural ordinary differential equation of a field: a network gives the rate of a point.

    .. math:: \frac{du_m}{dt} = W_3 \tanh(W_2 \tanh(W_1 \, u_{N(m)} + b_1) + b_2) + b_3

    with N(m) the neighbourhood of the point m on the periodic grid, 3 points wide in every dimension. That is
    a periodic convolution of width 3, tanh, a convolution of width 1, tanh, a convolution of width 1. Nothing
    is conserved by construction.

    Args:
        channels: number of fields.
        hidden: width of the two hidden layers.
        dimensions: of space, 1 to 3.
        generator: draws the weights (orthogonal; biases are zero); PyTorch's default one if left out.

    Raises:
        ValueError: for a size outside its range; in a call, for a state of another shape.
        TypeError: in a call, for a state of another dtype than the weights.

    Reference:
        Chen, Rubanova, Bettencourt and Duvenaud, Neural Ordinary Differential Equations, NeurIPS 2018; the
        layers are those of Matsubara, Ishikawa and Yaguchi, Deep Energy-Based Modeling of Discrete-Time
        Physics, NeurIPS 2020.

    Example:
        >>> model = NODE(channels=2, hidden=16, dimensions=2)
        >>> model(torch.zeros(5, 2, 32, 32)).shape
        torch.Size([5, 2, 32, 32])
    """

    def __init__(
        self, channels: int = 1, hidden: int = 200, dimensions: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(channels, hidden, dimensions)
        self.network = PointNetwork(channels * 3**dimensions, hidden, channels, bias=True, generator=generator)

    def forward(self, u: State) -> State:
        self._check(u)
        return points_last(self.network(neighbourhoods(u)), u.shape)
