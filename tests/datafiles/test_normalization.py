"""Mean zero and deviation one, exactly, whatever the size of the numbers and of the pieces."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import squall.data
from squall.data import DataError, InMemory, Normalization

from .conftest import trajectories


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_fit_agrees_with_numpy(dtype, shift, monkeypatch):
    states = trajectories(6, 40, 3, 11, 4, dtype=dtype)
    states[:, :, 1] *= 100
    states[:, :, 2] += dtype(shift)
    whole = Normalization.fit(InMemory(states, dt=1.0))
    exact = states.astype(np.longdouble)
    assert np.allclose(whole.mean, exact.mean((0, 1, 3, 4)).astype(float), rtol=1e-13, atol=1e-15)
    assert np.allclose(whole.std, exact.std((0, 1, 3, 4)).astype(float), rtol=1e-11)
    source = InMemory(states, dt=1.0)
    cut = source.chunks
    monkeypatch.setattr(source, "chunks", lambda _: cut(1000))
    pieces = Normalization.fit(source)
    assert np.allclose(pieces.mean, whole.mean, rtol=1e-13, atol=1e-15)
    assert np.allclose(pieces.std, whole.std, rtol=1e-11)


def test_applied_to_what_it_was_fitted_to(path):
    source = squall.data.open(path)
    normal = Normalization.fit(source).apply(source.read(), axis=2)
    assert torch.allclose(normal.mean((0, 1, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(normal.std((0, 1, 3), correction=0), torch.ones(2, dtype=torch.float64), atol=1e-14)


def test_test_trajectories_have_no_say():
    states = trajectories(10, 5, 1, 8)
    parts = squall.data.split(InMemory(states, dt=1.0), validation=1, test=2)
    spoilt = states.copy()
    spoilt[7:] = 1e6
    again = squall.data.split(InMemory(spoilt, dt=1.0), validation=1, test=2)
    assert Normalization.fit(parts.train) == Normalization.fit(again.train)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e20])
def test_constant_channel_becomes_zero(dtype, value):
    states = trajectories(3, 70, 2, 9, dtype=dtype)
    states[:, :, 1] = value
    fit = Normalization.fit(InMemory(states, dt=1.0))
    assert fit.std[1] == 1.0
    normal = fit.apply(torch.from_numpy(states), axis=2)[:, :, 1]
    assert normal.abs().max() <= 4 * np.finfo(dtype).eps * abs(value)


def test_small_deviation_of_a_large_mean_is_kept():
    """Sums of squares would lose it: 1e8 ± 1e-2 has a relative variance of 1e-20."""
    states = 1e8 + 1e-2 * np.sign(trajectories(4, 50, 1, 32))
    fit = Normalization.fit(InMemory(states, dt=1.0))
    assert fit.std[0] == pytest.approx(states.std(), rel=1e-6)
    assert fit.std[0] == pytest.approx(1e-2, rel=1e-2)


@given(
    mean=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2),
    std=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=2),
)
def test_invert_undoes_apply(mean, std):
    normalization = Normalization(tuple(mean), tuple(std))
    u = torch.linspace(-5, 5, 24, dtype=torch.float64).reshape(3, 2, 4)
    assert torch.allclose(normalization.invert(normalization.apply(u)), u, atol=1e-9)
    difference = normalization.scale(normalization.apply(u[:1]) - normalization.apply(u[1:2]))
    assert torch.allclose(difference, u[:1] - u[1:2], atol=1e-9)
    assert Normalization.from_dict(json.loads(json.dumps(normalization.to_dict()))) == normalization


def test_type_and_gradient_are_those_of_the_states():
    normalization = Normalization((1.0,), (4.0,))
    with torch.inference_mode():
        normalization.apply(torch.ones(2, 1, 3))  # must not spoil what training uses afterwards
    u = torch.ones(2, 1, 3, requires_grad=True)
    v = normalization.apply(u)
    assert v.dtype == torch.float32
    (v * v).sum().backward()
    assert torch.equal(u.grad, torch.zeros(2, 1, 3))
    assert torch.equal(Normalization.identity(1).apply(u), u)


def test_what_is_no_normalization():
    for mean, std in [((0.0,), (0.0,)), ((0.0,), (-1.0,)), ((0.0, 1.0), (1.0,)), ((float("nan"),), (1.0,)), ((), ())]:
        with pytest.raises(DataError, match="normalization"):
            Normalization(mean, std)
    with pytest.raises(DataError, match="keys"):
        Normalization.from_dict({"mean": [0.0]})
    with pytest.raises(DataError, match=r"got shape \(2, 3, 4\); expected 1 channels on axis 1"):
        Normalization.identity(1).apply(torch.zeros(2, 3, 4))
    with pytest.raises(DataError, match="no trajectory"):
        Normalization.fit(squall.data.subset(InMemory(torch.zeros(2, 2, 1, 1), dt=1.0), []))
