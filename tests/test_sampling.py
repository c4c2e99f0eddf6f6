import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from squall.sampling import UniformSampler


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
