"""Several steps of a model as one module, with the gradient that the settings ask for."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from squall._types import Rate, State
from squall.integrators import Array, Implicit, IntegratorLike, increment, substeps
from squall.models.inputs import Conditions, Held, Window, rate_of
from squall.training.batches import Target
from squall.training.settings import TrainingSettings


class Unrolled(nn.Module):
    r"""(û_k − u)/dt after every step k, as one module, so that a wrapper such as DDP sees one forward pass.

    .. math:: \frac{û_k - u}{dt} = \sum_{j<k} Φ(û_j), \qquad û_0 = u

    with Φ the increment of the integrator. The sum loses no digit to a difference of states. With one step it is the
    mean rate over that step.

    Args:
        model: from states and conditions to the rate or the next state; see `squall.models.inputs`.
        integrator: makes the steps.
        dt: step size.
        settings: number of steps, which of them pass the gradient on, and whether activations are computed again.
        mask: False where a point keeps its value.
    """

    mask: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        integrator: IntegratorLike,
        dt: float,
        settings: TrainingSettings,
        mask: Bool[Tensor, "channel *space"] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.integrator, self.dt, self.settings = model, integrator, dt, settings
        self.register_buffer("mask", mask)

    def forward(
        self,
        window: Window,
        conditions: Conditions | None = None,
        counts: Int[Tensor, " batch"] | None = None,
        following: State | None = None,
    ) -> Target:
        """(batch, channel, *space), or (batch, channel, lead, *space) where several lead times are compared.

        `counts` says over how many shorter steps of the integrator each step of a window is taken. With `following`,
        the next states of the data, an implicit integrator solves nothing.
        """
        if following is not None:
            return self._change(self.integrator, window, _at(conditions, 0), following, last=True)
        if counts is None:
            return self._unroll(self.integrator, window, conditions)
        changes = None
        for count in counts.unique().tolist():
            chosen = counts == count
            held = None if conditions is None else conditions[chosen]
            part = self._unroll(substeps(self.integrator, count), window[chosen], held)
            if changes is None:
                changes = window.new_empty((len(window), *part.shape[1:]))
            changes[chosen] = part.to(changes.dtype)
        assert changes is not None  # a minibatch is never empty
        return changes

    def _unroll(self, integrator: IntegratorLike, window: Window, conditions: Conditions | None) -> Target:
        gradient, steps = self.settings.unroll_gradient, self.settings.unroll
        change = self._change(integrator, window, _at(conditions, 0), last=steps == 1)
        if steps == 1:
            return change
        total, totals = change, [change]
        for n in range(1, steps):
            u = window[:, -1] + self.dt * change
            if gradient == "step":
                u, total = u.detach(), total.detach()
            window = torch.cat((window[:, 1:], u.unsqueeze(1)), 1)
            change = self._change(integrator, window, _at(conditions, n), last=n == steps - 1)
            total = total + change
            totals.append(total)
        return total if gradient == "pushforward" else torch.stack(totals, 2)

    def _change(
        self,
        integrator: IntegratorLike,
        window: Window,
        held: Held | None,
        following: State | None = None,
        *,
        last: bool,
    ) -> State:
        """Φ of one step, 0 at masked points."""
        silent = self.settings.unroll_gradient == "pushforward" and not last
        with torch.set_grad_enabled(torch.is_grad_enabled() and not silent):
            if self.settings.recompute and torch.is_grad_enabled():
                change: Any = checkpoint(self._increment, integrator, window, held, following, use_reentrant=False)
            else:
                change = self._increment(integrator, window, held, following)
        if self.settings.unroll > 1:
            change = change.to(window.dtype)  # sums in half precision would lose the later steps
        return change if self.mask is None else torch.where(self.mask, change, 0)

    def _increment(
        self, integrator: IntegratorLike, window: Window, held: Held | None, following: State | None
    ) -> State:
        rate = _Checked(rate_of(self.model, window[:, :-1], held))
        if following is None:
            return increment(integrator, rate, window[:, -1], self.dt)
        assert isinstance(integrator, Implicit)
        return integrator.between(rate, window[:, -1], following)


class _Checked:
    """A rate that must keep the shape of the states."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate

    def __call__(self, u: Array) -> Array:
        result = self.rate(u)
        if result.shape != u.shape:
            raise ValueError(
                f"the model maps states of shape {tuple(u.shape)} to {tuple(result.shape)}, but must keep the "
                "shape (batch, channel, *space)"
            )
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rate, name)


def _at(conditions: Conditions | None, n: int) -> Held | None:
    """The conditions of step n."""
    return None if conditions is None else conditions[:, n if conditions.shape[1] > 1 else 0]
