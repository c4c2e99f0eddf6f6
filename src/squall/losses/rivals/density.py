"""Weights by rarity: a point counts the more, the fewer targets are near its own."""

import torch
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require

NODES = 1024


def density(values: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of a grid over the values, and p′ at its nodes."""
    values = values.flatten().double().sort().values
    n, ends = len(values), values[[0, -1]]
    require(bool(ends.isfinite().all() & (ends[0] < ends[1])), "DensityWeights: targets not finite, or all the same")
    quartiles = float(values[3 * n // 4] - values[n // 4]) / 1.349
    width = min(s for s in (float(values.std(correction=0)), quartiles) if s > 0) * (0.75 * n) ** -0.2  # Silverman
    node, part = _place(values, ends)
    counts = values.new_zeros(NODES).index_add_(0, node, 1 - part).index_add_(0, node + 1, part)
    grid = torch.linspace(float(ends[0]), float(ends[1]), NODES, dtype=values.dtype, device=values.device)
    table = torch.exp(-((grid - grid[:, None]) / width).square() / 2) @ counts
    low, high = torch.lerp(table[node], table[node + 1], part).aminmax()
    return ends, (table - low) / torch.where(high > low, high - low, 1)


def _place(values: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """On the grid between the ends: the node below, and the part of the way to the next."""
    place = ((values - ends[..., :1]) / (ends[..., 1:] - ends[..., :1])).clamp(0, 1) * (NODES - 1)
    node = place.long().clamp(max=NODES - 2)
    return node, place - node


class DensityWeights(Rival):
    """loss = Σ p f(y) e², f(y) = max(1 − α p′(y), ε) / mean f, y the target: DenseWeight.

    p′ is the density of the training targets of the channel, scaled to [0, 1]: Gaussian kernels of Silverman's width
    (3n/4)^(−1/5) min(std, IQR/1.349), tabulated at 1024 nodes. Beyond them, their ends.

    Args:
        targets: of the training data, (samples, channel, *space).
        alpha: α ≥ 0, dimensionless; 0 is the mean squared error, 1 (as published) gives the commonest value ε.
        epsilon: ε > 0, dimensionless; 1e-6, as published.

    Reference:
        Steininger et al., Density-based weighting for imbalanced regression, Machine Learning 2021; Rudy and Sapsis,
        Output-weighted and relative entropy loss functions, Physica D 2023.

    Example:
        >>> targets = torch.tensor([0.0, 0.0, 0.1, 0.1, 0.2, 3.0]).reshape(6, 1, 1)
        >>> weights = DensityWeights(targets).weights(targets)
        >>> bool(weights[5] > 3 * weights[0])
        True
    """

    axes = (1, 9)
    ends: Tensor
    table: Tensor
    means: Tensor

    def __init__(self, targets: Tensor, *, alpha: float = 1.0, epsilon: float = 1e-6) -> None:
        super().__init__()
        require(alpha >= 0 and epsilon > 0, f"DensityWeights: alpha must be ≥ 0, epsilon > 0; got {alpha}, {epsilon}")
        self.alpha, self.epsilon = alpha, epsilon
        tables = [density(channel) for channel in targets.detach().transpose(0, 1)]
        self.register_buffer("ends", torch.stack([ends for ends, _ in tables]).float())
        self.register_buffer("table", torch.stack([table for _, table in tables]).float())
        self.register_buffer("means", torch.ones(len(tables), 1))
        means = self.weights(targets.double()).transpose(0, 1).flatten(1).mean(1, keepdim=True)
        self.means.copy_(means)

    def weights(self, target: Tensor) -> Tensor:
        """f(y), of the shape of the target."""
        made = len(self.table)
        require(target.shape[1] == made, f"DensityWeights was made for {made} channels, got {target.shape[1]}")
        node, part = _place(target.detach().transpose(0, 1).flatten(1).to(self.ends), self.ends)
        p = torch.lerp(self.table.gather(1, node), self.table.gather(1, node + 1), part)
        f = (1 - self.alpha * p).clamp(min=self.epsilon) / self.means
        return f.unflatten(1, (len(target), *target.shape[2:])).transpose(0, 1).to(target.dtype)

    def value(self, batch: Points) -> Tensor:
        return (batch.share * self.weights(batch.target) * batch.error.square()).sum()
