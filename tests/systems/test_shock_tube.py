"""Shock tubes: published solutions, the jump conditions, conservation, and what is refused."""

import numpy as np
import pytest
import torch

from squall.systems import ShockTube
from squall.systems.shock_tube import Gas, _Riemann


def test_sods_tube_is_that_of_the_literature():
    tube = _Riemann(Gas(1.0, 0.0, 1.0), Gas(0.125, 0.0, 0.1), 1.4)
    assert tube.pressure == pytest.approx(0.30313, abs=1e-5)
    assert tube.velocity == pytest.approx(0.92745, abs=1e-5)
    left, right = tube.at(np.array([0.92, 0.93]))[0]
    assert left == pytest.approx(0.42632, abs=1e-5)
    assert right == pytest.approx(0.26557, abs=1e-5)


def test_leblancs_tube_is_that_of_the_literature():
    """Guermond, Popov and Tomov, Comput. Methods Appl. Mech. Eng. 347 (2019) 143."""
    tube = _Riemann(Gas(1.0, 0.0, 1 / 15), Gas(1e-3, 0.0, 2e-10 / 3), 5 / 3)
    assert tube.pressure == pytest.approx(0.515577927650970e-3, rel=1e-10)
    assert tube.velocity == pytest.approx(0.621838671391735, rel=1e-10)
    left, right = tube.at(np.array([0.6218, 0.6219]))[0]
    assert left == pytest.approx(5.40793353493162e-2, rel=1e-10)
    assert right == pytest.approx(3.99999806043000e-3, rel=1e-10)
    behind, ahead = tube.at(np.array([0.82911, 0.82912]))[0]
    assert (behind > 3e-3, ahead) == (True, 1e-3), "the shock runs at 0.829118362533470"
    assert tube.at(np.array([-1 / 3 - 1e-6]))[0] == 1.0


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Gas(1.0, 0.0, 1000.0), Gas(1.0, 0.0, 0.01)),
        (Gas(1.0, 2.0, 0.4), Gas(1.0, -2.0, 0.4)),
        (Gas(1.0, -1.0, 0.4), Gas(0.5, 1.0, 0.4)),
        (Gas(1e-3, 0.0, 1e-8), Gas(1.0, 0.0, 1.0)),
    ],
    ids=["blast", "collision", "two rarefactions", "from the right"],
)
def test_what_flows_in_is_what_is_there(left, right):
    """Mass, momentum and energy in a wide window at t = 1 against the fluxes at its ends."""
    g, half, n = 1.4, 60.0, 400_000
    speed = (np.arange(n) + 0.5) * 2 * half / n - half
    rho, v, p = _Riemann(left, right, g).at(speed)
    energy = p / (g - 1) + rho * v**2 / 2
    for density, of, flux in (
        (rho, lambda q: q.density, lambda q: q.density * q.velocity),
        (rho * v, lambda q: q.density * q.velocity, lambda q: q.density * q.velocity**2 + q.pressure),
        (energy, lambda q: q.pressure / (g - 1) + q.density * q.velocity**2 / 2,
         lambda q: (q.pressure * g / (g - 1) + q.density * q.velocity**2 / 2) * q.velocity),
    ):  # fmt: skip
        before, inflow = half * (of(left) + of(right)), flux(left) - flux(right)
        size = (np.abs(density) * 2 * half / n).sum()
        assert (density * 2 * half / n).sum() == pytest.approx(before + inflow, abs=1e-4 * size)


def test_mass_and_energy_are_conserved_while_the_waves_are_inside():
    drift = []
    for points in (200, 800):
        system = ShockTube(points=points, most=9.0, dt=0.5)
        u = system.simulate(system.initial_states(3, torch.Generator().manual_seed(0)), steps=10)
        for values in (system.mass(u), system.energy(u)):
            drift.append(((values - values[:, :1]) / values[:, :1]).abs().max().item())
    assert max(drift[2:]) < 2e-3
    assert max(drift[2:]) < 0.5 * max(drift[:2])


def test_a_trajectory_goes_on_with_the_speed_of_its_waves():
    """A solution of x/t alone: at three times the time it is the same at three times the distance from the membrane."""
    system = ShockTube(points=900, dt=1.0)
    u = system.simulate(system.initial_states(2, torch.Generator().manual_seed(1)), steps=3)
    x = (torch.arange(900) + 0.5) * 0.01
    near = ((x - 3.0) / 3 + 3.0) / 0.01 - 0.5
    inside = (near - near.round()).abs() < 1e-3
    assert inside.sum() > 200
    torch.testing.assert_close(u[:, 3][..., inside], u[:, 1][..., near[inside].round().long()], rtol=1e-9, atol=1e-9)


def test_states_with_several_jumps_or_a_vacuum_are_refused():
    system = ShockTube(points=9)
    state = system.initial_states(1, torch.Generator().manual_seed(0))
    state[0, 0, 7:] = 0.5
    with pytest.raises(ValueError, match="initial state 0 has 2 jumps"):
        system.simulate(state, steps=1)
    apart = torch.zeros(1, 3, 9)
    apart[0, 1] = torch.tensor([-9.0] * 4 + [9.0] * 5)
    with pytest.raises(ValueError, match="vacuum"):
        system.simulate(apart, steps=1)
    still = system.simulate(torch.ones(1, 3, 9), steps=2)
    torch.testing.assert_close(still, torch.ones(1, 3, 3, 9).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adiabatic": 1.0}, "adiabatic is 1.0"),
        ({"least": 5.0, "most": 3.0}, "in this order"),
        ({"membrane": 1.0}, "membrane is 1.0; it must be inside"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShockTube(**options)
