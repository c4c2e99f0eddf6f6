"""Each bad input is one clear error."""

import math

import pytest
import torch

from squall.losses import (
    EffectiveFraction,
    Huber,
    ImbalanceAwareLoss,
    KLBudget,
    MeanSquaredError,
    Relative,
    Schedule,
    imbalance_aware_loss,
    imbalance_weights,
)
from squall.losses.sketch import SMALL

pytestmark = pytest.mark.usefixtures("passes")

ones = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prediction": torch.ones(2, 3)}, ValueError, r"prediction has shape \(2, 3\) and target \(2, 3, 4\)"),
        ({"prediction": ones.int()}, TypeError, "prediction must be floating point, got torch.int32"),
        ({"target": ones.bool()}, TypeError, "target must be floating point"),
        ({"prediction": ones[:0], "target": ones[:0]}, ValueError, r"empty \(shape \(0, 3, 4\)\)"),
        ({"mask": torch.zeros(2, 3, 4, dtype=torch.bool)}, ValueError, "no point is left"),
        ({"measure": torch.zeros(4)}, ValueError, "no point is left"),
        ({"mask": ones}, TypeError, "mask must be boolean"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask has shape \(5,\)"),
        ({"mask": torch.ones(9, 2, 3, 4, dtype=torch.bool)}, ValueError, "does not broadcast to"),
        ({"measure": torch.tensor([1.0, -2.0, 1.0, 1.0])}, ValueError, r"has 1 other values of 4.* index \(1,\): -2"),
        ({"measure": torch.tensor([1.0, math.nan, 1.0, 1.0])}, ValueError, "measure must be finite"),
        ({"over": "space"}, ValueError, "over must be one of 'all', 'sample', 'channel'"),
        ({"prediction": ones[0, 0], "target": ones[0, 0], "over": "channel"}, ValueError, "needs tensors of shape"),
        ({"prediction": ones[0], "target": ones[0], "over": "lead"}, ValueError, r"\(batch, channel, lead, \*space\)"),
        ({"error": "cubed"}, ValueError, "error must be a callable or one of squared, absolute, huber"),
        ({"error": lambda p, t: (p - t).mean()}, ValueError, "error must keep the shape"),
        ({"temperature": -1.0}, ValueError, "temperature must be a number from 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a number from 0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number or one of"),
        ({"cap": 0.5}, ValueError, "cap .* at least 1"),
        ({"trim": 1.0}, ValueError, "trim=1 drops every point"),
        ({"mean_share": -0.1}, ValueError, "mean_share is a fraction"),
        ({"reduction": "total"}, ValueError, "reduction must be"),
        ({"group": "wrld"}, ValueError, "group must be 'world', a process group or None, got 'wrld'"),
        ({"error": lambda p, t: p - t - 1}, ValueError, r"must not be negative, but has \d+ negative values of"),
    ],
)
def test_bad_arguments(kwargs, error, message, unchecked):
    call = {"prediction": ones, "target": ones, **kwargs}
    with pytest.raises(error, match=message):
        imbalance_aware_loss(**call)


@pytest.fixture
def unchecked():
    """The tests' own run-time type checks off, so that what the user sees is seen."""
    from jaxtyping import config

    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("rule", [1.0, 0.0, math.inf, KLBudget(), Relative()], ids=str)
@pytest.mark.parametrize("n", [100, SMALL + 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_and_placed(rule, n, bad):
    prediction, target = torch.randn(2, n), torch.randn(2, n)
    prediction[1, 7] = prediction[1, 9] = bad
    with pytest.raises(
        ValueError, match=rf"prediction has 2 non-finite values of {2 * n}, the first at index \(1, 7\)"
    ):
        ImbalanceAwareLoss(rule)(prediction, target)
    with pytest.raises(ValueError, match="target has 2 non-finite"):
        ImbalanceAwareLoss(rule)(target, prediction)
    mask = prediction.isfinite()
    prediction.requires_grad_()
    ImbalanceAwareLoss(rule)(prediction, target, mask=mask).backward()
    assert bool((prediction.grad[~mask] == 0).all())
    assert bool(prediction.grad.isfinite().all())


def test_overflowing_square_is_named():
    with pytest.raises(ValueError, match="error of finite values overflows"):
        MeanSquaredError()(torch.full((3,), 1e30), torch.zeros(3))


def test_half_precision_does_not_overflow():
    prediction = torch.full((10,), 1000.0, dtype=torch.float16, requires_grad=True)
    value = ImbalanceAwareLoss()(prediction, torch.zeros(10, dtype=torch.float16))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1e6)
    value.backward()
    assert prediction.grad.dtype == torch.float16


def test_broken_batch_leaves_the_state_alone():
    loss = ImbalanceAwareLoss(Schedule(KLBudget(), 3))
    loss(torch.randn(50), torch.zeros(50))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(ValueError, match="non-finite"):
        loss(torch.full((50,), math.nan), torch.zeros(50))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: KLBudget(0.0),
        lambda: KLBudget(math.inf),
        lambda: EffectiveFraction(1.0),
        lambda: Relative(-1.0),
        lambda: Huber(0.0),
        lambda: Schedule(1.0, steps=-1),
    ],
)
def test_rules_refuse_what_makes_no_sense(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_weights_of_bad_errors():
    with pytest.raises(ValueError, match="non-finite"):
        imbalance_weights(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="empty"):
        imbalance_weights(torch.empty(0))
