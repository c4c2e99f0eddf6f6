"""Pointwise errors: what is compared at one point, before anything is averaged or weighed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

__all__ = ["ERRORS", "GROUPS_ALONG", "Huber", "Over", "PointwiseError", "absolute_error", "as_error", "squared_error"]

PointwiseError = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target) → error ≥ 0 at every point, of the same shape."""


Over = Literal["all", "sample", "channel", "lead"]
"""What is normalised over together: everything (the paper), each sample, each channel, or each lead time."""

GROUPS_ALONG = {"sample": 0, "channel": 1, "lead": 2}
"""The axis that has a group at every place."""


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """l = (prediction − target)², in the squared unit of the prediction."""
    return functional.mse_loss(prediction, target, reduction="none")


def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """l = |prediction − target|: an outlier ten times as far weighs in ten times, not a hundred times."""
    return (prediction - target).abs()


@dataclass(frozen=True)
class Huber:
    """l = e²/2 where |e| ≤ δ, δ (|e| − δ/2) beyond, with e = prediction − target.

    Args:
        delta: δ > 0, in the unit of the prediction.

    Example:
        >>> import torch
        >>> Huber(1.0)(torch.tensor([0.5, 3.0]), torch.zeros(2))
        tensor([0.1250, 2.5000])
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.delta < float("inf"):
            raise ValueError(f"Huber: delta must be positive and finite, got {self.delta}")

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.huber_loss(prediction, target, reduction="none", delta=self.delta)


ERRORS: dict[str, PointwiseError] = {
    "squared": squared_error,
    "absolute": absolute_error,
    "huber": Huber(),
}


def as_error(error: str | PointwiseError) -> PointwiseError:
    """The pointwise error that a name stands for; a callable stands for itself."""
    if not isinstance(error, str):
        return error
    if error not in ERRORS:
        raise ValueError(f"error must be a callable or one of {', '.join(ERRORS)}; got {error!r}")
    return ERRORS[error]
