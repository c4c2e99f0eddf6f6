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
    if torch.compiler.is_exporting():
        return 2 * (_half_tanh(_half_tanh(x, w1, b1), w2, b2, of_half=True) @ w3.T)
    return _layer(_layer(x, w1, b1), w2, b2) @ w3.T


def density_gradient(x: Rows, w1: First, b1: Bias, w2: Second, b2: Bias, w3: Float[Tensor, "1 hidden"]) -> Rows:
    r"""∂h/∂x of the energy density h(x) = w₃ tanh(W₂ tanh(W₁ x + b₁) + b₂), for every row x.

    .. math::

        a_1 = \tanh(W_1 x + b_1), \quad a_2 = \tanh(W_2 a_1 + b_2), \\
        d_2 = (1 - a_2^2) w_3, \quad d_1 = (1 - a_1^2) \, W_2^T d_2, \quad ∂h/∂x = W_1^T d_1

    Args:
        x: neighbourhoods.
        w1, b1, w2, b2, w3: W₁, b₁, W₂, b₂, w₃.
    """
    a1 = _layer(x, w1, b1)
    a2 = _layer(a1, w2, b2)
    d2 = _times_slope(w3, a2)
    d1 = _times_slope(d2 @ w2, a1)
    return torch.nn.functional.linear(d1, w1.T.contiguous())  # d1 @ w1, four times as fast


def density_secant(x: Rows, y: Rows, w1: First, b1: Bias, w2: Second, b2: Bias, w3: Float[Tensor, "1 hidden"]) -> Rows:
    r"""The discrete gradient of the energy density h of `density_gradient` between two rows x and y each.

    The slope of every tanh is replaced by its secant s, so that (y − x) · result = h(y) − h(x):

    .. math:: s = \frac{\tanh β - \tanh α}{β - α} = \frac{\tanh(β - α)}{β - α} (1 - \tanh α \tanh β)

    Args:
        x, y: neighbourhoods.
        w1, b1, w2, b2, w3: W₁, b₁, W₂, b₂, w₃.

    Reference:
        Matsubara, Ishikawa and Yaguchi, Deep Energy-Based Modeling of Discrete-Time Physics, NeurIPS 2020
        (automatic discrete differentiation).
    """
    first = [torch.addmm(b1, rows, w1.T) for rows in (x, y)]
    a1 = [torch.tanh(z) for z in first]
    second = [torch.addmm(b2, a, w2.T) for a in a1]
    a2 = [torch.tanh(z) for z in second]
    d2 = w3 * _secant(second[1] - second[0], *a2)
    return ((d2 @ w2) * _secant(first[1] - first[0], *a1)) @ w1


def _secant(d: Float[Tensor, "row hidden"], a: Float[Tensor, "row hidden"], b: Float[Tensor, "row hidden"]) -> Tensor:
    """(b − a)/d with a = tanh α, b = tanh β and d = β − α, without the difference."""
    small = d.abs() < 0.03  # there the series is off by 1e-14
    safe = torch.where(small, 1, d)
    squares = torch.where(small, d, 0).square()
    series = 1 - squares * (1 / 3 - squares * (2 / 15 - squares * (17 / 315)))
    return torch.where(small, series, torch.tanh(safe) / safe) * (1 - a * b)


def _layer(x: Rows, w: Float[Tensor, "hidden column"], b: Bias) -> Float[Tensor, "row hidden"]:
    """tanh(W x + b)."""
    if not torch.compiler.is_exporting():
        return torch.tanh(torch.addmm(b, x, w.T))
    return _half_tanh(x, w, b).mul_(2)


def _half_tanh(
    x: Rows, w: Float[Tensor, "hidden column"], b: Bias, of_half: bool = False
) -> Float[Tensor, "row hidden"]:
    """tanh(W x + b) / 2 for programs, where x may be half of what is meant. Products with 2 and 4 are exact."""
    # tanh z / 2 = σ(2 z) − 1/2: on a CPU PyTorch's sigmoid takes 0.2 ns a number, its tanh 2.1, and fresh memory for a
    # large result more than either.
    return torch.addmm(b, x, w.T, beta=2, alpha=4 if of_half else 2).sigmoid_().sub_(0.5)


def _times_slope(g: Float[Tensor, "_ hidden"], a: Float[Tensor, "row hidden"]) -> Float[Tensor, "row hidden"]:
    """(1 − a²) g, with a = tanh z: g times the slope of the tanh at z."""
    if not torch.compiler.is_exporting():
        return (1 - a.square()) * g
    return torch.ops.aten.tanh_backward(g, a)  # one operation of the program instead of three
