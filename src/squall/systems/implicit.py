r"""The implicit solver that every system shares: one time step is one nonlinear equation per trajectory.

With $u$ the state, $v$ the next one, the equation is $F(u, v) = 0$ on a ring of $M$ points, where $F_m$ depends on $v$ at
the five points $m-2, \dots, m+2$. Newton's method solves it for all trajectories at once:

- the ring is folded (0, M−1, 1, M−2, ...), which turns the *periodic* band of width 2 into an ordinary band of width 4, with
  no corners left over, and the trajectories are stacked into one banded matrix for LAPACK;
- the iteration starts from the extrapolation of the past states, by the order that predicted the last step best.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from scipy.linalg import lapack
from torch import Tensor

States = Float[Tensor, "batch points"]
Bands = Float[Tensor, "5 batch points"]
"""`bands[s + 2][..., m]` is the derivative of F at point m with respect to the next state at point m + s."""

MAXIMUM_ITERATIONS = 25
MAXIMUM_ORDER = 5
# Newton's error is squared by the update, so an update of this relative size leaves nothing above rounding.
TOLERANCE = 1e-9


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
            f"Newton's method did not converge at step {step} in trajectory {trajectory}: the residual is {residual:.3g} "
            f"with dt = {dt:g}. Try a smaller dt (a tenth first), then initial states that are smoother or smaller; "
            "if it still fails, check that the coefficients have the sign you mean."
        )


class PeriodicBandedSolver:
    """Solves one five-band periodic linear system per trajectory, all of them by one LAPACK call.

    Arguments:
        batch: The number of systems.
        points: The size of each, at least 5.
    """

    WIDTH = 4  # of the band, on either side, once the ring is folded

    def __init__(self, batch: int, points: int) -> None:
        there = torch.arange((points + 1) // 2)
        back = torch.arange(points - 1, (points - 1) // 2, -1)
        self._order = torch.empty(points, dtype=torch.long)  # folded place -> point
        self._order[0::2], self._order[1::2] = there, back
        self._place = torch.argsort(self._order)  # point -> folded place
        # LAPACK's band storage, column by column, has WIDTH more rows for what pivoting fills in.
        self._storage = torch.zeros(batch * points, 3 * self.WIDTH + 1, dtype=torch.float64)
        self._target = self._storage_index(batch, points)

    def _storage_index(self, batch: int, points: int) -> Int[Tensor, "5 batch points"]:
        point = torch.arange(points)
        row = self._place[point]
        column = torch.stack([self._place[(point + shift) % points] for shift in range(-2, 3)])
        within = column * self._storage.shape[1] + 2 * self.WIDTH + row - column
        start = torch.arange(batch) * points * self._storage.shape[1]
        return within[:, None, :] + start[:, None]

    def solve(self, bands: Bands, right: States) -> States:
        """The solution x of J x = `right`; not finite where J is singular."""
        self._storage.zero_().view(-1)[self._target] = bands
        stacked = right[:, self._order].reshape(-1)
        *_, solution, info = lapack.dgbsv(
            self.WIDTH, self.WIDTH, self._storage.numpy().T, stacked.numpy(), overwrite_ab=True, overwrite_b=True
        )
        if info:
            return torch.full_like(right, torch.nan)
        return torch.from_numpy(solution).view(right.shape)[:, self._place]


class Extrapolation:
    r"""Predicts the next state from the backward differences $\nabla^j u$ of the past ones.

    The prediction of order k is $\sum_{j \le k} \nabla^j u$, and its error turns out to be $\nabla^{k+1}$ of the state that
    comes: so each trajectory uses the order that would have predicted its last step best. Before the first state, all is
    taken to have been at rest.
    """

    def __init__(self, initial: States) -> None:
        self._differences = initial.new_zeros(MAXIMUM_ORDER + 2, *initial.shape)
        self._differences[0] = initial
        self._trajectory = torch.arange(len(initial))

    def append(self, state: States) -> None:
        """Takes in the state that came."""
        past = self._differences
        self._differences = torch.empty_like(past)
        self._differences[0] = state
        for j in range(1, len(past)):
            torch.sub(self._differences[j - 1], past[j - 1], out=self._differences[j])

    def predict(self) -> States:
        """The next state, as the past leads one to expect."""
        errors = self._differences[1:].abs().amax(-1)
        order = errors.argmin(0)
        return self._differences[:-1].cumsum(0)[order, self._trajectory]


def march(
    residual: Callable[[States, States], States],
    jacobian: Callable[[States, States], Bands],
    initial: States,
    dt: float,
    steps: int,
    progress: Callable[[int], object] | None = None,
) -> Float[Tensor, "batch time points"]:
    r"""Solves $F(u_n, u_{n+1}) = 0$ for `steps` states one after the other.

    Arguments:
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
    solver = PeriodicBandedSolver(*initial.shape)
    past = Extrapolation(initial)
    states = initial.new_empty(len(initial), steps + 1, initial.shape[-1])
    states[:, 0] = u = initial
    for step in range(1, steps + 1):
        v, failed = _newton(residual, jacobian, solver, u, past.predict())
        if failed.any():
            again, still_failed = _newton(residual, jacobian, solver, u, u)
            v, failed = torch.where(failed[:, None], again, v), failed & still_failed
        if failed.any():
            raise _convergence_error(residual(u, v), failed, step, dt)
        states[:, step] = u = v
        past.append(u)
        if progress is not None:
            progress(step)
    return states


def _newton(
    residual: Callable[[States, States], States],
    jacobian: Callable[[States, States], Bands],
    solver: PeriodicBandedSolver,
    u: States,
    v: States,
) -> tuple[States, Tensor]:
    """The next states from the guess v, and which trajectories did not get there."""
    scale = u.abs().amax(-1)
    failed = torch.ones_like(scale, dtype=torch.bool)
    for _ in range(MAXIMUM_ITERATIONS):
        update = solver.solve(jacobian(u, v), residual(u, v))
        if not update.isfinite().all():  # one trajectory's overflow spreads over the stacked matrix
            break
        # A trajectory that is done stays as it is, so that none depends on which others are in the batch.
        v = torch.where(failed[:, None], v - update, v)
        failed = failed & (update.abs().amax(-1) > TOLERANCE * torch.maximum(scale, v.abs().amax(-1)))
        if not failed.any():
            break
    return v, failed


def _convergence_error(residual: States, failed: Tensor, step: int, dt: float) -> ConvergenceError:
    size = residual.abs().amax(-1).nan_to_num(torch.inf, torch.inf).where(failed, -torch.inf)
    worst = int(size.argmax())
    return ConvergenceError(step, worst, float(size[worst]), dt)
