"""Systems solved in Fourier space: exact solutions, the order of the scheme, another solver, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from squall.systems import (
    Burgers,
    CahnHilliard,
    CahnHilliard2D,
    ConvergenceError,
    KuramotoSivashinsky,
    MajdaMcLaughlinTabak,
    SpectralSystem,
)

SMOOTH = [
    Burgers(nu=0.05, points=64),
    KuramotoSivashinsky(points=64, width=22.0, warm_up=50.0),
    MajdaMcLaughlinTabak(points=64, lam=1.0),
    CahnHilliard2D(points=16, gamma=1e-2, dt=2e-3),
]
every_system = pytest.mark.parametrize("system", SMOOTH, ids=lambda system: system.name)


def draw(system: SpectralSystem, n: int = 3, seed: int = 0) -> torch.Tensor:
    return system.initial_states(n, torch.Generator().manual_seed(seed))


def end(system: SpectralSystem, start: torch.Tensor, length: float, steps: int) -> torch.Tensor:
    changed = type(system).from_parameters(system.parameters() | {"dt": length / steps, "substeps": 1})
    return changed.simulate(start, steps)[:, -1]


@pytest.mark.parametrize(
    ("system", "before", "length", "steps"),
    [
        (SMOOTH[0], 10, 0.1, 10),
        (SMOOTH[1], 10, 0.5, 40),  # stiff modes need short steps before the order shows
        (SMOOTH[2], 10, 1.0, 10),
        (SMOOTH[3], 150, 0.02, 10),  # past the linear growth, which is exact
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_scheme_is_of_fourth_order_in_time(system, before, length, steps):
    start = system.simulate(draw(system), before)[:, -1]
    ends = [end(system, start, length, factor * steps) for factor in (1, 2, 4, 32)]
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


def test_waves_without_damping_conserve_mass_and_energy_and_with_it_lose_mass():
    system = MajdaMcLaughlinTabak(points=128, damping=0.0, amplitude=0.2)
    u = system.simulate(draw(system), steps=100)
    for values in (system.mass(u), system.energy(u)):
        assert ((values - values[:, :1]) / values[:, :1]).abs().max() < 1e-6
    damped = MajdaMcLaughlinTabak(points=128)
    assert (damped.mass(damped.simulate(draw(damped), steps=40)).diff(dim=1) < 0).all()


def test_a_single_wave_turns_at_the_frequency_of_its_amplitude():
    system = MajdaMcLaughlinTabak(points=32, lam=-2.0, damping=0.0, dt=0.1)
    x, k, size = system.grid.coordinates(), 3, 0.7
    u = system.simulate(size * torch.stack([torch.cos(k * x), torch.sin(k * x)])[None], steps=20)[0, -1]
    phase = k * x - (k**0.5 - 2.0 * size**2) * 2.0
    torch.testing.assert_close(u, size * torch.stack([phase.cos(), phase.sin()]), rtol=0, atol=1e-8)


def test_a_focusing_sea_has_crests_that_carry_much_of_the_change():
    system = MajdaMcLaughlinTabak()
    u = system.simulate(draw(system, n=10), steps=100)
    change = u.diff(dim=1).square().flatten().sort(descending=True).values
    assert change[: len(change) // 100].sum() > 0.3 * change.sum()
    assert u.abs().max() > 4 * system.amplitude


def test_stripes_in_two_dimensions_are_the_mixture_in_one():
    flat = CahnHilliard2D(points=128, gamma=2e-3, dt=2e-4)
    line = CahnHilliard(points=128, gamma=2e-3, dt=2e-5)
    x = line.grid.coordinates()
    start = 0.3 * torch.sin(2 * torch.pi * x) + 0.1 * torch.cos(6 * torch.pi * x)
    ours = flat.simulate(start[None, None, :, None].expand(1, 1, 128, 128), steps=10)[0, -1, 0]
    theirs = line.simulate(start[None, None], steps=100)[0, -1, 0]  # differences of second order
    assert (ours - ours[:, :1]).abs().max() < 1e-10
    assert (ours[:, 0] - theirs).abs().max() < 3e-3 * theirs.abs().max()
    assert (theirs - start).abs().max() > 0.02


def test_small_waves_of_a_mixture_grow_at_the_rate_of_linear_theory_in_two_dimensions():
    system = CahnHilliard2D(points=32, gamma=1e-3, dt=1e-4)
    x = 2 * torch.pi * system.grid.coordinates()
    u = system.simulate(1e-7 * torch.cos(2 * x[:, None] + 3 * x)[None, None], steps=20)[0, :, 0]
    k2 = (2 * math.pi) ** 2 * 13
    growth = math.log(float(u[-1].norm() / u[0].norm())) / 2e-3
    assert growth == pytest.approx(k2 - 1e-3 * k2**2, rel=1e-6)


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
        (lambda: MajdaMcLaughlinTabak(alpha=0.0), "alpha is 0.0; it must be positive"),
        (lambda: MajdaMcLaughlinTabak(damping=-1.0), "damping is -1.0"),
        (lambda: CahnHilliard2D(gamma=0.0), "gamma is 0.0; it must be positive"),
        (lambda: KuramotoSivashinsky(nu=-1.0), "nu is -1.0; it must be positive"),
        (lambda: KuramotoSivashinsky(warm_up=-1.0), "warm_up is -1.0"),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
