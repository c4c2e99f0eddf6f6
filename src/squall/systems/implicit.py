r"""The implicit solver that every system shares: one time step is one nonlinear equation per trajectory.

With $u$ the state, $v$ the next one, the equation is $F(u, v) = 0$ on a ring of $M$ points, where $F_m$ depends
on $v$ at the five points $m-2, \dots, m+2$. Newton's method solves it for all trajectories at once:

- the ring is folded (0, M−1, 1, M−2, ...), which turns the *periodic* band of width 2 into an ordinary band of
  width 4, with no corners left over, and the trajectories are stacked into one banded matrix for LAPACK;
- the iteration starts from the extrapolation of the past states, by the order that predicted the last step best.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from squall._process.extras import explain_missing_extra

States = Float[Tensor, "batch points"]
Bands = Float[Tensor, "5 batch points"]
"""`bands[s + 2][..., m]` is the derivative of F at point m with respect to the next state at point m + s."""

# Two iterations are usual; 25 without convergence mean that dt is too large.
MAXIMUM_ITERATIONS = 25
# Of the extrapolated first guess.
MAXIMUM_ORDER = 5
# Newton's error is squared by the update, so an update of this relative size leaves nothing above rounding.
TOLERANCE = 1e-9
# Blocks small enough for the cache, and for torch not to spread such short work over threads (from 32768 numbers on).
BLOCK_NUMBERS = 32768 // 5


class ConvergenceError(RuntimeError):
    """Newton's method found no next state.

    Attributes:
        step: The number of the step that failed, the first being 1.
        trajectory: The index of the worst trajectory in the batch.
        residual: The largest entry of F in that trajectory where the iteration stopped, in the unit of the state.
    """

    def __init__(self, step: int, trajectory: int, residual: float, dt: float) -> None:
        self.step, self.trajectory, self.residual = step, trajectory, residual
        super().__init__(
            f"Newton's method did not converge at step {step} in trajectory {trajectory}: the residual is "
            f"{residual:.3g} with dt = {dt:g}. Try a smaller dt (a tenth first), then initial states that are "
            "smoother or smaller; if it still fails, check that the coefficients have the sign you mean."
        )


class PeriodicBandedSolver:
    """Solves one five-band periodic linear system per trajectory, all of them by one LAPACK call.

    Args:
        batch: The number of systems.
        points: The size of each, at least 5.
    """

    WIDTH = 4  # of the band, on either side, once the ring is folded

    def __init__(self, batch: int, points: int) -> None:
        self._order = np.empty(points, dtype=np.intp)  # folded place -> point
        self._order[0::2] = np.arange((points + 1) // 2)
        self._order[1::2] = np.arange(points - 1, (points - 1) // 2, -1)
        self._place = np.argsort(self._order)  # point -> folded place
        # LAPACK's band storage, column by column; it has WIDTH more rows for what pivoting fills in.
        self._storage = np.zeros((batch * points, 3 * self.WIDTH + 1))
        self._target = self._storage_index(batch, points)

    def _storage_index(self, batch: int, points: int) -> Int64[np.ndarray, "5 batch points"]:
        """Where each entry of the bands (5, batch, points) goes in the storage."""
        row = self._place
        column = np.stack([self._place[(np.arange(points) + shift) % points] for shift in range(-2, 3)])
        rows = self._storage.shape[1]
        within = column * rows + 2 * self.WIDTH + row - column
        return within[:, None, :] + np.arange(batch)[:, None] * points * rows

    def solve(self, bands: Bands, right: States) -> States:
        """The solution x of J x = `right`; not finite where J is singular."""
        self._storage.fill(0.0)
        self._storage.reshape(-1)[self._target] = bands.numpy()
        stacked = right.numpy()[:, self._order].reshape(-1)
        width = self.WIDTH
        *_, solution, info = _gbsv()(width, width, self._storage.T, stacked, overwrite_ab=True, overwrite_b=True)
        if info:
            return torch.full_like(right, torch.nan)
        return torch.from_numpy(solution.reshape(right.shape)[:, self._place])


@functools.cache
def _gbsv() -> Callable[..., Any]:
    with explain_missing_extra():
        from scipy.linalg import get_lapack_funcs  # slow to import, and most commands simulate nothing

    return get_lapack_funcs(("gbsv",), dtype=np.float64)[0]


class Extrapolation:
    r"""Predicts the next state from the backward differences $\nabla^j u$ of the past ones.

    The prediction of order k is $\sum_{j \le k} \nabla^j u$, and its error turns out to be $\nabla^{k+1}$ of the
    state that comes: so each trajectory uses the order that would have predicted its last step best. Before the
    first state, all is taken to have been at rest.
    """

    def __init__(self, initial: States) -> None:
        self._differences = [initial] + [torch.zeros_like(initial)] * (MAXIMUM_ORDER + 1)

    def append(self, state: States) -> None:
        """Takes in the state that came."""
        difference, past = state, self._differences
        self._differences = [state]
        for previous in past[:-1]:
            difference = difference - previous
            self._differences.append(difference)

    def predict(self) -> States:
        """The next state, as the past leads one to expect."""
        errors = torch.stack([difference.abs().amax(-1) for difference in self._differences[1:]])
        order = errors.argmin(0)[:, None]
        prediction = self._differences[0]
        for j, difference in enumerate(self._differences[1:-1], start=1):
            prediction = prediction + difference * (order >= j)
        return prediction


class Block:
    r"""Trajectories that advance together.

    Args:
        residual: $F(u, v)$, in the unit of the state.
        jacobian: $\partial F/\partial v$ as five periodic bands.
        initial: The first states, float64 on the CPU, finite.
    """

    def __init__(
        self, residual: Callable[[States, States], States], jacobian: Callable[[States, States], Bands], initial: States
    ) -> None:
        self.residual, self.jacobian = residual, jacobian
        self.state = initial
        self._past = Extrapolation(initial)
        self._solver = PeriodicBandedSolver(*initial.shape)

    def advance(self) -> tuple[int, float] | None:
        """Takes one step; where that fails, the worst trajectory and its residual are returned."""
        next_state, failed = self._newton(self._past.predict())
        if failed.any():
            again, still_failed = self._newton(self.state)
            next_state, failed = torch.where(failed[:, None], again, next_state), failed & still_failed
        if failed.any():
            size = self.residual(self.state, next_state).abs().amax(-1).nan_to_num(torch.inf, torch.inf)
            worst = int(size.where(failed, -torch.inf).argmax())
            return worst, float(size[worst])
        self.state = next_state
        self._past.append(next_state)
        return None

    def _newton(self, guess: States) -> tuple[States, Bool[Tensor, " batch"]]:
        """The next states from a guess, and which trajectories did not get there."""
        u, v = self.state, guess
        scale = u.abs().amax(-1)
        failed = torch.ones_like(scale, dtype=torch.bool)
        for _ in range(MAXIMUM_ITERATIONS):
            update = self._solver.solve(self.jacobian(u, v), self.residual(u, v))
            if not update.isfinite().all():  # one trajectory's overflow spreads over the stacked matrix
                break
            # A trajectory that is done stays as it is, so that none depends on which others are in the batch.
            v = torch.where(failed[:, None], v - update, v)
            failed = failed & (update.abs().amax(-1) > TOLERANCE * torch.maximum(scale, v.abs().amax(-1)))
            if not failed.any():
                break
        return v, failed


def march(
    residual: Callable[[States, States], States],
    jacobian: Callable[[States, States], Bands],
    initial: States,
    dt: float,
    steps: int,
    progress: Callable[[int], object] | None = None,
) -> Float[Tensor, "batch time points"]:
    r"""Solves $F(u_n, u_{n+1}) = 0$ for `steps` states one after the other.

    Args:
        residual: $F(u, v)$, in the unit of the state.
        jacobian: $\partial F/\partial v$ as five periodic bands.
        initial: The first states, float64 on the CPU, finite.
        dt: The size of a step; only named in errors.
        steps: How many states to add.
        progress: Called with the number of finished steps after each.

    Returns:
        The trajectories, the initial states first.

    Raises:
        ConvergenceError: If Newton's method fails both from the extrapolated and from the last state.
    """
    size = max(1, BLOCK_NUMBERS // initial.shape[-1])
    blocks = [Block(residual, jacobian, part) for part in initial.split(size)]
    states = initial.new_empty(len(initial), steps + 1, initial.shape[-1])
    states[:, 0] = initial
    for step in range(1, steps + 1):
        for index, block in enumerate(blocks):
            if failure := block.advance():
                trajectory, worst = failure
                raise ConvergenceError(step, index * size + trajectory, worst, dt)
            states[index * size : (index + 1) * size, step] = block.state
        if progress is not None:
            progress(step)
    return states
