"""The dynamic channel loss of Samudra 2: no channel rules by its unit or its difficulty."""

import torch
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require


class ChannelLoss(Rival):
    """loss = mean_c s_c l_c, then s_c ← ((W − 1) s_c + clamp(1/l_c, m, L m)) / W with m = min_c 1/l_c.

    l_c is the mean squared error of channel c in the batch. The scales s start at 1, are data (no gradient), move at
    every call in training mode with gradients, and are saved in `state_dict`. A channel that is masked wholly does not
    count. Each process has its own scales.

    Args:
        channels: number of channels.
        limit: L ≥ 1, dimensionless: no new scale is more than L times the smallest; 100, as published (20 in places).
        window: W ≥ 1, length of the running mean in steps; 25, as published.

    Reference:
        Samudra 2, 2026 (arXiv 2606.02610).

    Example:
        >>> loss = ChannelLoss(2, window=1)
        >>> prediction, target = torch.tensor([[1.0, 3.0]]).requires_grad_(), torch.zeros(1, 2)
        >>> [round(loss(prediction, target).item(), 3) for _ in range(2)]
        [5.0, 1.0]
    """

    axes = (0, 9)
    scales: Tensor

    def __init__(self, channels: int, *, limit: float = 100.0, window: float = 25.0) -> None:
        super().__init__()
        require(min(limit, window) >= 1, f"ChannelLoss: limit and window must be at least 1; got {limit}, {window}")
        self.limit, self.window = limit, window
        self.register_buffer("scales", torch.ones(channels))

    def value(self, batch: Points) -> Tensor:
        share, errors = (x.transpose(0, 1).flatten(1) for x in (batch.share, batch.error.square()))
        made = len(self.scales)
        require(len(share) == made, f"ChannelLoss was made for {made} channels, got {len(share)}")
        counts = share.sum(1) > 0
        means = (share * errors).sum(1)[counts] / share.sum(1)[counts]
        value = (self.scales[counts].to(means) * means).mean()
        if self.training and torch.is_grad_enabled():
            wanted = 1 / torch.where(means > 0, means, 1e-8).detach().to(self.scales)
            wanted = wanted.clamp(max=self.limit * wanted.min())
            self.scales[counts] += (wanted - self.scales[counts]) / self.window
        return value
