"""The Well: a loss for the Trainer of its benchmark."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

States = Float[Tensor, "batch time *space channel"]


@final
class SquallLoss(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, prediction: States, target: States, metadata: Any = None) -> Float[Tensor, "..."]:
        if torch.is_grad_enabled():
            return self.loss(prediction.movedim(-1, 1), target.movedim(-1, 1))
        space = tuple(range(2, prediction.dim() - 1))
        return (prediction - target).square().mean(space)


def the_well(loss: nn.Module) -> nn.Module:
    """A loss as the benchmark of The Well calls it: `loss(prediction, target, metadata)`, channels last.

    In training it is `loss` of states with channels before time and space. In validation the trainer expects a number
    per sample, time and field; there it is the mean squared error over space.

    Args:
        loss: called as `loss(prediction, target)`.

    Example:
        >>> states = torch.zeros(2, 1, 8, 8, 3)
        >>> the_well(nn.MSELoss())(states, states + 1, None).item()
        1.0
    """
    return SquallLoss(loss)
