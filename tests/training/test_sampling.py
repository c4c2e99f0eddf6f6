import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from squall.training.sampling import StiffnessAwareSampler, UniformSampler, stiffness_index


@given(st.integers(1, 300), st.data(), st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_minibatch_has_different_transitions_and_depends_on_seed_and_step_alone(population, data, seed, step):
    batch = data.draw(st.integers(1, population))
    sampler = UniformSampler(population, batch, seed)
    drawn = sampler(step)
    assert len(set(drawn.tolist())) == batch
    assert drawn.min() >= 0
    assert drawn.max() < population
    assert torch.equal(drawn, UniformSampler(population, batch, seed)(step))


def test_every_transition_is_drawn_equally_often():
    sampler = UniformSampler(population=50, batch=10, seed=3)
    counts = np.bincount(torch.cat([sampler(step) for step in range(2000)]), minlength=50)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_steps_and_seeds_draw_different_minibatches():
    drawn = {tuple(UniformSampler(1000, 5, seed)(step).tolist()) for seed in range(10) for step in range(10)}
    assert len(drawn) == 100


@pytest.mark.parametrize("batch", [0, -1, 11])
def test_a_batch_that_cannot_be_drawn_is_refused(batch):
    with pytest.raises(ValueError, match=f"batch is {batch}.*10 transitions.*1 to 10"):
        UniformSampler(10, batch)


def test_the_stiffness_index_is_a_relative_speed():
    u, u_next = torch.randn(20, 2, 7, dtype=torch.float64), torch.randn(20, 2, 7, dtype=torch.float64)
    expected = ((u_next - u).square().sum((1, 2)).sqrt() / 0.1) / u.square().sum((1, 2)).sqrt()
    torch.testing.assert_close(stiffness_index(u, u_next, 0.1), expected)
    torch.testing.assert_close(stiffness_index(3 * u, 3 * u_next, 0.1), expected)  # no unit of the state


def test_a_floor_keeps_the_calm_start_from_being_the_stiffest():
    u = torch.stack([torch.full((1, 10), 1e-6), torch.full((1, 10), 1.0)])
    u_next = u + torch.tensor([1e-6, 0.5]).reshape(2, 1, 1)
    free, floored = stiffness_index(u, u_next, 1.0), stiffness_index(u, u_next, 1.0, floor=1.0)
    assert free[0] > free[1]
    assert floored[0] < floored[1]


@given(st.integers(20, 200), st.floats(0.1, 0.9), st.floats(0, 1), st.integers(0, 10**6))
def test_the_share_of_a_minibatch_that_is_stiff_is_the_one_asked_for(population, fraction, share, step):
    index = torch.rand(population, generator=torch.Generator().manual_seed(population))
    sampler = StiffnessAwareSampler(index, batch=2, fraction=fraction, share=share, seed=1)
    drawn = sampler(step)
    assert len(set(drawn.tolist())) == 2
    assert int(sampler.is_stiff[drawn].sum()) == round(2 * share)
    assert index[sampler.stiff].min() >= index[sampler.other].max()
    assert torch.equal(drawn, sampler(step))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"fraction": 0.01, "share": 1.0}, "5 stiff transitions, but there are 1"),
        ({"index": torch.tensor([1.0] * 9 + [float("inf")])}, "1 stiffness indices are not finite.*floor"),
    ],
)
def test_a_stiffness_aware_sampler_that_cannot_draw_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StiffnessAwareSampler(**{"index": torch.arange(100.0), "batch": 5} | options)
