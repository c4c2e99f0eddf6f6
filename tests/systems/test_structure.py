"""Energy, gradient and rate belong together, and are those of the equation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.grid import integral
from squall.systems import SYSTEMS, CahnHilliard, EnergySystem, KortewegDeVries

OTHERS = [
    CahnHilliard(a=0.7, b=1.3, gamma=2e-3, points=17, width=1.7),
    KortewegDeVries(alpha=2.5, beta=-0.4, points=17, width=3.0),
]
every_system = pytest.mark.parametrize("system", [CahnHilliard(), KortewegDeVries(), *OTHERS], ids=repr)


def states(system: EnergySystem, seed: int = 0, shape: tuple[int, ...] = (3, 1)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, system.points, generator=generator, dtype=torch.float64)


@every_system
def test_the_energy_gradient_is_the_derivative_of_the_energy_over_dx(system):
    u = states(system).requires_grad_()
    (derivative,) = torch.autograd.grad(system.energy(u).sum(), u)
    torch.testing.assert_close(system.energy_gradient(u), derivative / system.grid.spacing)


@every_system
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_discrete_gradient_gives_the_difference_in_energy(system, seed):
    u, v = states(system, seed), states(system, seed + 1)
    power = integral(system.discrete_gradient(u, v) * (v - u), system.grid.spacing)
    torch.testing.assert_close(power, system.energy(v) - system.energy(u))
    torch.testing.assert_close(system.discrete_gradient(u, u), system.energy_gradient(u))


@every_system
def test_the_rate_changes_what_the_system_declares_and_nothing_else(system):
    u = states(system)
    dx = system.grid.spacing
    rate = system.rate(u)
    power = integral(system.energy_gradient(u) * rate, dx)
    size = integral(system.energy_gradient(u).abs() * rate.abs(), dx)
    assert (integral(rate, dx).abs() < 1e-12 * integral(rate.abs(), dx)).all()
    assert "mass" in system.conserved
    if "energy" in system.conserved:
        assert (power.abs() < 1e-12 * size).all()
    else:
        assert "energy" in system.dissipated
        assert (power < -1e-3 * size).all()


@every_system
def test_the_jacobian_of_the_scheme_is_the_derivative_of_its_residual(system):
    u, v = states(system)[0], states(system, 1)[0]
    exact = torch.autograd.functional.jacobian(lambda v: system._residual(u, v)[0], v)
    bands = system._jacobian(u, v)[:, 0]
    dense = torch.zeros(system.points, system.points, dtype=torch.float64)
    for shift, band in zip(range(-2, 3), bands, strict=True):
        dense += torch.diag(band).roll(shift, 1)
    assert isinstance(exact, torch.Tensor)
    torch.testing.assert_close(dense, exact[:, 0])


@pytest.mark.parametrize(("system", "key"), [(CahnHilliard(), "ch"), (KortewegDeVries(), "kdv")])
def test_rate_and_energy_are_those_of_the_reference(system, key, reference):
    u, rate, energy = (reference(f"{key}_{name}") for name in ("u", "dudt", "energy"))
    torch.testing.assert_close(system.rate(u), rate, rtol=1e-12, atol=1e-12 * rate.abs().max().item())
    torch.testing.assert_close(system.energy(u), energy, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        # u = sin x with periodic width 2π; the rates are worked out by hand from the equations.
        (lambda m: CahnHilliard(a=2.0, b=3.0, gamma=0.5, points=m, width=2 * np.pi),
         lambda x: 1.5 * torch.sin(x) + 18 * torch.sin(x) * torch.cos(x) ** 2 - 9 * torch.sin(x) ** 3),
        (lambda m: KortewegDeVries(alpha=2.0, beta=3.0, points=m, width=2 * np.pi),
         lambda x: -2 * torch.sin(x) * torch.cos(x) - 3 * torch.cos(x)),
    ],
)  # fmt: skip
def test_the_rate_converges_to_that_of_the_equation_at_second_order(make, rate):
    errors = []
    for points in (64, 128, 256):
        system = make(points)
        x = system.grid.coordinates()
        errors.append((system.rate(torch.sin(x)) - rate(x)).abs().max().item())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.1)


@every_system
def test_any_leading_shape_and_precision(system):
    u = states(system, shape=(2, 5, 1))
    for function in (system.rate, system.energy, system.energy_gradient, system.structure, system.mass):
        whole = function(u)
        assert whole.dtype == torch.float64
        torch.testing.assert_close(whole[1, 3, 0], function(u[1, 3, 0]))
        assert function(u.float()).dtype == torch.float32
    assert system.energy(u).shape == (2, 5, 1)
    assert torch.autograd.gradcheck(system.rate, states(system, shape=(1, 1)).requires_grad_())


@every_system
def test_a_system_is_rebuilt_from_its_parameters(system):
    parameters = system.parameters()
    assert SYSTEMS[system.name].from_parameters(parameters) == system
    assert type(system).from_parameters({name: float(value) for name, value in parameters.items()}) == system


def test_the_table_of_systems_is_complete_and_cannot_be_changed():
    assert {"cahn-hilliard": CahnHilliard, "korteweg-de-vries": KortewegDeVries}.items() <= SYSTEMS.items()
    with pytest.raises(TypeError):
        SYSTEMS["mine"] = CahnHilliard  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gama": 1.0}, "no parameter gama: did you mean 'gamma'.*gamma"),
        ({"points": 50.5}, r"points is 50.5.*whole"),
    ],
)
def test_wrong_parameters_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CahnHilliard.from_parameters({**CahnHilliard().parameters(), **change})


def test_missing_parameters_are_refused():
    with pytest.raises(ValueError, match="korteweg-de-vries lack beta, dt, points, width"):
        KortewegDeVries.from_parameters({"alpha": -6.0})


@pytest.mark.parametrize("cls", [CahnHilliard, KortewegDeVries])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"dt": 0.0}, "dt is 0.0.*positive"),
        ({"dt": -1e-3}, "dt is -0.001.*positive"),
        ({"dt": float("nan")}, "dt is nan.*finite"),
        ({"width": 0.0}, "width is 0.0.*positive"),
        ({"points": 4}, "points is 4.*at least 5"),
    ],
)
def test_impossible_grids_and_steps_are_refused(cls, argument, message):
    with pytest.raises(ValueError, match=message):
        cls(**argument)


def test_impossible_coefficients_are_refused():
    with pytest.raises(ValueError, match=r"gamma is -0.1.*not be negative"):
        CahnHilliard(gamma=-0.1)
    with pytest.raises(ValueError, match=r"alpha is inf.*finite"):
        KortewegDeVries(alpha=float("inf"))


def test_regimes_of_a_hand_made_separation():
    """A field of two phases that forms, rests, loses a domain and rests again."""
    system = CahnHilliard(points=40)
    x = torch.arange(40)
    phase = torch.where((x < 20), 1.0, -1.0).double()
    phase[[0, 19]], phase[[20, 39]] = 0.3, -0.3
    gone = torch.full((40,), -1.0, dtype=torch.float64)
    times = [0.02 * phase, 0.4 * phase, phase, phase, phase, gone, gone, gone]
    labels = system.regimes(torch.stack(times)[None, :, None])[0, :, 0]
    named = [[system.regime_names[int(i)] for i in row] for row in labels]
    assert set(named[0]) == set(named[1]) == {"separation"}
    assert named[2][10] == named[2][30] == "body"
    assert named[3][0] == named[3][19] == named[3][20] == "boundary"
    assert named[4][10] == "collision"
    assert named[4][30] == "body"
    assert set(named[6]) == {"body"}
