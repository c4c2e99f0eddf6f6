"""Losses by the names of the configuration: what each is made of, and what is refused."""

import sys

import pytest
import torch

from squall.data import InMemory, Transitions
from squall.losses import ImbalanceAwareLoss, KLBudget, absolute_error
from squall.losses.rivals import RIVALS, DensityWeights, TopK
from squall.runs.config import ConfigError, LossConfig, from_dict
from squall.runs.loss import build_loss
from squall.training import TrainingSettings
from squall.training.batches import takes


def transitions(channels: int = 2) -> Transitions:
    generator = torch.Generator().manual_seed(0)
    return Transitions(InMemory(torch.randn(3, 5, channels, 16, generator=generator), dt=0.5))


def loss_of(values: dict, data: Transitions | None = None):
    return build_loss(from_dict({"loss": values}).loss, data or transitions(), TrainingSettings(), (1.0, 2.0))


def test_the_guards_of_a_configuration_reach_the_loss():
    guards = {"cap": 9.0, "trim": 0.01, "winsorize": 0.02, "mean_share": 0.1, "over": "channel", "error": "huber"}
    loss = loss_of({**guards, "kl_budget": 1.0, "budget_cap": 5.0})
    assert loss.recipe == ImbalanceAwareLoss(KLBudget(1.0, cap=5.0), **guards).recipe
    capped = loss_of({"budget_cap": 5.0})
    assert capped.recipe == ImbalanceAwareLoss(KLBudget(0.3, cap=5.0)).recipe
    with pytest.raises(ConfigError, match="cap is in units of the uniform weight"):
        loss_of({"cap": 0.5})
    assert loss_of({"name": "mse", "error": "absolute"}).recipe.error is absolute_error


@pytest.mark.parametrize("name", sorted(set(RIVALS) - {"rba", "vrba", "spherical_amse", "term"}))
def test_every_rival_is_made_by_its_name_and_takes_a_minibatch(name):
    pairs = transitions()
    loss = loss_of({"name": name})
    u, after = pairs.fetch([0, 5, 9] if name != "afcrps" else [5, 5])  # a sample for each of its members
    assert isinstance(loss, RIVALS[name])
    assert torch.isfinite(loss(u, after))


@pytest.mark.parametrize("name", ["rba", "vrba"])
def test_a_loss_with_a_memory_is_made_for_the_samples_of_the_training(name):
    loss = loss_of({"name": name})
    assert loss.memory.shape == (12, 2, 16)
    assert not loss.memory.any(), "the call that tries it leaves no trace"


def test_a_loss_that_does_not_fit_masked_data_is_refused_before_the_training():
    masked = InMemory(torch.ones(3, 5, 2, 16).cumsum(1), dt=0.5, mask=torch.arange(32).reshape(2, 16) > 3)
    with pytest.raises(ConfigError, match=r"'amse' cannot be made: .*a spectrum needs all points"):
        loss_of({"name": "amse"}, Transitions(masked))
    assert loss_of({"name": "top_k"}, Transitions(masked))


def test_options_reach_a_rival():
    loss = loss_of({"name": "top_k", "options": {"alpha": 0.3}})
    assert isinstance(loss, TopK)
    assert loss.alpha == 0.3


def test_a_density_is_that_of_the_targets_which_the_loss_sees():
    u, after = transitions().fetch(range(12))
    targets = (after - u) / 0.5 / torch.tensor([1.0, 2.0])[:, None]
    made, expected = loss_of({"name": "density"}), DensityWeights(targets)
    torch.testing.assert_close(made.ends, expected.ends)
    torch.testing.assert_close(made.table, expected.table)


def test_a_loss_of_ones_own_is_imported_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses_beside_the_data.py").write_text(
        "def cubed(prediction, target, *, scale=1.0, mask=None):\n"
        "    return scale * (prediction - target).abs().pow(3).mean()\n"
    )
    loss = loss_of({"name": "losses_beside_the_data.cubed", "options": {"scale": 2.0}})
    sys.modules.pop("losses_beside_the_data", None)
    assert isinstance(loss, torch.nn.Module)
    assert loss(torch.full((2,), 3.0), torch.zeros(2)) == 54.0
    assert takes(loss, "mask")
    assert not takes(loss, "measure")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "topk"}, "loss.name is 'topk': did you mean 'top_k'.*imbalance-aware, mse, afcrps"),
        ({"name": "top_k", "options": {"alhpa": 0.3}}, "loss.options has 'alhpa'.*'top_k'.*known are alpha"),
        ({"name": "mse", "options": {"alpha": 0.3}}, "loss.options are for a rival"),
        ({"name": "top_k", "kl_budget": 0.3}, "loss.kl_budget is set, but loss.name is 'top_k'"),
        ({"name": "top_k", "error": "huber"}, "loss.error is set, but loss.name is 'top_k'"),
        ({"name": "top_k", "cap": 3.0}, "loss.cap is set, but loss.name is 'top_k'"),
    ],
)
def test_what_does_not_fit_the_loss_is_refused_with_what_is_known(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"loss": values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "top_k", "options": {"alpha": 3.0}}, "'top_k' cannot be made.*alpha is the share"),
        ({"name": "term"}, "'term' cannot be made.*temperature"),
        ({"name": "no_such_package.Loss"}, "no_such_package"),
        ({"name": "torch.nn.NoLoss"}, "no class or function 'NoLoss'"),
        ({"name": "vrba", "options": {"phi": 5.0}}, "phi must be in"),
    ],
)
def test_a_loss_that_cannot_be_made_says_why(values, message):
    with pytest.raises(ConfigError, match=message):
        loss_of(values)


def test_no_setting_of_a_loss_is_lost_in_a_configuration():
    config = from_dict({"loss": {"name": "focal", "options": {"beta": 2.0}}})
    assert config.loss == LossConfig(name="focal", options={"beta": 2.0})
