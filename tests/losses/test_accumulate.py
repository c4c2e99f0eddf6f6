"""Micro-batches against the large batch."""

import pytest
import torch

from squall.losses import Accumulation, EffectiveFraction, ImbalanceAwareLoss, KLBudget, LaggedAccumulation, Relative


def model_and_data(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(6, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, y = torch.randn(2, 12, 3, 6, generator=generator, dtype=torch.float64)
    return model, x, y


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("over", ["all", "sample", "channel", "lead"])
@pytest.mark.parametrize("kwargs", [{"temperature": 3.0}, {}, {"temperature": Relative(), "cap": 3.0}, {"trim": 0.05}])
def test_two_calls_give_the_large_batch(over, kwargs):
    model, x, y = model_and_data()
    expected = ImbalanceAwareLoss(over=over, **kwargs)(model(x), y)
    expected.backward()
    expected_gradient = gradient(model)
    model.zero_grad()
    whole = Accumulation(ImbalanceAwareLoss(over=over, **kwargs))
    parts = list(zip(x.split([5, 4, 3]), y.split([5, 4, 3]), strict=True))
    for a, b in parts:
        whole.observe(model(a), b)
    value = 0.0
    for a, b in parts:
        part = whole.loss(model(a), b)
        part.backward()
        value += part.item()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient(model), expected_gradient, rtol=1e-5, atol=1e-9)


def test_masks_travel_with_their_micro_batch():
    model, x, y = model_and_data()
    mask = torch.rand(12, 1, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    expected = ImbalanceAwareLoss(3.0)(model(x), y, mask=mask).item()
    whole = Accumulation(ImbalanceAwareLoss(3.0))
    for part in (slice(0, 5), slice(5, 12)):
        whole.observe(model(x[part]), y[part], mask=mask[part])
    values = [whole.loss(model(x[s]), y[s], mask=mask[s]).item() for s in (slice(0, 5), slice(5, 12))]
    assert sum(values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rule", [3.0, KLBudget(0.3), EffectiveFraction(0.5)], ids=str)
def test_one_call_gives_the_large_batch_at_the_lagged_temperature(rule):
    model, x, y = model_and_data()
    loss = ImbalanceAwareLoss(rule)
    loss(model(x) * 1.05, y)  # the step before
    beta = loss.log_inverse_temperature.exp().item()
    expected = ImbalanceAwareLoss(1 / beta)(model(x), y)
    expected.backward()
    expected_gradient = gradient(model)
    model.zero_grad()
    lagged = LaggedAccumulation(loss)
    for a, b in zip(x.split(4), y.split(4), strict=True):
        lagged.loss(model(a), b).backward()
    assert lagged.finish(model.parameters()) == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient(model), expected_gradient, rtol=1e-9, atol=1e-12)


def test_lagged_temperature_converges_to_the_budget():
    model, x, y = model_and_data()
    loss = ImbalanceAwareLoss(KLBudget(0.3))
    for _ in range(6):
        lagged = LaggedAccumulation(loss)
        for a, b in zip(x.split(4), y.split(4), strict=True):
            lagged.loss(model(a), b).backward()
        lagged.finish(model.parameters())
    fresh = ImbalanceAwareLoss(KLBudget(0.3))
    fresh(model(x), y)
    torch.testing.assert_close(loss.log_inverse_temperature, fresh.log_inverse_temperature, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [0.0, 2.0])
def test_equal_errors_and_the_lagged_temperature(size):
    weight = torch.nn.Parameter(torch.ones(()))
    lagged = LaggedAccumulation(ImbalanceAwareLoss())
    for _ in range(2):
        lagged.loss(weight * torch.full((8,), size), torch.zeros(8)).backward()
    assert lagged.finish([weight]) == pytest.approx(size**2)
    assert weight.grad.item() == pytest.approx(2 * size**2)


def test_a_first_micro_batch_that_cannot_meet_the_budget():
    lagged = LaggedAccumulation(ImbalanceAwareLoss(KLBudget(3.0)))
    with pytest.raises(ValueError, match="no temperature to"):
        lagged.loss(torch.arange(4.0), torch.zeros(4))


def test_misuse_is_refused():
    loss, p = ImbalanceAwareLoss(), torch.randn(3)
    with pytest.raises(RuntimeError, match="observe every micro-batch"):
        Accumulation(loss).loss(p, p)
    whole = Accumulation(loss)
    whole.observe(p, torch.zeros(3))
    with pytest.raises(ValueError, match="in the order"):
        whole.loss(torch.randn(4), torch.zeros(4))
    with pytest.raises(RuntimeError, match="more losses"):
        whole.loss(p, p)
    with pytest.raises(RuntimeError, match="new Accumulation"):
        whole.observe(p, p)
    with pytest.raises(ValueError, match="LaggedAccumulation takes"):
        LaggedAccumulation(ImbalanceAwareLoss(cap=2.0))
    with pytest.raises(RuntimeError, match="finish before"):
        LaggedAccumulation(loss).finish([])
