"""The trajectories: the reference, the conservation laws, exact solutions, another solver, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from scipy.integrate import solve_ivp

from squall.systems import CahnHilliard, ConvergenceError, EnergySystem, KortewegDeVries, implicit

every_class = pytest.mark.parametrize("cls", [CahnHilliard, KortewegDeVries])


def draw(system: EnergySystem, n: int = 3, seed: int = 0) -> torch.Tensor:
    return system.initial_states(n, torch.Generator().manual_seed(seed))


def check_laws(system: EnergySystem, u: torch.Tensor) -> None:
    mass, energy = system.mass(u), system.energy(u)
    scale = system.mass(u.abs()).amax().clamp(min=1.0)
    assert (mass - mass[:, :1]).abs().max() < 1e-12 * scale
    if "energy" in system.conserved:
        assert ((energy - energy[:, :1]) / energy[:, :1]).abs().max() < 1e-10
    if "energy" in system.dissipated:
        assert (energy.diff(dim=1) <= 1e-15 * energy.abs().amax()).all()
        assert (energy[:, -1] < energy[:, 0]).all()


@pytest.mark.parametrize(("system", "key"), [(CahnHilliard(), "ch_u"), (KortewegDeVries(), "kdv_u")])
def test_the_reference_is_reproduced(system, key, reference):
    theirs = reference(key)[:, :, None, :]
    ours = system.simulate(theirs[:, 0], steps=theirs.shape[1] - 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@every_class
def test_the_laws_hold_over_the_whole_length_of_the_paper(cls):
    system = cls()
    u = system.simulate(system.initial_states(20, RandomState(system.paper_seed)), steps=500)
    assert u.shape == (20, 501, 1, 50)
    assert u.dtype == torch.float64
    check_laws(system, u)


@pytest.mark.parametrize(
    "system",
    [
        CahnHilliard(points=5, a=0.5, b=2.0, gamma=1e-2),
        CahnHilliard(points=6, width=0.3),
        CahnHilliard(points=37, dt=1e-3),
        CahnHilliard(points=200),
        CahnHilliard(gamma=0.0, dt=1e-5),
        KortewegDeVries(points=5),
        KortewegDeVries(points=8, dt=1e-2),
        KortewegDeVries(points=61, alpha=3.0, beta=-0.5),
        KortewegDeVries(points=500, dt=1e-2),
    ],
    ids=repr,
)
def test_the_laws_hold_for_any_grid_and_coefficients(system):
    check_laws(system, system.simulate(draw(system), steps=40))


@every_class
def test_the_scheme_is_of_second_order_in_time(cls):
    system = cls()
    start = draw(system)
    if cls is CahnHilliard:  # past the decay of the noise, whose stiff modes no practical dt resolves
        start = system.simulate(start, steps=60)[:, -1]
    length = 20 * system.dt
    ends = []
    for steps in (10, 20, 40, 320):
        parameters = system.parameters() | {"dt": length / steps}
        ends.append(cls.from_parameters(parameters).simulate(start, steps)[:, -1])
    errors = [(end - ends[-1]).norm().item() for end in ends[:-1]]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)


@every_class
def test_an_integrator_of_somebody_else_agrees(cls):
    system = cls(points=24, dt=cls().dt / 50)
    start = draw(system, n=1)
    ours = system.simulate(start, steps=200)[0, -1, 0].numpy()

    def rate(_: float, u: np.ndarray) -> np.ndarray:
        return system.rate(torch.from_numpy(u)).numpy()

    theirs = solve_ivp(rate, (0, 200 * system.dt), start[0, 0].numpy(), method="Radau", rtol=1e-9, atol=1e-11).y[:, -1]
    moved = np.abs(theirs - start[0, 0].numpy()).max()
    assert np.abs(ours - theirs).max() < 1e-5 * moved


def crest(u: torch.Tensor, width: float) -> torch.Tensor:
    """The place of a single crest on the ring, between the points too: the phase of the first Fourier mode."""
    return -torch.fft.rfft(u)[..., 1].angle() * width / (2 * math.pi)


@pytest.mark.parametrize(("alpha", "beta"), [(-6.0, 1.0), (4.0, 0.5)])
def test_a_soliton_travels_at_its_speed_to_second_order_in_dx(alpha, beta):
    k, errors = 1.0, []
    for points in (100, 200, 400):
        system = KortewegDeVries(alpha=alpha, beta=beta, points=points, width=20.0, dt=2e-3)
        x = system.grid.coordinates()
        u = system.simulate(system.soliton(x, 0.0, k, 10.0)[None, None], steps=250)[0, :, 0]
        moved = (crest(u[-1], system.width) - crest(u[0], system.width)).item()
        travelled = (moved + system.width / 2) % system.width - system.width / 2  # the shorter way round the ring
        time = 250 * system.dt
        errors.append(abs(travelled / time + 4 * beta * k**2))
        spread = (u[-1] - system.soliton(x, time, k, 10.0)).abs().max() / u[0].abs().max()
        assert spread < 5 * system.grid.spacing**2
    assert errors[-1] < 0.02 * 4 * beta * k**2
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


def test_small_waves_of_a_mixture_grow_at_the_rate_of_linear_theory():
    system = CahnHilliard(points=100, dt=1e-5)
    k = 2 * math.pi * 4
    x = system.grid.coordinates()
    u = system.simulate(1e-6 * torch.cos(k * x)[None, None], steps=100)[0, :, 0]
    growth = math.log(float(u[-1].norm() / u[0].norm())) / (100 * system.dt)
    assert growth == pytest.approx(k**2 * (system.a - system.gamma * k**2), rel=0.02)


@every_class
def test_moving_the_start_around_the_ring_moves_the_trajectory(cls):
    system = cls()
    start = draw(system)
    u, moved = system.simulate(start, steps=30), system.simulate(start.roll(7, -1), steps=30)
    torch.testing.assert_close(moved, u.roll(7, -1), rtol=0, atol=1e-12)


@every_class
def test_a_trajectory_does_not_depend_on_its_companions(cls):
    system = cls(points=250, dt=10 * cls().dt)
    start = draw(system, n=60)  # several blocks, of calm and violent states: their iterations differ in number
    start[::2] *= 1e-2
    together = system.simulate(start, steps=10)
    for index in (0, 1, 30, 59):
        assert torch.equal(system.simulate(start[index : index + 1], steps=10)[0], together[index])


@every_class
def test_going_on_from_a_state_continues_its_trajectory(cls):
    system = cls()
    u = system.simulate(draw(system), steps=30)
    torch.testing.assert_close(system.simulate(u[:, 12], steps=18), u[:, 12:], rtol=0, atol=1e-12)


@every_class
def test_states_of_the_users_own_are_taken_as_they_are(cls):
    system = cls(points=12)
    start = torch.cos(2 * math.pi * torch.arange(12) / 12)[None, None].requires_grad_()
    before = start.detach().clone()
    u = system.simulate(start, steps=2)
    assert u.dtype == torch.float64
    assert not u.requires_grad
    assert torch.equal(u[:, 0], before.double())
    assert torch.equal(start.detach(), before)
    still = system.simulate(torch.full((1, 1, 12), 0.3), steps=2)  # an even state never moves
    assert torch.equal(still, still[:, :1].expand_as(still))


def test_progress_is_told_the_finished_steps():
    seen: list[int] = []
    system = CahnHilliard(points=9)
    system.simulate(draw(system), steps=4, progress=seen.append)
    assert seen == [1, 2, 3, 4]


def test_a_step_without_a_solution_is_named():
    system = CahnHilliard(points=30, b=-1.0, dt=1e-3)  # saturation of the wrong sign: the second state blows up
    start = torch.stack([torch.full((1, 30), 0.1), 2 + draw(system, n=1)[0].float()])
    with pytest.raises(
        ConvergenceError, match=r"step \d+ in trajectory 1: the residual is .*dt = 0.001.*smaller dt"
    ) as caught:
        system.simulate(start, steps=200)
    assert caught.value.trajectory == 1
    assert caught.value.step >= 1
    assert caught.value.residual > 1e-6


def test_an_extrapolation_that_misleads_is_given_up(monkeypatch):
    system = KortewegDeVries()
    start = draw(system)
    u = system.simulate(start, steps=5)
    monkeypatch.setattr(implicit.Extrapolation, "predict", lambda past: torch.full_like(start[:, 0], torch.nan))
    torch.testing.assert_close(system.simulate(start, steps=5), u, rtol=0, atol=1e-12)


def test_the_failing_trajectory_is_named_behind_the_first_block():
    system = KortewegDeVries(points=2000)
    start = torch.zeros(5, 1, 2000, dtype=torch.float64)
    start[4, 0] = 1e200 * torch.sin(system.grid.coordinates())
    with pytest.raises(ConvergenceError, match="step 1 in trajectory 4: the residual is inf"):
        system.simulate(start, steps=1)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (torch.zeros(3, 50), ValueError, r"shape \(3, 50\).*\(batch, 1, 50\)"),
        (torch.zeros(3, 2, 50), ValueError, r"shape \(3, 2, 50\)"),
        (torch.zeros(3, 1, 49), ValueError, r"shape \(3, 1, 49\).*another points"),
        (torch.zeros(0, 1, 50), ValueError, r"shape \(0, 1, 50\).*at least one state"),
        (torch.zeros(3, 1, 50, dtype=torch.long), TypeError, r"torch.int64.*floating"),
        (
            torch.eye(50)[:3, None] * torch.tensor([1.0, torch.nan, 1.0])[:, None, None],
            ValueError,
            r"50 numbers .*state 1",
        ),
    ],
)
def test_bad_first_states_are_refused(start, error, message):
    with pytest.raises(error, match=message):
        CahnHilliard().simulate(start)


@pytest.mark.parametrize("steps", [0, -5])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps is {steps}.*at least 1"):
        CahnHilliard().simulate(torch.zeros(1, 1, 50), steps=steps)
