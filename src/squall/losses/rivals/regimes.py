"""A budget over regimes: classes of points compete for the weight, and no single point can win it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require
from squall.losses.rules import KLBudget
from squall.losses.weights import imbalance_weights


class RegimeBudget(Rival):
    """loss = Σ_k w_k l_k with w the worst case over KL(w‖p) ≤ ρ, w ≤ c p, of the running means of l_k.

    l_k is the mean squared error and p_k the share of the points of regime k in the batch. A regime holds the points of
    a channel whose |target| lies between two quantiles of the training targets: calm, active, extreme by the true rate
    of change where a model predicts rates, by the state where it predicts states. Every point of a regime counts alike,
    so noise in single points moves little. The running means are data (no gradient), move at every call in training
    mode with gradients, and are saved in `state_dict`. Each process has its own.

    Args:
        targets: of the training, (sample, channel, *space).
        rho, cap: ρ > 0 (nats) and c > 1, as for `KLBudget`.
        shares: of the points in the upper tails that start a new regime, falling, in (0, 1).
        channel: the one channel whose size defines the regimes of all (such as vorticity); each its own if left out.
        window: W ≥ 1, length of the running means in steps.

    Reference:
        Sagawa et al., Distributionally robust neural networks for group shifts, ICLR 2020 (the worst case over groups,
        without a budget).

    Example:
        >>> target = torch.arange(10.0).reshape(1, 1, 10)
        >>> loss = RegimeBudget(target, shares=[0.1])
        >>> loss(target + (target > 8), target) > torch.nn.functional.mse_loss(target + (target > 8), target)
        tensor(True)
    """

    axes = (0, 9)
    thresholds: Float[Tensor, "threshold channel"]
    means: Float[Tensor, "regime"]

    def __init__(
        self,
        targets: Tensor,
        *,
        rho: float = 0.3,
        cap: float = float("inf"),
        shares: Sequence[float] = (0.5, 0.1, 0.01, 0.001),
        channel: int | None = None,
        window: float = 100.0,
    ) -> None:
        super().__init__()
        channels = targets.shape[1]
        falling = len(shares) > 0 and list(shares) == sorted({x for x in shares if 0 < x < 1}, reverse=True)
        require(falling, f"RegimeBudget: shares must fall and be in (0, 1), got {list(shares)}")
        require(window >= 1, f"RegimeBudget: window must be at least 1, got {window}")
        require(
            channel is None or 0 <= channel < channels,
            f"RegimeBudget: channel is {channel}, but the data have channels 0 to {channels - 1}",
        )
        self.rho, self.cap, self.shares, self.channel, self.window = rho, cap, tuple(shares), channel, window
        self._rule = KLBudget(rho, cap)
        sizes = targets.detach().abs().transpose(0, 1).flatten(1).double()
        sizes = sizes[:, sizes.isfinite().all(0)].sort(1).values
        places = [round((1 - share) * (sizes.shape[1] - 1)) for share in shares]
        self.register_buffer("thresholds", sizes[:, places].T.to(targets.dtype))
        self.register_buffer("means", torch.full((channels * (len(shares) + 1),), torch.nan, dtype=torch.float64))

    def value(self, batch: Points) -> Tensor:
        made, given = self.thresholds.shape[1], batch.target.shape[1]
        require(given == made, f"RegimeBudget was made for {made} channels, got {given}")
        learns = self.training and torch.is_grad_enabled()
        errors, regimes = batch.error.square(), self.regimes(batch.target)
        with torch.no_grad():
            held, share = errors.double().flatten(), batch.share.double().flatten()
            count = len(self.means)
            p = torch.bincount(regimes.flatten(), share, count)
            batch_means = torch.bincount(regimes.flatten(), share * held, count) / torch.where(p > 0, p, 1)
            means = self._means(batch_means, p > 0, learns)
            w = imbalance_weights(torch.where(p > 0, means, 0), self._rule, measure=p)
            ratio = (w / torch.where(p > 0, p, 1)).to(errors.dtype)
        return (batch.share * ratio[regimes] * errors).sum()

    def regimes(self, target: Float[Tensor, "batch channel *space"]) -> Int[Tensor, "batch channel *space"]:
        """The regime of every point: channel by channel, from calm to extreme."""
        by_channel = self.thresholds.reshape(*self.thresholds.shape, *[1] * (target.dim() - 2))
        labels = torch.stack([target.abs() > level for level in by_channel]).sum(0)
        labels = labels if self.channel is None else labels[:, self.channel : self.channel + 1].expand(target.shape)
        first = torch.arange(target.shape[1], device=target.device) * (len(self.thresholds) + 1)
        return labels + first.reshape(-1, *[1] * (target.dim() - 2))

    def _means(self, of_batch: Float[Tensor, "regime"], present: Tensor, learns: bool) -> Float[Tensor, "regime"]:
        """The running means with this batch; a regime that was never seen starts with its first mean."""
        known = self.means.isfinite()
        if not learns:
            return torch.where(known, self.means, of_batch)
        moved = torch.where(known, self.means + (of_batch - self.means) / self.window, of_batch)
        self.means.copy_(torch.where(present, moved, self.means))
        return self.means
