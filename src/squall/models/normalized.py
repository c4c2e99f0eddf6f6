"""A model of normalized fields, seen from outside in the units of the data."""

from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from squall._types import State
from squall.integrators import rate_between
from squall.models.inputs import Joined


@final
class Normalized(nn.Module):
    """Wraps a model of v = (u − mean)/std so that it takes and returns the units of u.

    For a model of the rate, du/dt = std · f(v); for a model of the next state, u' = mean + std · f(v), or, as a
    residual, u' = u + std · f(v). Conditions are normalized likewise, by numbers of their own.

    Args:
        model: the model of normalized fields, (batch, channel, *space).
        mean: one number per channel, in the units of u.
        std: one positive number per channel, in the units of u.
        predicts: whether the model returns the rate or the next state.
        residual: whether a model of the next state returns its difference to the present one.
        history: number of states in the input.
        condition_mean, condition_std: one number per channel of the conditions.
        mask: False where v is set to 0, the mean of the field.

    Example:
        >>> model = Normalized(torch.nn.Identity(), mean=[1.0], std=[2.0])
        >>> model(torch.tensor([[[5.0]]]))
        tensor([[[4.]]])
    """

    mean: Tensor
    std: Tensor
    condition_mean: Tensor
    condition_std: Tensor
    mask: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        predicts: Literal["rate", "state"] = "rate",
        *,
        residual: bool = False,
        history: int = 1,
        condition_mean: Sequence[float] = (),
        condition_std: Sequence[float] = (),
        mask: Bool[Tensor, "channel *space"] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.predicts, self.residual, self.history = model, predicts, residual, history
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.conditions = len(condition_mean)
        if condition_mean:
            self.register_buffer("condition_mean", torch.tensor(condition_mean, dtype=torch.float32))
            self.register_buffer("condition_std", torch.tensor(condition_std, dtype=torch.float32))
        self.register_buffer("mask", mask)

    def forward(self, x: Joined) -> State:
        shape = (-1, *[1] * (x.dim() - 2))
        mean, std = self.mean.reshape(shape), self.std.reshape(shape)
        change = std * self.model(self._normal(x, mean, std))
        if self.predicts == "rate":
            return change
        if not self.residual:
            return mean + change
        channels = len(self.mean)
        return x[:, (self.history - 1) * channels : self.history * channels] + change

    def between(self, u: State, following: State) -> State:
        """The mean rate over a step between two states; see `HNN.between`."""
        between = rate_between(self.model)
        shape = (-1, *[1] * (u.dim() - 2))
        mean, std = self.mean.reshape(shape), self.std.reshape(shape)
        return std * between(*(self._normal(x, mean, std) for x in (u, following)))

    def _normal(self, x: Joined, mean: Float[Tensor, "channel *ones"], std: Float[Tensor, "channel *ones"]) -> Joined:
        if self.history > 1 or self.conditions:
            means, stds = [mean] * self.history, [std] * self.history
            if self.conditions:
                means.append(self.condition_mean.reshape(-1, *mean.shape[1:]))
                stds.append(self.condition_std.reshape(-1, *std.shape[1:]))
            mean, std = torch.cat(means), torch.cat(stds)
        v = (x - mean) / std
        if self.mask is None:
            return v
        seen = [self.mask] * self.history
        if self.conditions:
            seen.append(self.mask.new_ones(self.conditions, *self.mask.shape[1:]))
        return torch.where(torch.cat(seen), v, 0)
