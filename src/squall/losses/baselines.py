"""Plain losses under the same call, to compare with."""

import math

from torch import Tensor, nn

from squall.losses.distributed import Group
from squall.losses.errors import PointwiseError, as_error
from squall.losses.loss import Recipe
from squall.losses.report import Account
from squall.losses.rules import Fixed
from squall.losses.weights import Weighing

__all__ = ["MeanSquaredError"]


class MeanSquaredError(nn.Module):
    """loss = Σ p_i l_i, every point weighed alike: the limit T → ∞ with the same call, checks and report.

    Args:
        error: l: "squared", "absolute", "huber", or a callable (prediction, target) → tensor ≥ 0.
        group: which processes share the batch, as for `ImbalanceAwareLoss`.

    Example:
        >>> import torch
        >>> MeanSquaredError()(torch.tensor([1.0, 2.0]), torch.zeros(2))
        tensor(2.5000)
    """

    def __init__(self, error: str | PointwiseError = "squared", *, group: Group = "world") -> None:
        super().__init__()
        self.recipe = Recipe(Weighing(Fixed(math.inf)), as_error(error), group=group)
        self._account: Account | None = None

    def forward(
        self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Tensor:
        """The mean error; arguments and errors as for `ImbalanceAwareLoss`."""
        evaluated = self.recipe.evaluate(prediction, target, mask, measure)
        self._account = evaluated.account
        return evaluated.value

    def report(self) -> dict[str, float]:
        """The numbers of the last call, as for `ImbalanceAwareLoss`."""
        return {} if self._account is None else self._account.numbers()
