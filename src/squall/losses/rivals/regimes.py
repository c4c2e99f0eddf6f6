"""A budget over regimes: classes of points compete for the weight, and no single point can win it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require
from squall.losses.rules import KLBudget
from squall.losses.weights import imbalance_weights

Cells = Sequence[tuple[Tensor, bool]]
"""For each axis of space the lengths of its cells, broadcastable to (*space), and whether it is periodic."""


def steepness(u: Float[Tensor, "*shape"], cells: Cells) -> Float[Tensor, "*shape"]:
    """|∇u| over the last axes by central differences, one-sided at ends."""
    square = torch.zeros_like(u)
    for axis, (length, periodic) in enumerate(cells, -len(cells)):
        if u.shape[axis] == 1:
            continue
        change = (u.roll(-1, axis) - u.roll(1, axis)) / 2 if periodic else torch.gradient(u, dim=axis)[0]
        square = square + (change / length.to(u)).square()
    return square.sqrt()


def tails(
    values: Float[Tensor, "*shape"], measure: Float[Tensor, "*shape"], shares: Sequence[float], axes: int
) -> Int[Tensor, "*shape"]:
    """In how many upper tails of its state, the last axes, a point is: larger ones have less than the share."""
    flat, mass = values.flatten(-axes), measure.flatten(-axes).double()
    ordered, order = flat.sort(-1, descending=True)
    mass = mass.gather(-1, order)
    larger = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True)
    labels = torch.zeros_like(order)
    for share in shares:
        last = ((larger < share).sum(-1, keepdim=True) - 1).clamp(min=0)
        labels += flat >= ordered.gather(-1, last)
    return labels.view(values.shape)


class RegimeBudget(Rival):
    """loss = Σ_k w_k l_k with w the worst case over KL(w‖p) ≤ ρ, w ≤ c p, of the running means of l_k.

    l_k is the mean squared error and p_k the share of the points of regime k in the batch. A regime holds the points of
    a channel whose |target| lies between two quantiles: calm, active, extreme by the true rate of change where a model
    predicts rates, by the state where it predicts states. Every point of a regime counts alike, so noise in single
    points moves little. The running means are data (no gradient), move at every call in training mode with gradients,
    and are saved in `state_dict`. Each process has its own.

    The regimes of the weather are calm, fronts and storms: storms where |vorticity| is in the top 1 % and 0.1 % of its
    day, fronts where the height (channel 0) is steep: `RegimeBudget(targets, cells, shares=(0.01, 0.001), channel=1,
    each_state=True, front=0)`.

    Args:
        targets: of the training, (sample, channel, *space).
        cells: for each axis of space, the lengths of its cells, broadcastable to (*space), and whether it is periodic;
            if left out, all axes after the channel are space, with cells of length 1 and ends.
        rho, cap: ρ > 0 (nats) and c > 1, as for `KLBudget`.
        shares: of the points in the upper tails that start a new regime, falling, in (0, 1).
        channel: the one channel whose size defines the regimes of all (such as vorticity); each its own if left out.
        window: W ≥ 1, length of the running means in steps.
        each_state: the quantiles are those of each state (a sample at a lead time) by its measure, and not those of all
            training targets.
        front: a channel. Points below the first tail, but where its |gradient| is in the upper tail of its state, are a
            regime of their own.
        front_share: of the points of a state in that tail, in (0, 1).

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
        cells: Cells | None = None,
        *,
        rho: float = 0.3,
        cap: float = float("inf"),
        shares: Sequence[float] = (0.5, 0.1, 0.01, 0.001),
        channel: int | None = None,
        window: float = 100.0,
        each_state: bool = False,
        front: int | None = None,
        front_share: float = 0.1,
    ) -> None:
        super().__init__()
        channels = targets.shape[1]
        falling = len(shares) > 0 and list(shares) == sorted({x for x in shares if 0 < x < 1}, reverse=True)
        require(falling, f"RegimeBudget: shares must fall and be in (0, 1), got {list(shares)}")
        require(window >= 1, f"RegimeBudget: window must be at least 1, got {window}")
        require(0 < front_share < 1, f"RegimeBudget: front_share must be in (0, 1), got {front_share}")
        for name, chosen in (("channel", channel), ("front", front)):
            known = chosen is None or 0 <= chosen < channels
            require(known, f"RegimeBudget: {name} is {chosen}, but the data have channels 0 to {channels - 1}")
        self.rho, self.cap, self.shares, self.channel, self.window = rho, cap, tuple(shares), channel, window
        self.each_state, self.front, self.front_share = each_state, front, front_share
        self._rule = KLBudget(rho, cap)
        self._regimes = 1 + (front is not None) + len(shares)
        self._cells = cells or [(torch.ones(()), False)] * (targets.dim() - 2)
        sizes = targets.detach().abs().transpose(0, 1).flatten(1).double()
        sizes = sizes[:, sizes.isfinite().all(0)].sort(1).values
        places = [round((1 - share) * (sizes.shape[1] - 1)) for share in shares if not each_state]
        self.register_buffer("thresholds", sizes[:, places].T.to(targets.dtype))
        self.register_buffer("means", torch.full((channels * self._regimes,), torch.nan, dtype=torch.float64))

    def value(self, batch: Points) -> Tensor:
        made, given = self.thresholds.shape[1], batch.target.shape[1]
        require(given == made, f"RegimeBudget was made for {made} channels, got {given}")
        learns = self.training and torch.is_grad_enabled()
        errors, regimes = batch.error.square(), self.regimes(batch.target, batch.share)
        with torch.no_grad():
            held, share = errors.double().flatten(), batch.share.double().flatten()
            count = len(self.means)
            p = torch.bincount(regimes.flatten(), share, count)
            batch_means = torch.bincount(regimes.flatten(), share * held, count) / torch.where(p > 0, p, 1)
            means = self._means(batch_means, p > 0, learns)
            w = imbalance_weights(torch.where(p > 0, means, 0), self._rule, measure=p)
            ratio = (w / torch.where(p > 0, p, 1)).to(errors.dtype)
        return (batch.share * ratio[regimes] * errors).sum()

    def regimes(
        self, target: Float[Tensor, "batch channel *space"], share: Float[Tensor, "batch channel *space"] | None = None
    ) -> Int[Tensor, "batch channel *space"]:
        """The regime of every point: channel by channel, from calm to extreme; `share` is the measure."""
        share = torch.ones_like(target) if share is None else share
        one = slice(None) if self.channel is None else slice(self.channel, self.channel + 1)
        size = target[:, one].abs()
        if self.each_state:
            labels = tails(size, share[:, one], self.shares, len(self._cells))
        else:
            levels = self.thresholds[:, one].reshape(len(self.shares), -1, *[1] * (target.dim() - 2))
            labels = (size > levels.unsqueeze(1)).sum(0)
        if self.front is not None:
            field, weight = (x[:, self.front : self.front + 1] for x in (target, share))
            steep = steepness(torch.where(weight > 0, field, torch.nan), self._cells).nan_to_num(0)
            front = tails(steep, weight, [self.front_share], len(self._cells))
            labels = torch.where(labels > 0, labels + 1, front)
        first = torch.arange(target.shape[1], device=target.device) * self._regimes
        return labels + first.reshape(-1, *[1] * (target.dim() - 2))

    def _means(self, of_batch: Float[Tensor, "regime"], present: Tensor, learns: bool) -> Float[Tensor, "regime"]:
        """The running means with this batch; a regime that was never seen starts with its first mean."""
        known = self.means.isfinite()
        if not learns:
            return torch.where(known, self.means, of_batch)
        moved = torch.where(known, self.means + (of_batch - self.means) / self.window, of_batch)
        self.means.copy_(torch.where(present, moved, self.means))
        return self.means
