"""Laws of what a model sees: history, conditions, masked points, and rollouts with them."""

import numpy as np
import pytest
import torch

from squall.data import DataError, InMemory
from squall.integrators import euler, next_state, rk4
from squall.integrators import rollout as plain_rollout
from squall.models.inputs import Inputs, advance, join, read_conditions, rollout


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_with_the_present_state_alone_a_rollout_is_that_of_the_integrators_to_the_bit(generator):
    u0 = torch.randn(3, 1, 2, 8, generator=generator)

    def rate(u):
        return torch.sin(u).roll(1, -1) - u

    assert torch.equal(rollout(rate, rk4, u0, None, 0.1, 5), plain_rollout(rk4, rate, u0[:, 0], 0.1, 5))


def test_history_comes_oldest_first_and_conditions_last(generator):
    window = torch.randn(2, 3, 2, 8, generator=generator)
    conditions = torch.randn(2, 1, 8, generator=generator)
    x = join(window, conditions)
    assert torch.equal(x, torch.cat([window[:, 0], window[:, 1], window[:, 2], conditions], 1))


def test_a_rollout_with_history_solves_its_recurrence():
    """u_{n+1} = u_n + u_{n−1}: the numbers of Fibonacci."""
    trajectory = rollout(lambda x: x.sum(1, keepdim=True), next_state, torch.ones(1, 2, 1, 1), None, 1.0, 8)
    assert trajectory.flatten().tolist() == [1, 2, 3, 5, 8, 13, 21, 34, 55]


def test_a_forcing_is_given_at_the_time_of_every_step():
    """du/dt = f(t_n) by Euler is the sum of the forcing."""
    forcing = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
    trajectory = rollout(lambda x: x[:, 1:], euler, torch.zeros(1, 1, 1, 1), forcing, 0.5, 4)
    assert trajectory.flatten().tolist() == [0, 0.5, 1.5, 3.5, 7.5]


def test_the_stages_of_an_integrator_change_the_present_state_only():
    """du/dt = −u + u_{t−1} + c, solved by hand with RK4 for held u_{t−1} and c."""
    window, c, dt = torch.tensor([2.0, 1.0], dtype=torch.float64), 0.5, 0.1
    shaped = window.reshape(1, 2, 1, 1)
    after = advance(lambda x: -x[:, 1:2] + x[:, :1] + x[:, 2:], rk4, shaped, torch.full((1, 1, 1), c).double(), dt)
    limit = float(window[0]) + c
    factor = 1 - dt + dt**2 / 2 - dt**3 / 6 + dt**4 / 24
    np.testing.assert_allclose(after.item(), limit + (float(window[1]) - limit) * factor, rtol=1e-14)


def test_masked_points_are_held_even_where_the_model_makes_them_infinite():
    mask = torch.tensor([[True, False, True]])
    trajectory = rollout(
        lambda x: torch.where(mask, x + 1, torch.inf), next_state, torch.zeros(1, 1, 1, 3), None, 1.0, 3, mask
    )
    assert trajectory[0, :, 0].tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 2], [3, 0, 3]]


def test_gradients_flow_through_a_rollout_with_history(generator):
    window = torch.randn(1, 2, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda w: rollout(lambda x: torch.tanh(x[:, :1] * x[:, 1:]), rk4, w, None, 0.1, 3), window)


def test_conditions_of_all_kinds_become_one_tensor(generator):
    states = torch.randn(3, 6, 1, 4, 5, generator=generator)
    parameter, static = torch.tensor([1.0, 2.0, 3.0]), torch.randn(4, 5, generator=generator)
    forcing = torch.randn(3, 6, 2, 4, 5, generator=generator)
    source = InMemory(states, dt=1.0, conditions={"nu": parameter, "land": static, "wind": forcing})
    trajectories, starts = torch.tensor([2, 0]), torch.tensor([1, 3])
    values = read_conditions(source, ("wind", "land", "nu"), trajectories, starts, 2)
    assert values.shape == (2, 2, 4, 4, 5)
    for i, (trajectory, start) in enumerate([(2, 1), (0, 3)]):
        assert torch.equal(values[i, :, :2], forcing[trajectory, start : start + 2])
        assert torch.equal(values[i, 1, 2], static)
        assert (values[i, :, 3] == parameter[trajectory]).all()
    assert read_conditions(source, ("nu",), trajectories, starts, 2).shape == (2, 1, 1, 4, 5)
    assert read_conditions(source, (), trajectories, starts, 2) is None


def test_a_condition_that_is_not_there_is_answered_with_the_nearest():
    source = InMemory(torch.zeros(1, 3, 1, 4), dt=1.0, conditions={"wind": torch.zeros(1, 3)})
    with pytest.raises(DataError, match="no condition 'winds': did you mean 'wind'"):
        read_conditions(source, ("winds",), torch.tensor([0]), torch.tensor([0]), 2)


def test_conditions_that_end_before_the_rollout_are_an_error():
    with pytest.raises(ValueError, match="given for 2 steps, but 3 are asked for"):
        rollout(lambda x: x[:, :1], euler, torch.zeros(1, 1, 1, 4), torch.zeros(1, 2, 1, 4), 0.1, 3)


def test_a_history_without_the_present_state_is_an_error():
    with pytest.raises(ValueError, match="history is 0, but must be at least 1"):
        Inputs(history=0)
