"""The almost fair CRPS: an ensemble learns its spread together with its mean."""

from itertools import combinations

from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require


class AlmostFairCRPS(Rival):
    """loss = Σ_i p_i [mean_j |x_j − y| − (1 − (1 − α)/M)/2 · mean_{j≠k} |x_j − x_k|]_i of M forecasts x_j.

    α = 1 is the fair CRPS, unbiased for any M; α = 0 the CRPS of the M members as a distribution. A batch holds every
    sample M times, member by member, and a training repeats its minibatches so. Members differ where the model draws
    numbers, as `UNet(noise=1)` does; without, the loss is the mean absolute error.

    Args:
        members: M ≥ 2.
        alpha: α in [0, 1]; 0.95, as published.

    Reference:
        Lang et al., AIFS-CRPS, 2024 (arXiv 2412.15832), whose equation is in the form of pairs here.

    Example:
        >>> import torch
        >>> AlmostFairCRPS(alpha=1.0)(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        tensor(1.)
    """

    axes = (0, 9)

    def __init__(self, *, members: int = 2, alpha: float = 0.95) -> None:
        super().__init__()
        require(members >= 2, f"AlmostFairCRPS: members must be at least 2, got {members}")
        require(0 <= alpha <= 1, f"AlmostFairCRPS: alpha must be in [0, 1], got {alpha}")
        self.members, self.alpha = members, alpha
        self._checked = False

    def value(self, batch: Points) -> Tensor:
        count, m = len(batch.target), self.members
        require(count % m == 0, f"AlmostFairCRPS: a batch of {count} does not hold {m} members of each sample")
        error, target, share = (x.unflatten(0, (m, -1)) for x in (batch.error, batch.target, batch.share))
        if not self._checked:  # once: how a loader repeats samples does not change, and a device would have to wait
            alike = bool((target == target[0]).all())
            require(alike, f"AlmostFairCRPS: the targets of the {m} members differ; hold every sample {m} times")
            self._checked = True
        fair = 1 - (1 - self.alpha) / m
        pairs = [(a.abs() + b.abs() - fair * (a - b).abs()) / 2 for a, b in combinations(error, 2)]
        return (share.sum(0) * sum(pairs)).sum() / len(pairs)
