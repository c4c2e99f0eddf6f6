"""The integrators converge at the orders they declare, and a rollout is a repeated step."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from squall.integrators import (
    INTEGRATORS,
    Integrator,
    RungeKutta,
    discrete_gradient,
    euler,
    implicit_midpoint,
    increment,
    midpoint,
    next_state,
    rk4,
    rollout,
    substeps,
)

RUNGE_KUTTA = [method for method in INTEGRATORS.values() if isinstance(method, RungeKutta)]
OF_ANY_RATE = [*RUNGE_KUTTA, implicit_midpoint]


def logistic(u: Tensor) -> Tensor:
    return u * (1 - u)


def logistic_solution(u: Tensor, t: float) -> Tensor:
    return u / (u + (1 - u) * math.exp(-t))


def rotation(u: Tensor) -> Tensor:
    return torch.stack([u[:, 1], -u[:, 0]], dim=1)


def rotation_solution(u: Tensor, t: float) -> Tensor:
    c, s = math.cos(t), math.sin(t)
    return torch.stack([c * u[:, 0] + s * u[:, 1], c * u[:, 1] - s * u[:, 0]], dim=1)


PROBLEMS = {
    "logistic": (logistic, logistic_solution, torch.tensor([[[0.1]]], dtype=torch.float64)),
    "rotation": (rotation, rotation_solution, torch.tensor([[[1.0], [0.5]]], dtype=torch.float64)),
}


def fitted_order(step, problem: str, steps: list[int]) -> float:
    """Slope of log(error at t = 2) against log(dt)."""
    rate, solution, u0 = PROBLEMS[problem]
    errors = [(rollout(step, rate, u0, 2 / n, n)[:, -1] - solution(u0, 2.0)).norm().item() for n in steps]
    return float(np.polyfit(np.log([2 / n for n in steps]), np.log(errors), 1)[0])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", OF_ANY_RATE, ids=lambda method: method.name)
def test_error_shrinks_at_the_declared_order(method: Integrator, problem: str) -> None:
    steps = [10, 20, 40] if method.order == 5 else [40, 80, 160]  # above rounding
    assert fitted_order(method, problem, steps) == pytest.approx(method.order, abs=0.2 if method.order == 5 else 0.1)


@pytest.mark.parametrize("method", OF_ANY_RATE, ids=lambda method: method.name)
def test_substeps_keep_the_order_and_are_smaller_steps(method: Integrator) -> None:
    finer = substeps(method, 3)
    rate, _, u0 = PROBLEMS["rotation"]
    assert finer.order == method.order
    assert fitted_order(finer, "logistic", [5, 10, 20]) == pytest.approx(method.order, abs=0.2)
    expected = rollout(method, rate, u0, 0.1, 3)[:, -1]
    torch.testing.assert_close(finer(rate, u0, 0.3), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", [m for m in RUNGE_KUTTA if m.order <= 4], ids=lambda method: method.name)
def test_one_step_of_the_exponential_is_its_taylor_polynomial(method: Integrator) -> None:
    """Known for every method of p ≤ 4 stages and order p: u' = Σ_{n ≤ p} zⁿ/n! u with z = λ dt."""
    u, z = torch.ones(1, 1, 1, dtype=torch.float64), -0.7
    expected = sum(z**n / math.factorial(n) for n in range(method.order + 1))
    assert method(lambda u: z * u, u, 1.0).item() == pytest.approx(expected, rel=1e-15)


def test_rk4_agrees_with_an_adaptive_solver_of_scipy() -> None:
    def pendulum(u: Tensor) -> Tensor:
        return torch.stack([u[:, 1], -torch.sin(u[:, 0])], dim=1)

    u0 = torch.tensor([[[1.2], [0.3]]], dtype=torch.float64)
    ours = rollout(rk4, pendulum, u0, 0.01, 300)[0, -1, :, 0]
    theirs = solve_ivp(lambda t, u: [u[1], -math.sin(u[0])], (0, 3), [1.2, 0.3], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.numpy(), theirs.y[:, -1], rtol=1e-8)


