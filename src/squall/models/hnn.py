"""HNN++: the rate of a field from a learned energy and the known operator of the system."""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import State
from squall.models.base import RateModel
from squall.models.fast.density_gradient import fast_density_gradient
from squall.models.formulas import density_secant
from squall.models.point_network import PointNetwork
from squall.models.stencil import neighbourhoods, scatter_neighbourhoods

Operator = Callable[[Tensor], Tensor]


def energy_rate(energy: Callable[[Tensor], Tensor], structure: Operator, u: State) -> State:
    r"""The rate du/dt = G ∇H(u) that an energy gives, by automatic differentiation.

    `HNN` computes the same for its own energy, with derivatives by hand. Use this for any other energy, such as the
    true one or your own module.

    Args:
        energy: H, from states (batch, 1, *space) to one number per state, (batch,). ∇H is the vector of
            its partial derivatives ∂H/∂u_m, which is dx times the functional derivative: for the rate of a
            system, divide its energy by dx.
        structure: the linear operator G, such as `structure` of a system.
        u: states, (batch, 1, *space).

    Returns:
        the rate, of the shape of u. It can be differentiated again where autograd is enabled.

    Reference:
        Matsubara, Ishikawa and Yaguchi, Deep Energy-Based Modeling of Discrete-Time Physics, NeurIPS 2020.

    Example:
        Advection, du/dt = D u, has the energy Σ u²/2.

        >>> u = torch.tensor([[[0.0, 1.0, 0.0, 3.0]]])
        >>> central = lambda v: (v.roll(-1, -1) - v.roll(1, -1)) / 2
        >>> energy_rate(lambda u: u.square().sum((1, 2)) / 2, central, u).detach()
        tensor([[[-1.,  0.,  1.,  0.]]])
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        u = u if u.requires_grad else u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(u).sum(), u, create_graph=differentiable)
    return structure(gradient)


@final
class HNN(RateModel):
    r"""HNN++: a network gives the energy of a point, and the energy gives the rate.

    .. math::

        \frac{du}{dt} = G \, ∇H(u), \qquad H(u) = \sum_m h(u_{N(m)}), \qquad
        h(x) = w_3 \tanh(W_2 \tanh(W_1 x + b_1) + b_2)

    with N(m) the neighbourhood of the point m on the periodic grid, 3 points wide in every dimension, and G
    the operator of the system: a Laplacian where the energy is dissipated (Cahn-Hilliard), a central
    difference where it is conserved (Korteweg-de Vries). The columns of both sum to zero, so the mass Σ u is
    conserved to rounding whatever the weights are. The sum over points stands for the integral: what H
    learns, up to a constant and multiples of the mass, is the energy over the spacing dx.

    Args:
        structure: the linear operator G, from states to states, such as `structure` of a system.
        hidden: width of the two hidden layers.
        dimensions: of space, 1 to 3. The field is a scalar: there is 1 channel.
        generator: draws the weights (orthogonal; biases are zero); PyTorch's default one if left out.

    Raises:
        TypeError: if `structure` cannot be called; in a call, for a state of another dtype than the weights.
        ValueError: for a size outside its range; in a call, for a state of another shape.

    Reference:
        Matsubara, Ishikawa and Yaguchi, Deep Energy-Based Modeling of Discrete-Time Physics, NeurIPS 2020
        (its HNN++, after Greydanus, Dzamba and Yosinski, Hamiltonian Neural Networks, NeurIPS 2019).

    Example:
        >>> laplacian = lambda v: v.roll(1, -1) - 2 * v + v.roll(-1, -1)
        >>> model = HNN(laplacian, hidden=16)
        >>> u = torch.linspace(-1, 1, 50).expand(5, 1, 50)
        >>> model(u).shape, model.energy(u).shape
        (torch.Size([5, 1, 50]), torch.Size([5]))
    """

    def __init__(
        self, structure: Operator, hidden: int = 200, dimensions: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(1, hidden, dimensions)
        if not callable(structure):
            raise TypeError(
                f"HNN: structure is {structure!r}, but must be a function from states to states, "
                "such as the method `structure` of a system"
            )
        self.structure = structure
        self.network = PointNetwork(3**dimensions, hidden, 1, bias=False, generator=generator)

    def energy(self, u: State) -> Float[Tensor, " batch"]:
        """The learned energy H(u) of every state, in units of its own."""
        self._check(u)
        return self.network(neighbourhoods(u)).reshape(u.shape[0], -1).sum(1)

    def energy_gradient(self, u: State) -> State:
        """∇H(u), the partial derivatives ∂H/∂u_m of the learned energy."""
        self._check(u)
        gradient = fast_density_gradient(neighbourhoods(u), *self.network.weights)
        return scatter_neighbourhoods(gradient, u.shape)

    def forward(self, u: State) -> State:
        return self.structure(self.energy_gradient(u))

    def between(self, u: State, following: State) -> State:
        """G ∇̄H(u, u'), the mean rate over a step between two states, by a discrete gradient of the learned energy:
        (u' − u) · ∇̄H = H(u') − H(u). The integrator `discrete_gradient` takes it."""
        self._check(u)
        rows = neighbourhoods(u), neighbourhoods(following)
        return self.structure(scatter_neighbourhoods(density_secant(*rows, *self.network.weights), u.shape))
