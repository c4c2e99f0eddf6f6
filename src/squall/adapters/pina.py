"""PINA: a loss for its solvers."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss


@final
class _Unlabelled(_Loss):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__(reduction="mean")
        self.loss = loss

    def forward(
        self, input: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]
    ) -> Float[Tensor, ""]:  # A LabelTensor loses its labels in arithmetic and then fails.
        return self.loss(input.as_subclass(Tensor), target.as_subclass(Tensor))


def pina(loss: nn.Module) -> nn.Module:
    """A loss as PINA's solvers accept it: a `torch.nn.modules.loss._Loss` of tensors with labels.

    Args:
        loss: called as `loss(prediction, target)`.

    Example:
        >>> import torch
        >>> float(pina(nn.MSELoss())(torch.zeros(3, 1), torch.ones(3, 1)))
        1.0
    """
    return _Unlabelled(loss)
