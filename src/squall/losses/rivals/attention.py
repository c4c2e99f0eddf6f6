"""Residual-based attention: a weight for every point of the training data, remembered between steps."""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, points, ratio, require


class _Attention(Rival):
    """loss = Σ p (λ e)² with λ ← γ λ + η r(|e|) at every call in training mode with gradients; λ is 0 at first."""

    memory: Tensor

    def __init__(self, shape: Sequence[int], gamma: float, eta: float) -> None:
        super().__init__()
        require(0 <= gamma <= 1 and eta > 0, f"gamma must be in [0, 1] and eta positive, got {gamma} and {eta}")
        self.gamma, self.eta = gamma, eta
        self.register_buffer("memory", torch.zeros(tuple(shape)))

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        *,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        measure: Tensor | None = None,
    ) -> Tensor:
        """The loss of the training samples `index`, integers of shape (batch,); the rest as for the other losses."""
        index = self._checked(prediction, index)
        batch = points(prediction, target, mask, measure)
        weights = self.memory[index].to(batch.error.dtype)
        if self.training and torch.is_grad_enabled():
            grown = self.gamma * weights + self.eta * self.increment(batch.error.detach().abs())
            weights = torch.where(batch.share > 0, grown, weights)
            self.memory[index] = weights.to(self.memory.dtype)
        return self.value(batch._replace(error=weights * batch.error))

    def value(self, batch: Points) -> Tensor:
        return (batch.share * batch.error.square()).sum()

    @abc.abstractmethod
    def increment(self, size: Tensor) -> Tensor:
        """r in [0, 1] of |e|, for one update."""

    def _checked(self, prediction: Tensor, index: Tensor | None) -> Tensor:
        name, (samples, *shape) = type(self).__name__, self.memory.shape
        if index is None:
            raise ValueError(f"{name} remembers every training sample: pass index, their numbers, from the loader")
        got = [*prediction.shape[1:]]
        require(got == shape, f"{name} was made for samples of shape {shape}, got {got}; make one for these data")
        integers = index.shape == prediction.shape[:1] and index.dtype in (torch.int32, torch.int64)
        require(integers, f"index must be integers of shape (batch,), got {index.dtype} of shape {[*index.shape]}")
        known = f"{name} was made for samples 0 to {samples - 1}"
        least, largest = (int(i) for i in index.aminmax())
        require(0 <= least <= largest < samples, f"{known}, got {least} to {largest}; make one for these data")
        return index.to(self.memory.device)


class RBA(_Attention):
    """loss = Σ p (λ e)², λ ← γ λ + η |e| / max|e|, the maximum over the batch: residual-based attention.

    λ, one for each point of the training data, is updated before it weighs and is at most η/(1 − γ). It is saved in
    `state_dict`, and stays as it is in `eval` mode and without gradients. Each process has its own.

    Args:
        shape: (samples, channel, *space) of the training data.
        gamma, eta: γ in [0, 1] and η > 0, dimensionless; 0.999 and 0.01, as published.

    Reference:
        Anagnostopoulos et al., Residual-based attention in physics-informed neural networks, CMAME 2024.

    Example:
        >>> loss = RBA((10, 1, 2), eta=1.0)
        >>> loss(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1, 2), index=torch.tensor([7]))
        tensor(2.1250)
    """

    def __init__(self, shape: Sequence[int], *, gamma: float = 0.999, eta: float = 0.01) -> None:
        super().__init__(shape, gamma, eta)

    def increment(self, size: Tensor) -> Tensor:
        return ratio(size, size.max())


class VRBA(_Attention):
    """loss = Σ p (λ e)², λ ← γ λ + η (φ q/max q + 1 − φ), q ∝ exp(|e|/ε), ε = c max|e| / log(k + 2), per sample.

    The exponential potential of variational residual-based attention. k counts the updates, so that
    q/max q = (k + 2)^((|e|/max|e| − 1)/c) becomes sharper. Memory as for `RBA`.

    Args:
        shape, gamma, eta: as for `RBA`.
        phi: φ in [0, 1], share of the adaptive part; 0.9, as published (0.5 for their shock tubes).
        c: c > 0, dimensionless; 1, as published.

    Reference:
        Toscano et al., A variational framework for residual-based adaptivity, 2026 (arXiv 2509.14198).

    Example:
        >>> loss = VRBA((10, 1, 2), eta=1.0)
        >>> loss(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1, 2), index=torch.tensor([7]))
        tensor(2.2711)
    """

    updates: Tensor

    def __init__(
        self, shape: Sequence[int], *, gamma: float = 0.999, eta: float = 0.01, phi: float = 0.9, c: float = 1.0
    ) -> None:
        super().__init__(shape, gamma, eta)
        require(0 <= phi <= 1 and c > 0, f"VRBA: phi must be in [0, 1] and c positive, got {phi} and {c}")
        self.phi, self.c = phi, c
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def increment(self, size: Tensor) -> Tensor:
        relative = ratio(size, size.amax([*range(1, size.dim())], keepdim=True))
        sharpness = (self.updates + 2).to(size.dtype).log() / self.c
        self.updates += 1
        return self.phi * ((relative - 1) * sharpness).exp() + 1 - self.phi
