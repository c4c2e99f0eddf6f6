"""Losses over samples and channels: each group a loss of its own, by fused passes where it is large."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, Relative, recipe
from squall.losses.account import SAMPLE
from squall.losses.recipe import LARGE_GROUP

RULES = [0.5, 100.0, math.inf, 0.0, Relative(4.0), KLBudget(0.3), EffectiveFraction(0.4)]
CHANNELS = 3


def batch(over: str, points: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Groups of `points` points, with errors of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, CHANNELS, points // 4) if over == "channel" else (4, CHANNELS, points // CHANNELS)
    sizes = torch.tensor([1.0, 0.1, 3.0]).view(1, -1, 1) if over == "channel" else torch.arange(1.0, 5).view(-1, 1, 1)
    return (sizes * torch.randn(shape, generator=generator)).requires_grad_(), torch.zeros(shape)


def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "LARGE_GROUP", math.inf)


@pytest.mark.parametrize("over", ["sample", "channel"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_large_groups_are_as_by_the_formula(over, rule, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for way in ("fused", "formula"):
        if way == "formula":
            by_formula(monkeypatch)
        prediction, target = batch(over, 3 * LARGE_GROUP)
        loss = ImbalanceAwareLoss(rule, over=over)
        for _ in range(2):  # cold, then warm
            prediction.grad = None
            value = loss(prediction, target)
            value.backward()
        results.append((value, prediction.grad, loss.report()))
    (value, gradient, report), (expected, expected_gradient, expected_report) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()
    assert report.keys() == expected_report.keys()
    for name, theirs in expected_report.items():
        close = {"top_share": 0.05, "effective_fraction": 0.05}.get(name, 1e-3)  # of a sample; of the pass
        assert report[name] == pytest.approx(theirs, rel=close, abs=1e-6), name


@pytest.mark.parametrize("points", [48, 3 * LARGE_GROUP])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_loss_is_the_mean_of_the_losses_of_the_channels(points: int, rule) -> None:
    prediction, target = batch("channel", points)
    value = ImbalanceAwareLoss(rule, over="channel")(prediction, target)
    alone = [ImbalanceAwareLoss(rule)(prediction[:, c], target[:, c]) for c in range(CHANNELS)]
    torch.testing.assert_close(value, torch.stack(alone).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("points", [48, 3 * LARGE_GROUP])
@pytest.mark.parametrize("rule", [1.0, KLBudget(0.3), math.inf], ids=str)
def test_every_group_by_itself(points: int, rule) -> None:
    prediction, target = batch("sample", points)
    found = ImbalanceAwareLoss(rule, over="sample").recipe.of_each_group(prediction, target)
    alone = torch.stack([ImbalanceAwareLoss(rule)(p, t) for p, t in zip(prediction, target, strict=True)])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)


def starts_of(loss: ImbalanceAwareLoss) -> Tensor:
    return loss.state_dict()["log_inverse_temperature_of_channels"]


@pytest.mark.parametrize("points", [48, 3 * LARGE_GROUP])
def test_each_channel_starts_where_it_ended(points: int) -> None:
    prediction, target = batch("channel", points)
    loss = ImbalanceAwareLoss(over="channel")
    loss(prediction, target)
    found = starts_of(loss).clone()
    assert found.shape == (CHANNELS,)
    for c in range(CHANNELS):
        one = ImbalanceAwareLoss()
        one(prediction[:, c], target[:, c])
        assert found[c] == pytest.approx(one.log_inverse_temperature.item(), abs=1e-3)
    loss(prediction, target)
    torch.testing.assert_close(starts_of(loss), found, rtol=1e-4, atol=1e-5)


def test_warm_channels_take_one_pass_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from squall.losses import fused

    loss, swept = ImbalanceAwareLoss(over="channel"), []
    prediction, target = batch("channel", 3 * LARGE_GROUP)
    loss(prediction, target)
    budget = fused._solve_budget

    def counted(passes, *rest):
        sweep = passes.sweep
        monkeypatch.setattr(passes, "sweep", lambda *a, **k: (swept.append(1), sweep(*a, **k))[1], raising=False)
        return budget(passes, *rest)

    monkeypatch.setattr(fused, "_solve_budget", counted)
    loss(prediction * 1.001, target)
    assert len(swept) == CHANNELS


def test_the_starts_are_saved_and_loaded(tmp_path) -> None:
    prediction, target = batch("channel", 48)
    loss = ImbalanceAwareLoss(over="channel")
    loss(prediction, target)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    again = ImbalanceAwareLoss(over="channel")
    again.load_state_dict(torch.load(tmp_path / "loss.pt"))
    assert torch.equal(starts_of(again), starts_of(loss))
    again.load_state_dict(ImbalanceAwareLoss().state_dict())  # of before the first call
    assert "log_inverse_temperature_of_channels" not in again.state_dict()
    wrapped = torch.nn.ModuleDict({"loss": ImbalanceAwareLoss(over="channel")})
    wrapped.load_state_dict(torch.nn.ModuleDict({"loss": loss}).state_dict())
    assert torch.equal(wrapped.state_dict()["loss.log_inverse_temperature_of_channels"], starts_of(loss))


def test_a_loss_over_all_takes_no_starts_of_channels() -> None:
    prediction, target = batch("channel", 48)
    channels, everything = ImbalanceAwareLoss(over="channel"), ImbalanceAwareLoss()
    channels(prediction, target)
    everything.load_state_dict(channels.state_dict())
    torch.testing.assert_close(everything(prediction, target), ImbalanceAwareLoss()(prediction, target))


def test_an_average_of_models_that_hold_the_loss() -> None:
    """Their buffers have the shapes that they began with."""
    prediction, target = batch("channel", 48)
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(1, 1), "loss": ImbalanceAwareLoss(over="channel")})
    average = torch.optim.swa_utils.AveragedModel(module)
    module["loss"](prediction, target)
    average.update_parameters(module)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_channel_without_error_leaves_the_others_to_the_passes(rule, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, target = batch("channel", 3 * LARGE_GROUP)
    with torch.no_grad():
        prediction[:, 1] = 0
    loss = ImbalanceAwareLoss(rule, over="channel")
    if rule != 0.0:  # which is the formula's
        monkeypatch.setattr(recipe.Recipe, "weigh", None)
    for _ in range(2):
        prediction.grad = None
        loss(prediction, target).backward()
    assert bool(prediction.grad.isfinite().all())
    assert not prediction.grad[:, 1].any()


def test_a_copy_is_a_loss_of_its_own() -> None:
    prediction, target = batch("channel", 48)
    loss = ImbalanceAwareLoss(over="channel")
    loss(prediction, target)
    other = copy.deepcopy(loss)
    other.load_state_dict(ImbalanceAwareLoss().state_dict())
    assert starts_of(loss).shape == (CHANNELS,)
    assert torch.equal(starts_of(pickle.loads(pickle.dumps(loss))), starts_of(loss))


def test_the_report_keeps_a_sample_of_all_groups() -> None:
    prediction = torch.randn(64, 1, 2 * LARGE_GROUP, generator=torch.Generator().manual_seed(0))
    loss = ImbalanceAwareLoss(over="sample")
    loss(prediction, torch.zeros_like(prediction))
    assert sum(len(group.errors) for group in loss._account.groups) <= SAMPLE


def test_a_bad_number_in_a_large_group_is_named() -> None:
    prediction, target = batch("channel", 3 * LARGE_GROUP)
    with torch.no_grad():
        prediction[1, 2, 5] = torch.nan
    with pytest.raises(ValueError, match=r"prediction has 1 .* at index \(1, 2, 5\)"):
        ImbalanceAwareLoss(over="channel")(prediction, target)
