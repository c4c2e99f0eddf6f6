"""A model of normalised fields, seen from outside in the units of the data."""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from squall._types import State

__all__ = ["Normalized"]


@final
class Normalized(nn.Module):
    """Wraps a model of v = (u − mean)/std so that it takes and returns the units of u.

    For a model of the rate, du/dt = std · f(v); for a model of the next state, u' = mean + std · f(v).

    Args:
        model: the model of normalised fields, (batch, channel, *space).
        mean: one number per channel, in the units of u.
        std: one positive number per channel, in the units of u.
        predicts: whether the model returns the rate or the next state.

    Example:
        >>> model = Normalized(torch.nn.Identity(), mean=[1.0], std=[2.0])
        >>> model(torch.tensor([[[5.0]]]))
        tensor([[[4.]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        predicts: Literal["rate", "state"] = "rate",
    ) -> None:
        super().__init__()
        self.model, self.predicts = model, predicts
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, u: State) -> State:
        shape = (-1, *[1] * (u.dim() - 2))
        mean, std = self.mean.reshape(shape), self.std.reshape(shape)
        change = std * self.model((u - mean) / std)
        return change if self.predicts == "rate" else mean + change
