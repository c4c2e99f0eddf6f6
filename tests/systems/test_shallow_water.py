"""Laws of the sphere: areas, conserved quantities, the state of Williamson's second test, files and mistakes."""

import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import squall.data
from squall._process.extras import MissingExtraError
from squall.cli import main
from squall.systems import ShallowWater
from squall.systems.shallow_water import GRAVITY, RADIUS, ROTATION

SMALL = {"latitudes": 24, "longitudes": 48, "step": 300.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def package():
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")


def test_areas_sum_to_the_sphere_and_latitudes_run_from_the_north():
    system = ShallowWater(**SMALL)
    assert system.areas.sum().item() == pytest.approx(4 * math.pi, rel=1e-13)
    assert (system.latitude.diff() < 0).all()
    assert system.longitude.tolist() == pytest.approx([7.5 * i for i in range(48)])
    area_of_cap = system.areas[system.latitude > 0].sum().item()
    assert area_of_cap == pytest.approx(2 * math.pi, rel=1e-13)


@pytest.mark.parametrize("start", ["jet", "vortices"])
def test_mass_is_conserved_and_damping_takes_energy(start):
    system = ShallowWater(**SMALL, start=start)
    u = system.simulate(system.initial_states(1, seeded()), steps=8)
    mass, energy = system.mass(u)[0], system.energy(u)[0]
    assert ((mass - 10_000).abs() < 1e-8).all()
    assert energy[-1] < energy[0]
    assert u[0, -1].isfinite().all()


def test_energy_error_without_damping_is_of_second_order_in_the_step():
    """Third-order steps after one Euler step at every dt, whose error is of second order."""
    errors = []
    for step in (300.0, 150.0):
        system = ShallowWater(latitudes=24, longitudes=48, step=step, start="vortices")
        system._solver.hyperdiff.fill_(1)
        energy = system.energy(system.simulate(system.initial_states(1, seeded()), steps=2))[0]
        errors.append(abs(energy[-1] / energy[0] - 1).item())
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] > 3.5


def test_the_geostrophic_state_of_williamson_is_kept():
    system = ShallowWater(**SMALL, depth=2000.0)
    speed = 2 * math.pi * RADIUS / (12 * 86400)
    sine = system.latitude.deg2rad().sin()[:, None].expand(24, 48)
    state = system.balanced(2 * speed / RADIUS * sine)
    height = 2000 - (RADIUS * ROTATION * speed + speed**2 / 2) / GRAVITY * (sine**2 - 1 / 3)
    assert torch.allclose(state[0], height, atol=1e-6)
    wind = system.winds(state)
    assert torch.allclose(wind[0], speed * system.latitude.deg2rad().cos()[:, None].expand(24, 48), atol=1e-8)
    assert wind[1].abs().max() < 1e-8
    u = system.simulate(state[None], steps=8)[0]
    assert (u[-1, 0] - height).abs().max() < 1e-3
    assert (u[-1, 1] - u[0, 1]).abs().max() < 1e-10


def test_the_jet_is_that_of_the_package():
    system = ShallowWater()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its torch.meshgrid without `indexing`
        system._solver.hamp.fill_(0)
        spectrum = system._solver.galewsky_initial_condition()
    theirs = system._solver.spec2grid(spectrum)
    ours = system.jet()
    assert torch.allclose(ours[1], theirs[1], atol=1e-10)
    # The package balances the jet before its truncation, and does not set the mean height to the depth.
    difference = ours[0] - theirs[0] / GRAVITY
    assert difference.std() < 5e-4 * (ours[0].max() - ours[0].min())
    assert system.latitude[system.winds(ours)[0].mean(-1).argmax()].item() == pytest.approx(45, abs=3)


def test_initial_states_are_those_of_the_seed_and_trajectories_do_not_see_each_other():
    system = ShallowWater(**SMALL, start="vortices")
    states = system.initial_states(2, seeded(3))
    assert torch.equal(states, system.initial_states(2, seeded(3)))
    assert not torch.equal(states[0], states[1])
    together = system.simulate(states, steps=1)
    assert torch.equal(together[1:], system.simulate(states[1:], steps=1))
    assert torch.allclose(states[:, 0].mul(system.areas).sum((1, 2)) / (4 * math.pi), torch.tensor(1e4).double())


def test_a_twin_differs_by_the_height_of_its_bumps():
    system = ShallowWater(**SMALL)
    initial = system.initial_states(1, seeded())
    difference = system.perturbed(initial, seeded(1), height=2.0) - initial
    assert 0 < difference.abs().max() < 6
    assert (difference[:, 1:] == 0).all()


def test_the_command_writes_what_xarray_and_squall_read(tmp_path, capsys):
    xarray = pytest.importorskip("xarray")
    path = tmp_path / "storms.nc"
    words = ["simulate", "shallow-water", "--latitudes", "16", "--longitudes", "32", "--step", "300", "--steps", "2"]
    assert main([*words, "--trajectories", "2", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    for quantity in ("mass changed by", "energy changed by", "potential enstrophy changed by"):
        assert quantity in printed
    system = ShallowWater(latitudes=16, longitudes=32, step=300.0)
    u = system.simulate(system.initial_states(2, seeded()), steps=2)
    with xarray.open_dataset(path, engine="h5netcdf") as data:
        assert dict(data.sizes) == {"trajectory": 2, "time": 3, "latitude": 16, "longitude": 32}
        assert data.latitude[0] > data.latitude[-1]
        assert float(data.cell_area.sum()) == pytest.approx(4 * math.pi * RADIUS**2, rel=1e-12)
        assert np.array_equal(data.vorticity, u[:, :, 1].float())
    source = squall.data.open(path)
    assert (source.shape, source.dt, source.boundary) == ((2, 3, 3, 16, 32), 6.0, ("open", "periodic"))
    assert torch.allclose(source.measure, system.areas / system.areas.mean())
    assert main([*words, "--out", str(path)]) == 2
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 400.0, "dt": 3600.0}, "at most 261 s"),
        ({"step": 100.0, "dt": 250.0}, "multiple of the step"),
        ({"latitudes": 4}, "at least 8 × 16"),
        ({"depth": -1.0}, "must be positive"),
    ],
)
def test_a_wrong_system_says_what_is_allowed(options, words):
    with pytest.raises(ValueError, match=words):
        ShallowWater(**options)


def test_states_of_another_grid_or_with_nan_are_refused():
    system = ShallowWater(**SMALL)
    with pytest.raises(ValueError, match="expected finite numbers"):
        system.simulate(torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="expected finite numbers"):
        system.simulate(torch.full((1, 3, 24, 48), math.nan))


def test_without_torch_harmonics_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch_harmonics", None)
    assert main(["simulate", "shallow-water", "--out", str(tmp_path / "a.nc")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'squall[sphere]'" in error
    assert not list(tmp_path.iterdir())


def test_torch_harmonics_without_the_solver_is_answered_with_the_version_that_has_it(monkeypatch):
    old = types.ModuleType("torch_harmonics")
    monkeypatch.setitem(sys.modules, "torch_harmonics", old)
    monkeypatch.setitem(sys.modules, "torch_harmonics.examples", types.ModuleType("torch_harmonics.examples"))
    with pytest.raises(
        MissingExtraError, match=r"\(for torch.*\) does not work with PyTorch .*'torch-harmonics>=0\.9\.3"
    ):
        _ = ShallowWater(**SMALL).areas
