"""What NODE and HNN compute at every point, in plain PyTorch; `fast` computes the same, equal to rounding."""

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "row column"]
First = Float[Tensor, "hidden column"]
Second = Float[Tensor, "hidden hidden"]
Bias = Float[Tensor, " hidden"]
Last = Float[Tensor, "output hidden"]


def point_network(x: Rows, w1: First, b1: Bias, w2: Second, b2: Bias, w3: Last) -> Float[Tensor, "row output"]:
    r"""y = W₃ tanh(W₂ tanh(W₁ x + b₁) + b₂), for every row x.

    Args:
        x: neighbourhoods.
        w1, b1, w2, b2, w3: W₁, b₁, W₂, b₂, W₃.
    """
    a1 = torch.tanh(torch.addmm(b1, x, w1.T))
    a2 = torch.tanh(torch.addmm(b2, a1, w2.T))
    return a2 @ w3.T


def density_gradient(x: Rows, w1: First, b1: Bias, w2: Second, b2: Bias, w3: Float[Tensor, "1 hidden"]) -> Rows:
    r"""∂h/∂x of the energy density h(x) = w₃ tanh(W₂ tanh(W₁ x + b₁) + b₂), for every row x.

    .. math::

        a_1 = \tanh(W_1 x + b_1), \quad a_2 = \tanh(W_2 a_1 + b_2), \\
        d_2 = (1 - a_2^2) w_3, \quad d_1 = (1 - a_1^2) \, W_2^T d_2, \quad ∂h/∂x = W_1^T d_1

    Args:
        x: neighbourhoods.
        w1, b1, w2, b2, w3: W₁, b₁, W₂, b₂, w₃.
    """
    a1 = torch.tanh(torch.addmm(b1, x, w1.T))
    a2 = torch.tanh(torch.addmm(b2, a1, w2.T))
    d2 = (1 - a2.square()) * w3
    d1 = (1 - a1.square()) * (d2 @ w2)
    return d1 @ w1