@pytest.mark.parametrize("name", ["euler", "midpoint", "rk4", "dopri5"])
def test_agrees_with_torchdiffeq(name: str) -> None:
    """Its rk4 is the 3/8 rule, and its dopri5 controls the step: they differ from ours by the error of the method."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    rate, _, u0 = PROBLEMS["rotation"]
    times = torch.linspace(0, 1, 51, dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda t, u: rate(u), u0, times, rtol=1e-11, atol=1e-12, method=name).transpose(0, 1)
    ours = rollout(INTEGRATORS[name], rate, u0, 0.02, 50)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 if name in ("rk4", "dopri5") else 1e-13)


@pytest.mark.parametrize(
    "step",
    [euler, midpoint, rk4, substeps(rk4, 2), lambda rate, u, dt: u + dt * rate(u)],
    ids=["euler", "midpoint", "rk4", "substeps", "own"],
)
def test_increment_is_the_change_over_dt(step) -> None:
    u = torch.rand(3, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (step(logistic, u, 0.1) - u) / 0.1
    torch.testing.assert_close(increment(step, logistic, u, 0.1), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [*OF_ANY_RATE, substeps(euler, 3)], ids=lambda method: method.name)
def test_increment_keeps_the_digits_that_the_difference_loses(method: Integrator) -> None:
    """With dt = 1e-7 a float32 state of size one does not move, its increment still does."""
    u = torch.full((1, 1, 1), 0.9)
    assert (method(logistic, u, 1e-9) == u).all()
    torch.testing.assert_close(method.increment(logistic, u, 1e-9), logistic(u), rtol=1e-6, atol=0)


def test_next_state_ignores_dt() -> None:
    u = torch.ones(2, 1, 3)
    assert next_state.order is None
    assert (next_state(lambda u: 3 * u, u, 0.5) == 3).all()
    assert (increment(next_state, lambda u: 3 * u, u, 0.5) == 4).all()
    assert (substeps(next_state, 2)(lambda u: 3 * u, u, 0.5) == 9).all()


@pytest.mark.parametrize("step", [euler, rk4, implicit_midpoint, next_state], ids=lambda method: method.name)
def test_rollout_is_the_repeated_step(step: Integrator) -> None:
    u = u0 = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trajectory = rollout(step, logistic, u0, 0.1, 4)
    assert trajectory.shape == (2, 5, 3, 4, 5)
    assert torch.equal(trajectory, rollout(step, logistic, u0, 0.1, 4))
    for n in range(5):
        assert torch.equal(trajectory[:, n], u)
        u = step(logistic, u, 0.1)


def test_rollout_of_no_steps_is_the_initial_state() -> None:
    u0 = torch.rand(2, 1, 5)
    assert torch.equal(rollout(euler, logistic, u0, 0.1, 0), u0[:, None])


def test_rollout_keeps_what_diverged() -> None:
    u0 = torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
    with torch.no_grad():
        trajectory = rollout(euler, lambda u: torch.where(u > 1, u**9, 0 * u), u0, 1.0, 20)
    assert trajectory.shape[1] == 21
    assert torch.isfinite(trajectory[0]).all()
    assert not torch.isfinite(trajectory[1, -1]).any()


def test_gradients_flow_through_a_rollout() -> None:
    """u_n = (1 + λ dt)ⁿ u_0, so d u_n / dλ = n dt (1 + λ dt)ⁿ⁻¹."""
    slope = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    u0 = torch.ones(1, 1, 1, dtype=torch.float64)
    rollout(euler, lambda u: slope * u, u0, 0.1, 6)[:, -1].sum().backward()
    assert slope.grad is not None
    assert slope.grad.item() == pytest.approx(6 * 0.1 * 0.95**5, rel=1e-14)


def test_a_module_of_the_users_own_rolls_out() -> None:
    model = torch.nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
    for step in [*OF_ANY_RATE, next_state]:
        with torch.no_grad():
            trajectory = rollout(step, model, torch.zeros(4, 2, 10), 0.01, 3)
        assert trajectory.shape == (4, 4, 2, 10)


def test_the_table_knows_every_name_and_cannot_be_changed() -> None:
    assert all(method.name == name for name, method in INTEGRATORS.items())
    assert len(INTEGRATORS) == 7
    with pytest.raises(TypeError):
        INTEGRATORS["euler"] = rk4  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        euler.order = 7  # pyright: ignore[reportAttributeAccessIssue]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"count is 0.*at least 1"):
        substeps(euler, 0)
    with pytest.raises(ValueError, match=r"steps is -1.*at least 0"):
        rollout(euler, logistic, torch.ones(1, 1, 1), 0.1, -1)
    with pytest.raises(ValueError, match=r"wrong.*\[1\]"):
        RungeKutta("wrong", order=2, stages=((0.5, 0.5),), weights=(0.0, 1.0))


def test_the_old_name_of_the_integrator_still_works_and_warns() -> None:
    u = torch.ones(1, 1, 1)
    for call in (
        lambda **name: increment(rate=lambda u: -u, u=u, dt=0.1, **name),
        lambda **name: rollout(rate=lambda u: -u, u0=u, dt=0.1, steps=1, **name),
        lambda **name: substeps(count=2, **name)(lambda u: -u, u, 0.1),
    ):
        with pytest.warns(DeprecationWarning, match="`step` is now named `integrator`"):
            old = call(step=euler)
        assert torch.equal(old, call(integrator=euler))
        with pytest.raises(TypeError, match="integrator is given twice"):
            call(step=euler, integrator=euler)


def stiff(size: int = 40, largest: float = 12.0) -> Tensor:
    """A symmetric matrix of eigenvalues from −largest to 0."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return basis @ torch.diag(-torch.linspace(0, largest, size, dtype=torch.float64)) @ basis.T


