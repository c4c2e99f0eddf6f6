"""Rollouts of models that see past states and conditions, from many times of a trajectory, around gaps."""

import pytest
import torch

from squall.data import DataError, InMemory
from squall.evaluation import RolloutValidation, evaluate, evaluate_each
from squall.evaluation.pieces import pieces
from squall.integrators import next_state
from squall.models.inputs import Inputs
from squall.models.stacked import Stacked

DT = 0.5


def forced(trajectories: int = 3, times: int = 14, channels: int = 2) -> InMemory:
    """u_{n+1} = 0.9 u_n − 0.3 u_{n−1} + f_n + p, with a forcing in time and a parameter by trajectory."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(trajectories, channels, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    forcing = torch.randn(trajectories, times, dtype=torch.float64, generator=generator)
    parameter = torch.randn(trajectories, dtype=torch.float64, generator=generator)
    for n in range(1, times - 1):
        more = (forcing[:, n] + parameter)[:, None, None]
        states.append(0.9 * states[-1] - 0.3 * states[-2] + more)
    return InMemory(torch.stack(states, 1), dt=DT, conditions={"f": forcing, "p": parameter})


def following(x):
    past, u, forcing, parameter = x.split([2, 2, 1, 1], 1)
    return 0.9 * u - 0.3 * past + forcing + parameter


INPUTS = Inputs(2, ("f", "p"))


def test_the_true_model_of_history_and_conditions_has_no_error():
    found = evaluate(following, forced(), integrator=next_state, inputs=INPUTS)
    assert found.rollout["states"] < 1e-28
    assert found.one_step["max"] < 1e-26
    assert len(found.curves["states"]) == 12
    assert found.rollouts.truth.shape == (2, 13, 2, 6)
    assert found.growth["max"] == pytest.approx(0.9)


def test_the_order_of_conditions_is_that_of_the_inputs():
    def weighed(x):
        past, u, forcing, parameter = x.split([2, 2, 1, 1], 1)
        return 0.9 * u - 0.3 * past + forcing + parameter

    def swapped(x):
        past, u, parameter, forcing = x.split([2, 2, 1, 1], 1)
        return 0.9 * u - 0.3 * past + forcing + 2 * parameter

    right = evaluate(weighed, forced(), integrator=next_state, inputs=INPUTS)
    wrong = evaluate(swapped, forced(), integrator=next_state, inputs=INPUTS)
    assert right.rollout["states"] < 1e-28
    assert wrong.rollout["states"] > 0.01


def test_a_validation_sees_history_and_conditions():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.gain * following(x)

    validate = RolloutValidation(forced(), next_state, inputs=INPUTS)
    model = Model()
    assert validate(model).score.error < 1e-28
    stacked = Stacked([Model(), Model()])
    assert [found.score.error for found in validate.each(stacked)] == pytest.approx([0, 0], abs=1e-28)
    found = evaluate_each(stacked, forced(), integrator=next_state, inputs=INPUTS)
    assert len(found) == 2
    assert found[1].rollout["states"] < 1e-28


def test_rollouts_start_from_many_times_of_one_trajectory():
    source = forced(1, times=40)
    found = evaluate(following, source, integrator=next_state, inputs=INPUTS, steps=6)
    assert found.rollout["trajectories"] == 5  # of 2 + 6 states
    strided = evaluate(following, source, integrator=next_state, inputs=INPUTS, steps=6, stride=3)
    assert strided.rollout["trajectories"] == 11
    assert strided.rollout["states"] < 1e-28  # every piece has the forcing of its own times


def test_rollouts_leave_gaps_out():
    whole = forced(2, times=40)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, 11] = valid[1, [20, 33]] = False
    states = whole.read().masked_fill(~valid[:, :, None, None], torch.nan)
    conditions = {c.name: whole.condition(c.name, [0, 1], [0, 0], 40) for c in whole.conditions}
    source = InMemory(states, dt=DT, valid=valid, conditions=conditions)
    found = evaluate(following, source, integrator=next_state, inputs=INPUTS)
    assert found.rollout["states"] < 1e-28
    assert found.rollout["trajectories"] >= 8
    assert pieces(source, history=2, steps=5).trajectories == 4 + 3  # of five each: one and two touch a gap


def test_masked_points_are_held_in_a_rollout():
    states = torch.randn(2, 6, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])
    states[..., 2] = 3.0
    seen = []

    def model(u):
        seen.append(u[..., 2].unique().tolist())
        return torch.full_like(u, torch.inf).where(~mask, u)

    found = evaluate(model, InMemory(states, dt=1.0, mask=mask), integrator=next_state)
    assert found.rollout["diverged"] == 0
    assert all(values == [3.0] for values in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": Inputs(14)}, "1 step.* from 14 state.* the 14 states of a trajectory"),
        ({"steps": 20}, "20 step.* from 1 state"),
        ({"steps": 0}, "steps is 0"),
        ({"inputs": Inputs(1, ("g",))}, "no condition 'g': known are f, p"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        evaluate(following, forced(), integrator=next_state, **options)
