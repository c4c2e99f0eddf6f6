"""Stability of the learned step: the growth factor of its Jacobian."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from squall._process.extras import explain_missing_extra
from squall._types import Rate, State
from squall.integrators import Array, IntegratorLike, accepts_step
from squall.models.stacked import Stacked

DENSE_LIMIT = 64
"""Largest state, in numbers, whose full Jacobian is computed; larger ones use Arnoldi's method.

Time grows with the cube of the size: with NODE's 200 hidden units a state of 50 numbers takes 0.015 s on one core, one
of 512 takes 5 s. Arnoldi's method takes 0.06 s there.
"""

JACOBIAN_NUMBERS = 2**20
"""Jacobian entries computed at a time; bounds memory, as the hidden layers are hundreds of times larger."""

Factors = Float[Tensor, " batch"]
Jacobian = Float[np.ndarray, "*members size size"]

ARNOLDI: Any = {"ncv": 24, "maxiter": 4, "tol": 1e-3}
"""At most about 80 Jacobian-vector products; the factor is NaN if ARPACK has not converged by then. Three digits tell
growth from decay."""


@accepts_step
def growth_factor(integrator: IntegratorLike, rate: Rate, u: State, dt: float) -> Factors:
    """Largest modulus of the eigenvalues of the step's Jacobian ∂u'/∂u, at each state.

    A factor above one amplifies every small error of a rollout by that much a step: a model may fit one step
    closely and its rollouts still diverge.

    Args:
        integrator: makes the step.
        rate: a model or a system, state → rate.
        u: the states to linearise at, (batch, channel, *space).
        dt: length of the step, in units of time.

    Returns:
        one factor per state, dimensionless. For a state of more than 64 numbers it is computed by Arnoldi's method
        (ARPACK) with at most about 80 Jacobian-vector products; NaN if it does not converge. A Jacobian with NaN or
        infinite entries gives infinity.

    Reference:
        Lehoucq, Sorensen and Yang, ARPACK Users' Guide, SIAM 1998.

    >>> from squall.integrators import euler
    >>> u = torch.zeros(1, 1, 4, dtype=torch.float64)
    >>> growth_factor(euler, lambda u: -3.0 * u, u, dt=1.0)
    tensor([2.], dtype=torch.float64)
    """
    size = u[0].numel()
    if size > DENSE_LIMIT:
        factors = [_arnoldi_factor(integrator, rate, state[None], dt) for state in u]
    else:
        factors = [_spectral_radius(_jacobian(integrator, rate, state, dt)) for state in u]
    return torch.tensor(factors, dtype=torch.float64)


@accepts_step
def growth_factors(integrator: IntegratorLike, stacked: Stacked, u: State, dt: float) -> Float[Tensor, "member batch"]:
    """The growth factors of every member of a stack at the same states; see `growth_factor`."""
    u = u.to(stacked.device, stacked.dtype)
    if u[0].numel() > DENSE_LIMIT:
        return torch.stack([growth_factor(integrator, stacked.member(i), u, dt) for i in range(len(stacked))])
    at_once = max(1, JACOBIAN_NUMBERS // u[0].numel() ** 2)
    parts = [stacked.part(slice(start, start + at_once)) for start in range(0, len(stacked), at_once)]
    # LAPACK works on one thread for each; where a device computes, the processor has nothing else to do.
    workers = torch.get_num_threads() if stacked.device.type == "cpu" else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        factors = [
            [
                *itertools.chain(
                    *(pool.map(_spectral_radius, _jacobian(integrator, p, state, dt, len(p))) for p in parts)
                )
            ]
            for state in u
        ]
    return torch.tensor(factors, dtype=torch.float64).T


def _jacobian(
    integrator: IntegratorLike, rate: Rate, state: Float[Tensor, "channel *space"], dt: float, *members: int
) -> Jacobian:
    """∂u'/∂u at a state, for a stack that of every member: all rows by one backward pass over copies of the state."""
    size = state.numel()
    with torch.enable_grad():
        copies = state.detach().expand(*members, size, *state.shape).clone().requires_grad_()
        following = integrator(rate, copies, dt)
        seeds = torch.eye(size).to(following).reshape(size, *state.shape).expand_as(following)
        rows = _product(following, copies, seeds)
    return rows.reshape(*members, size, size).double().cpu().numpy()


def _spectral_radius(jacobian: Jacobian) -> float:
    if not np.isfinite(jacobian).all():
        return float("inf")
    return float(np.abs(np.linalg.eigvals(jacobian)).max())


def _product(following: Array, leaf: Array, cotangent: Array) -> Array:
    """Jᵀv; zero where the step does not depend on the state."""
    if not following.requires_grad:
        return torch.zeros_like(leaf)
    (row,) = torch.autograd.grad(following, leaf, cotangent, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if row is None else row


@explain_missing_extra()
def _arnoldi_factor(integrator: IntegratorLike, rate: Rate, state: State, dt: float) -> float:
    """Arnoldi on the transposed Jacobian, which has the same eigenvalues and needs backward passes only."""
    from scipy.sparse import linalg  # slow to import, and most commands never come here

    with torch.enable_grad():
        leaf = state.detach().clone().requires_grad_()
        following = integrator(rate, leaf, dt)

    def transposed(vector: Shaped[np.ndarray, "*size"]) -> Float[np.ndarray, " size"]:
        cotangent = torch.from_numpy(np.asarray(vector).reshape(following.shape)).to(following)
        return _product(following, leaf, cotangent).double().flatten().cpu().numpy()

    size = state.numel()
    if not np.isfinite(transposed(np.ones(size))).all():
        return float("inf")
    operator: Any = linalg.LinearOperator((size, size), matvec=transposed, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    start = np.random.default_rng(0).standard_normal(size)
    try:
        values = linalg.eigs(operator, k=1, which="LM", v0=start, **ARNOLDI, return_eigenvectors=False)
    except linalg.ArpackNoConvergence as partial:
        values = partial.eigenvalues
    except linalg.ArpackError:  # the Jacobian is zero to rounding
        return 0.0 if not transposed(start).any() else float("nan")
    return float(np.abs(values).max()) if len(values) else float("nan")
