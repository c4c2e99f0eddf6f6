"""neuraloperator: a loss for its Trainer."""

from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn


@final
class _OverSamples(nn.Module):
    reduction = "sum"

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, out: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], **sample: Any) -> Float[Tensor, ""]:
        return self.loss(out, y) * len(out)


def neuraloperator(loss: nn.Module) -> nn.Module:
    """A loss as neuraloperator's `Trainer` calls it: `loss(out, **sample)`, summed over the samples of a batch.

    The trainer divides what it reports by the number of samples, so it reports the mean of `loss`. The gradient is that
    of `loss` times the batch size, as with the losses of neuraloperator.

    Args:
        loss: called as `loss(prediction, target)`, with a mean.

    Example:
        >>> import torch
        >>> float(neuraloperator(nn.MSELoss())(torch.zeros(4, 1, 8), x=None, y=torch.ones(4, 1, 8)))
        4.0
    """
    return _OverSamples(loss)