def test_an_implicit_step_solves_a_stiff_equation_that_explicit_ones_cannot() -> None:
    matrix, one = stiff(), torch.eye(40, dtype=torch.float64)
    u = torch.randn(5, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = u @ torch.linalg.solve(one - matrix / 2, one + matrix / 2).T
    torch.testing.assert_close(implicit_midpoint(lambda u: u @ matrix.T, u, 1.0), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert rollout(implicit_midpoint, lambda u: u @ matrix.T, u, 1.0, 50)[:, -1].abs().max() < u.abs().max()
        assert rollout(rk4, lambda u: u @ matrix.T, u, 1.0, 50)[:, -1].abs().max() > 1e9


def test_the_gradient_of_an_implicit_step_is_that_of_its_solution() -> None:
    matrix, one = stiff(6, 3.0).requires_grad_(), torch.eye(6, dtype=torch.float64)
    u = torch.randn(3, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    exact = u @ torch.linalg.solve(one - matrix / 2, one + matrix / 2).T
    ours = implicit_midpoint(lambda u: u @ matrix.T, u, 1.0)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (u, matrix)) for x in (ours, exact)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(lambda u: implicit_midpoint(lambda v: torch.sin(3 * v), u, 0.4), u)


def test_an_implicit_step_has_no_second_derivative_and_says_so() -> None:
    u = torch.ones(1, 1, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(euler(torch.sin, u, 0.1).sum(), u, create_graph=True)
    assert slope.requires_grad
    with pytest.raises(RuntimeError, match=r"implicit_midpoint.*no second derivative"):
        torch.autograd.grad(implicit_midpoint(torch.sin, u, 0.1).sum(), u, create_graph=True)


def test_a_sample_whose_step_is_not_solved_is_nan_and_leaves_the_others_alone() -> None:
    def rate(u: Tensor) -> Tensor:
        return torch.where(u > 5, u.exp(), -u)

    u = torch.tensor([1.0, 9.0, float("nan"), 2.0], dtype=torch.float64).reshape(4, 1, 1)
    following = implicit_midpoint(rate, u, 0.5)
    assert following.isnan().flatten().tolist() == [False, True, True, False]
    alone = torch.cat([implicit_midpoint(rate, u[i : i + 1], 0.5) for i in (0, 3)])
    torch.testing.assert_close(following[[0, 3]], alone, rtol=1e-14, atol=0)


class Oscillator:
    """du/dt = J ∇H with H = Σ (u⁴/4 + u²/2) of a position and a momentum, and a discrete gradient of it."""

    def __call__(self, u: Tensor) -> Tensor:
        return self._turned(u**3 + u)

    def between(self, u: Tensor, v: Tensor) -> Tensor:
        return self._turned((u + v) * (u.square() + v.square()) / 4 + (u + v) / 2)

    def energy(self, u: Tensor) -> Tensor:
        return (u**4 / 4 + u**2 / 2).sum((-2, -1))

    def _turned(self, gradient: Tensor) -> Tensor:
        return torch.stack([gradient[:, 1], -gradient[:, 0]], 1)


def test_a_discrete_gradient_keeps_the_energy_at_any_dt() -> None:
    rate, u0 = Oscillator(), torch.tensor([[[1.5], [0.0]]], dtype=torch.float64)
    with torch.no_grad():
        energies = rate.energy(rollout(discrete_gradient, rate, u0, 0.4, 100))
        assert (energies / energies[:, :1] - 1).abs().max() < 1e-13
        energies = rate.energy(rollout(implicit_midpoint, rate, u0, 0.4, 100))
        assert (energies / energies[:, :1] - 1).abs().max() > 1e-3
    ends = [rollout(discrete_gradient, rate, u0, 1 / n, n)[:, -1] for n in (40, 80, 160)]
    assert ((ends[0] - ends[1]).norm() / (ends[1] - ends[2]).norm()).item() == pytest.approx(4, abs=0.1)


def test_a_discrete_gradient_needs_an_energy() -> None:
    with pytest.raises(TypeError, match=r"needs a model of an energy.*implicit_midpoint"):
        discrete_gradient(torch.nn.Identity(), torch.ones(1, 1, 3), 0.1)
