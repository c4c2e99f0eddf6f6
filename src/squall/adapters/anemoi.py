"""anemoi: a loss in the form of its `BaseLoss`."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from squall._process.extras import explain_missing_extra


def anemoi(loss: nn.Module) -> Any:
    """A loss as anemoi-training calls it: variables last, scaled by its scalers.

    The scalers are the measure: the product of all of them, such as area times variable weight, is how much a point
    counts before its error does. The value has the size of anemoi's own losses: at an infinite temperature it is
    that of anemoi's `MSELoss`. Without `squash` it is the scaled squared error of each variable, for reports.
    anemoi gathers a sharded grid before the call.

    Args:
        loss: called as `loss(prediction, target, measure=...)`, with a mean; such as `ImbalanceAwareLoss()`.

    Raises:
        MissingExtraError: if anemoi-training is not installed.
    """
    with explain_missing_extra():
        base: Any = importlib.import_module("anemoi.training.losses.base")

    class Weighed(base.FunctionalLoss):
        name = "squall"

        def __init__(self) -> None:
            super().__init__()
            self.loss = loss
            self.supports_sharding = False

        def calculate_difference(self, pred: Tensor, target: Tensor) -> Tensor:
            return torch.square(pred - target)

        def forward(self, pred: Tensor, target: Tensor, squash: bool = True, **options: Any) -> Tensor:
            if not squash:
                return super().forward(pred, target, squash, **options)
            if options.get("grid_shard_slice") is not None:
                raise ValueError("the grid is sharded, but the weights need all of it: gather it before the loss")
            indices = options.get("scaler_indices")
            ones = torch.ones_like(target)
            measure = self.scale(ones, indices, without_scalers=options.get("without_scalers"))
            if indices is not None:
                pred, target = pred[indices], target[indices]
            size = self.reduce(measure, True, group=None, squash_mode=options.get("squash_mode", "avg"))
            return self.loss(pred, target, measure=measure) * size

    return Weighed()
