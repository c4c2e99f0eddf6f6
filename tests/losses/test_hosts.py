"""What the trainers of others do with a loss: save, load another checkpoint, validate, accumulate, call it by name."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import squall
from squall.losses import (
    Accumulation,
    ImbalanceAwareLoss,
    KLBudget,
    LaggedAccumulation,
    MeanSquaredError,
    Schedule,
    imbalance_aware_loss,
)
from squall.losses.weights import compiled_kernels

OURS = str(Path(squall.__file__).parent)


def module(loss: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"model": nn.Linear(3, 3), "loss": loss})


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    p, t = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(seed)).unbind()
    return p, t


@pytest.mark.parametrize("ours", [ImbalanceAwareLoss, lambda: ImbalanceAwareLoss(KLBudget(1.0, cap=5.0))])
def test_a_checkpoint_of_a_plain_loss_loads_and_back(ours):
    plain, weighed = module(nn.MSELoss()), module(ours())
    weighed["loss"](*batch())
    weighed.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(weighed.state_dict(), strict=True)


def test_a_schedule_is_saved_and_a_checkpoint_without_one_starts_it_anew():
    scheduled = module(ImbalanceAwareLoss(Schedule(KLBudget(0.3), 10)))
    for seed in range(3):
        scheduled["loss"](*batch(seed))
    again = module(ImbalanceAwareLoss(Schedule(KLBudget(0.3), 10)))
    again.load_state_dict(scheduled.state_dict(), strict=True)
    assert int(again["loss"].step) == 3
    again.load_state_dict(module(nn.MSELoss()).state_dict(), strict=True)


def test_a_checkpoint_of_an_earlier_version_loads():
    old = {"step": torch.tensor(4), "log_inverse_temperature": torch.tensor(-1.0, dtype=torch.float64)}
    old["log_inverse_temperature_of_channels"] = torch.zeros(3)
    loss = ImbalanceAwareLoss(Schedule(1.0, 5), over="channel")
    loss.load_state_dict(old, strict=True)
    assert int(loss.step) == 4


def test_a_lagged_loss_remembers_its_temperature():
    loss, weight = ImbalanceAwareLoss(), nn.Parameter(torch.ones(()))
    lagged = LaggedAccumulation(loss)
    p, t = batch()
    lagged.loss(weight * p, t).backward()
    lagged.finish([weight])
    again = ImbalanceAwareLoss()
    again.load_state_dict(loss.state_dict())
    assert again.log_inverse_temperature == loss.log_inverse_temperature


@pytest.mark.parametrize("rule", [KLBudget(0.3), Schedule(KLBudget(0.3), 10)], ids=str)
def test_a_validation_pass_changes_nothing_where_nobody_calls_eval(rule):
    loss = ImbalanceAwareLoss(rule)
    loss(*batch())
    before = loss.step.clone(), loss.log_inverse_temperature.clone()
    with torch.no_grad():
        loss(*(1000 * x for x in batch(1)))
    with torch.inference_mode():
        loss(*batch(2))
    assert (loss.step, loss.log_inverse_temperature) == before
    loss(*batch(3))
    assert loss.log_inverse_temperature != before[1]


def test_names_and_order_of_the_arguments():
    p, t = batch()
    loss = ImbalanceAwareLoss()
    value = loss(p, t)
    assert loss(input=p, target=t) == loss(prediction=p, target=t) == loss(t, p) == value
    with pytest.raises(TypeError, match="two names of one argument"):
        loss(p, t, prediction=p)
    with pytest.raises(TypeError, match="target is missing"):
        loss(p)
    target = t.clone().requires_grad_()
    prediction = p.clone().requires_grad_()
    loss(prediction, target).backward()
    torch.testing.assert_close(target.grad, -prediction.grad)


@pytest.mark.parametrize("over", ["all", "sample", "channel"])
def test_reductions(over):
    p, t = batch()
    assert ImbalanceAwareLoss().reduction == "mean"
    total = ImbalanceAwareLoss(over=over, reduction="sum")
    assert total.reduction == "sum"
    mean = ImbalanceAwareLoss(over=over)(p, t)
    torch.testing.assert_close(total(p, t), mean * p.numel())
    mask = torch.arange(3) > 0
    torch.testing.assert_close(
        imbalance_aware_loss(p, t, math.inf, mask=mask, reduction="sum"),
        nn.functional.mse_loss(p[:, 1:], t[:, 1:], reduction="sum"),
    )
    prediction = p.clone().requires_grad_()
    total(prediction, t).backward()
    single = p.clone().requires_grad_()
    ImbalanceAwareLoss(over=over)(single, t).backward()
    torch.testing.assert_close(prediction.grad, p.numel() * single.grad)


def test_the_limit_is_the_mean_squared_error_with_its_gradient():
    p, t = (x.requires_grad_() for x in batch())
    for loss in (ImbalanceAwareLoss(math.inf), MeanSquaredError()):
        p.grad = None
        value = loss(p, t.detach())
        value.backward()
        q = p.detach().requires_grad_()
        expected = nn.functional.mse_loss(q, t.detach())
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=2e-7, atol=0)
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-7, atol=0)


def test_complex_numbers_are_refused_with_advice_that_keeps_them():
    p, t = (torch.view_as_complex(torch.randn(5, 2)) for _ in range(2))
    with pytest.raises(TypeError, match=r"torch\.view_as_real of both"):
        imbalance_aware_loss(p, t, math.inf)
    real = imbalance_aware_loss(torch.view_as_real(p), torch.view_as_real(t), math.inf)
    torch.testing.assert_close(2 * real, (p - t).abs().square().mean())


def test_a_gradient_may_be_asked_for_twice_and_the_graph_be_kept():
    p, t = batch()
    p.requires_grad_()
    value = ImbalanceAwareLoss()(p, t)
    (first,) = torch.autograd.grad(value, p, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, p)
    torch.testing.assert_close(second, 3 * first)


def test_nothing_of_a_batch_is_kept_by_the_report():
    """The report holds a sketch, not the fields: their memory is free after the step."""
    import weakref

    loss, p = ImbalanceAwareLoss(), torch.randn(5000)
    gone = weakref.ref(p)
    loss(p, torch.zeros(5000))
    del p
    assert gone() is None
    assert loss.report()["kl"] == pytest.approx(0.3, rel=1e-3)


def test_an_accumulated_step_counts_once():
    loss = ImbalanceAwareLoss(Schedule(KLBudget(0.3), 10))
    whole = Accumulation(loss)
    for seed in range(3):
        whole.observe(*batch(seed))
    for seed in range(3):
        whole.loss(*batch(seed))
    assert int(loss.step) == 1
    assert loss.report()["max_error"] > 0


@pytest.mark.skipif(compiled_kernels() is None, reason="numba is not installed")
def test_a_warm_plain_call_makes_few_python_calls():
    """Forward and backward, 10 000 points: at that size Python is most of what the loss costs."""
    loss, calls = ImbalanceAwareLoss(), []
    prediction, target = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    loss(prediction, target).backward()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        loss(prediction, target).backward()
    finally:
        sys.setprofile(None)
    assert 0 < len(calls) <= 30, calls
