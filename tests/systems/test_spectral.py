"""Systems solved in Fourier space: exact solutions, the order of the scheme, another solver, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from squall.systems import Burgers, ConvergenceError, KuramotoSivashinsky, SpectralSystem

SMOOTH = [Burgers(nu=0.05, points=64), KuramotoSivashinsky(points=64, width=22.0, warm_up=50.0)]
every_system = pytest.mark.parametrize("system", SMOOTH, ids=lambda system: system.name)


def draw(system: SpectralSystem, n: int = 3, seed: int = 0) -> torch.Tensor:
    return system.initial_states(n, torch.Generator().manual_seed(seed))


def end(system: SpectralSystem, start: torch.Tensor, length: float, steps: int) -> torch.Tensor:
    changed = type(system).from_parameters(system.parameters() | {"dt": length / steps, "substeps": 1})
    return changed.simulate(start, steps)[:, -1]


@every_system
def test_the_scheme_is_of_fourth_order_in_time(system):
    start, length = draw(system), system.dt
    ends = [end(system, start, length, steps) for steps in (40, 80, 160, 1280)]  # stiff modes need short steps first
    errors = [(u - ends[-1]).norm().item() for u in ends[:-1]]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(4, abs=0.35)


@every_system
def test_what_a_system_declares_is_conserved_or_dissipated(system):
    u = system.simulate(draw(system), steps=100)
    for name in system.conserved:
        values = getattr(system, name)(u)
        torch.testing.assert_close(values, values[:, :1].expand_as(values), rtol=1e-10, atol=1e-10)
    for name in system.dissipated:
        assert (getattr(system, name)(u).diff(dim=1) < 0).all()


@every_system
def test_substeps_and_going_on_from_a_state_continue_a_trajectory(system):
    start = draw(system)
    u = system.simulate(start, steps=12)
    torch.testing.assert_close(system.simulate(u[:, 5], steps=7), u[:, 5:], rtol=0, atol=1e-9)
    fine = type(system).from_parameters(system.parameters() | {"dt": system.dt / system.substeps, "substeps": 1})
    torch.testing.assert_close(fine.simulate(start, 12 * system.substeps)[:, :: system.substeps], u, rtol=0, atol=1e-12)


@every_system
def test_moving_the_start_around_the_ring_moves_the_trajectory(system):
    start = draw(system)
    u, moved = system.simulate(start, steps=10), system.simulate(start.roll(7, -1), steps=10)
    torch.testing.assert_close(moved, u.roll(7, -1), rtol=0, atol=1e-9)


def test_burgers_is_the_solution_of_cole_and_hopf():
    nu, points, time = 0.02, 256, 0.2
    x = np.arange(points) / points
    potential = (1 - np.cos(2 * np.pi * x)) / (2 * np.pi)  # of u = sin 2πx, which becomes a shock at t = 1/2π
    k = 2 * np.pi * np.fft.fftfreq(points, 1 / points)
    phi = np.fft.fft(np.exp(-potential / (2 * nu))) * np.exp(-nu * k**2 * time)
    exact = -2 * nu * (np.fft.ifft(1j * k * phi) / np.fft.ifft(phi)).real
    system = Burgers(nu=nu, points=points)
    ours = system.simulate(torch.sin(2 * torch.pi * torch.from_numpy(x))[None, None], steps=20)[0, -1, 0].numpy()
    assert np.abs(np.gradient(exact, x)).max() > 2 * 2 * np.pi, "the wave has steepened"
    assert np.abs(ours - exact).max() < 1e-6


def test_a_shock_is_where_burgers_changes():
    u = Burgers().simulate(draw(Burgers(), n=20), steps=100)
    change = u.diff(dim=1).square().flatten().sort(descending=True).values
    assert change[: len(change) // 100].sum() > 0.4 * change.sum()


def test_small_waves_of_a_front_grow_at_the_rate_of_linear_theory():
    system = KuramotoSivashinsky(points=64, width=40.0, dt=0.1)
    k = 2 * math.pi * 3 / 40
    u = system.simulate(1e-7 * torch.cos(k * system.grid.coordinates())[None, None], steps=50)[0, :, 0]
    growth = math.log(float(u[-1].norm() / u[0].norm())) / 5.0
    assert growth == pytest.approx(k**2 - k**4, rel=1e-5)


def test_a_front_agrees_with_a_solver_of_somebody_else_on_finer_modes():
    system = KuramotoSivashinsky(points=64, width=22.0, dt=0.1, warm_up=50.0)
    start = draw(system, n=1)
    ours = system.simulate(start, steps=50)[0, -1, 0].numpy()
    k = 2 * np.pi / 22 * np.fft.rfftfreq(128, 1 / 128)
    padded = np.zeros(65, complex)
    padded[:33] = 2 * np.fft.rfft(start[0, 0].numpy())

    def rate(_: float, u: np.ndarray) -> np.ndarray:
        modes = np.fft.rfft(u)
        return np.fft.irfft((k**2 - k**4) * modes - 0.5j * k * np.fft.rfft(u * u))

    theirs = solve_ivp(rate, (0, 5), np.fft.irfft(padded), method="BDF", rtol=1e-8, atol=1e-9).y[::2, -1]
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    assert np.abs(theirs - start[0, 0].numpy()).max() > 0.5


def test_the_derivative_is_that_of_a_wave():
    system = Burgers(points=16, width=3.0)
    x = 2 * torch.pi * system.grid.coordinates() / 3
    torch.testing.assert_close(system.derivative(torch.sin(3 * x)), 3 * 2 * torch.pi / 3 * torch.cos(3 * x))


def test_a_state_that_becomes_infinite_is_named():
    start = torch.stack([torch.zeros(1, 32), 1e9 * draw(Burgers(points=32), n=1)[0].float()])
    with pytest.raises(ConvergenceError, match=r"NaN or infinite at step \d+ in trajectory 1.*substeps = 10") as caught:
        Burgers(points=32, waves=2).simulate(start, steps=30)
    assert caught.value.trajectory == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Burgers(nu=0.0), "nu is 0.0; it must be positive"),
        (lambda: Burgers(waves=43), "waves is 43; it must be from 1 to a third"),
        (lambda: Burgers(substeps=0), "substeps is 0; it must be at least 1"),
        (lambda: KuramotoSivashinsky(nu=-1.0), "nu is -1.0; it must be positive"),
        (lambda: KuramotoSivashinsky(warm_up=-1.0), "warm_up is -1.0"),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
