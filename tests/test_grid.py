"""The difference operators: exact on what they are exact on, and summation by parts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squall.grid import (
    Grid,
    backward_difference,
    central_difference,
    forward_difference,
    integral,
    laplacian,
    squared_slope,
)

OPERATORS = [forward_difference, backward_difference, central_difference, laplacian]


def fields(seed: int, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, 3, points, generator=generator, dtype=torch.float64)
    return u, v


def fitted_order(operator, derivative) -> float:
    """The slope of the logarithm of the error of an operator on a smooth function over the logarithm of dx."""
    errors, spacings = [], []
    for points in (32, 64, 128):
        grid = Grid(points, 2 * math.pi)
        x = grid.coordinates()
        error = operator(torch.exp(torch.sin(x)), grid.spacing) - derivative(x)
        errors.append(math.log(error.abs().max()))
        spacings.append(math.log(grid.spacing))
    return (errors[-1] - errors[0]) / (spacings[-1] - spacings[0])


def first(x):
    return torch.cos(x) * torch.exp(torch.sin(x))


def second(x):
    return (torch.cos(x) ** 2 - torch.sin(x)) * torch.exp(torch.sin(x))


@pytest.mark.parametrize(
    ("operator", "derivative", "order"),
    [
        (forward_difference, first, 1),
        (backward_difference, first, 1),
        (central_difference, first, 2),
        (laplacian, second, 2),
        (squared_slope, lambda x: first(x) ** 2, 2),
    ],
)
def test_operators_converge_at_their_order(operator, derivative, order):
    assert fitted_order(operator, derivative) == pytest.approx(order, abs=0.1)


@given(seed=st.integers(0, 2**31), points=st.integers(5, 40), dx=st.floats(0.01, 10))
def test_summation_by_parts(seed, points, dx):
    u, v = fields(seed, points)

    def inner(a, b):
        return integral(a * b, dx)

    torch.testing.assert_close(inner(v, central_difference(u, dx)), -inner(central_difference(v, dx), u))
    torch.testing.assert_close(inner(v, forward_difference(u, dx)), -inner(backward_difference(v, dx), u))
    torch.testing.assert_close(inner(v, laplacian(u, dx)), inner(laplacian(v, dx), u))
    torch.testing.assert_close(-inner(u, laplacian(u, dx)), integral(squared_slope(u, dx), dx))


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_commute_with_translation_and_end_in_zero_mass(operator):
    u, _ = fields(0, 11)
    assert torch.equal(operator(u.roll(3, -1), 0.1), operator(u, 0.1).roll(3, -1))
    assert operator(u, 0.1).sum(-1).abs().max() < 1e-11
    assert operator(u, 0.1).abs().min(-1).values.max() > 0


def test_laplacian_is_the_composition_of_the_one_sided_differences():
    u, _ = fields(1, 9)
    torch.testing.assert_close(laplacian(u, 0.3), backward_difference(forward_difference(u, 0.3), 0.3))


def test_operators_act_on_the_last_axis_of_any_shape_and_keep_the_precision():
    u = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(0))
    for operator in [*OPERATORS, squared_slope]:
        whole = operator(u, 0.5)
        assert whole.dtype == torch.float32
        assert torch.equal(whole[1, 2, 3], operator(u[1, 2, 3], 0.5))
    assert integral(u, 0.5).shape == (2, 3, 4)


def test_the_grid_is_a_ring():
    grid = Grid(points=7, width=3.5)
    x = grid.coordinates()
    assert grid.spacing == 0.5
    assert x.dtype == torch.float64
    assert grid.coordinates(torch.float32).dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3], dtype=torch.float64), rtol=0, atol=1e-15)
    assert integral(torch.ones(7), grid.spacing) == grid.width


@pytest.mark.parametrize("points", [4, 1, 0, -3])
def test_too_few_points_are_refused(points):
    with pytest.raises(ValueError, match=rf"points is {points}.*at least 5"):
        Grid(points=points)


def test_a_fractional_number_of_points_is_refused():
    with pytest.raises(TypeError):
        Grid(points=7.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("width", [0.0, -1.0, math.inf, math.nan])
def test_a_width_that_is_no_length_is_refused(width):
    with pytest.raises(ValueError, match=r"width is .*positive and finite"):
        Grid(width=width)
