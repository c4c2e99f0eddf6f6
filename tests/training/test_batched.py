"""Members of an ensemble end where they would have ended alone."""

import dataclasses
import math
import time
from dataclasses import dataclass

import pytest
import torch
from problems import LOSSES, Stops, model, separating

import squall.training.batched
from squall._types import Score, Validation
from squall.data import InMemory, Transitions
from squall.evaluation.rollouts import RolloutValidation
from squall.integrators import euler, midpoint
from squall.losses import ImbalanceAwareLoss, KLBudget, MeanSquaredError, Schedule
from squall.models import NODE
from squall.training.batched import Member, train_together
from squall.training.loop import Recorder, TrainingDiverged, TrainingSettings, train
from squall.training.sampling import UniformSampler

SETTINGS = TrainingSettings(steps=12, batch=16, log_every=4, validate_every=4, checkpoint_every=4)


@pytest.fixture(scope="module")
def source() -> InMemory:
    return separating(2, 80)


def member(seed: int, loss, source, recorder: Recorder | None = None, **options) -> Member:
    sampler = UniformSampler(len(Transitions(source)), SETTINGS.batch, seed)
    validate = RolloutValidation(source, options.pop("step", euler), states=1)
    return Member(model(seed, **options), loss, sampler, validate, recorder or Recorder())


@pytest.mark.parametrize(("kind", "step", "at_once"), [("hnn", euler, 1), ("hnn", euler, 100), ("node", midpoint, 1)])
def test_an_ensemble_equals_its_members_alone(source, kind, step, at_once, monkeypatch):
    """With one step between two looks at the losses, as on a CPU, and with more, as on a CUDA device."""
    monkeypatch.setitem(squall.training.batched.STEPS_AT_ONCE, "cpu", at_once)
    combinations = [(0, name) for name in LOSSES] + [(1, "temperature")]
    members = [member(seed, LOSSES[name](), source, kind=kind, step=step) for seed, name in combinations]
    together = train_together(members, Transitions(source), SETTINGS, integrator=step)
    for (seed, name), result, one in zip(combinations, together, members, strict=True):
        alone = train(
            model(seed, kind), Transitions(source), SETTINGS, loss=LOSSES[name](), integrator=step,
            sampler=one.sampler, validate=one.validate,
        )  # fmt: skip
        for ours, theirs in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # the solver's tolerance
        assert [line["step"] for line in result.history] == [line["step"] for line in alone.history]
        assert result.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-6)
        for ours, theirs in zip(result.history, alone.history, strict=True):
            assert ours.keys() == theirs.keys()
            logged = [name for name, x in theirs.items() if isinstance(x, float) and name != "seconds"]
            assert {"loss", "effective_fraction", "gradient_noise"} <= {*logged} or "validation" in theirs
            assert [ours[x] for x in logged] == pytest.approx([theirs[x] for x in logged], rel=1e-3, abs=1e-6)
        assert result.best.step == alone.best.step


def test_wrong_targets_are_those_of_its_members_alone(source):
    settings = dataclasses.replace(SETTINGS, steps=5, corrupt_share=0.1, corrupt_by=3.0, validate_every=0)
    members = [member(seed, MeanSquaredError(), source) for seed in range(2)]
    together = train_together(members, Transitions(source), settings)
    for seed, (result, one) in enumerate(zip(together, members, strict=True)):
        alone = train(
            model(seed), Transitions(source), settings, loss=MeanSquaredError(), integrator=euler, sampler=one.sampler
        )
        assert result.history[-1]["loss"] == pytest.approx(alone.history[-1]["loss"], rel=1e-6)
        for ours, theirs in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_schedule_goes_on_where_it_stood(source):
    """Half of the steps together, the rest alone, as all of them alone."""
    rule = Schedule(KLBudget(0.5), steps=8)
    stopped = Stops(8)
    train_together([member(0, ImbalanceAwareLoss(rule), source, stopped)], Transitions(source), SETTINGS)
    kept = Stops(saved=stopped.resume())
    one = member(0, ImbalanceAwareLoss(rule), source, kept)
    resumed = train(
        one.model, Transitions(source), SETTINGS, loss=one.loss, sampler=one.sampler, recorder=kept,
        validate=one.validate,
    )  # fmt: skip
    alone = train(
        model(0), Transitions(source), SETTINGS, loss=ImbalanceAwareLoss(rule), sampler=one.sampler,
        validate=one.validate,
    )  # fmt: skip
    for ours, theirs in zip(resumed.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_stopped_ensemble_goes_on_to_the_same_bits_and_its_members_can_go_on_alone(source):
    unbroken = train_together([member(s, MeanSquaredError(), source) for s in (0, 1)], Transitions(source), SETTINGS)
    stopped = [Stops(6), Stops(6)]
    train_together([member(s, MeanSquaredError(), source, stopped[s]) for s in (0, 1)], Transitions(source), SETTINGS)
    assert [recorder.resume().step for recorder in stopped] == [6, 6]
    resumed = train_together(
        [member(s, MeanSquaredError(), source, Stops(saved=stopped[s].resume())) for s in (0, 1)],
        Transitions(source),
        SETTINGS,
    )
    one = member(1, MeanSquaredError(), source)
    alone = train(
        one.model, Transitions(source), SETTINGS, loss=one.loss, sampler=one.sampler,
        recorder=Stops(saved=stopped[1].resume()),
    )  # fmt: skip
    for ours, theirs in zip(resumed, unbroken, strict=True):
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(alone.model.parameters(), unbroken[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight", [math.nan, 1e200])  # of the second one the prediction is finite, its square is not
def test_a_member_that_diverges_leaves_the_others_alone(source, weight, monkeypatch):
    monkeypatch.setitem(squall.training.batched.STEPS_AT_ONCE, "cpu", 100)
    members = [member(s, ImbalanceAwareLoss(50.0), source) for s in (0, 1)]
    with torch.no_grad():
        list(members[0].model.parameters())[-1].fill_(weight)
    found = train_together(members, Transitions(source), SETTINGS)
    assert isinstance(found[0], TrainingDiverged)
    assert found[0].step == 1
    alone = train_together([member(1, ImbalanceAwareLoss(50.0), source)], Transitions(source), SETTINGS)
    for a, b in zip(found[1].model.parameters(), alone[0].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def two_channels() -> Transitions:
    u = torch.randn(3, 9, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(1)
    return Transitions(InMemory(u, dt=0.1))


def of_two_channels(seed: int, loss, sampler, **options) -> Member:
    made = NODE(2, 5, generator=torch.Generator().manual_seed(seed)).double()
    return Member(made, loss, sampler, **options)


def test_the_residual_of_the_state_and_the_scale_of_each_channel(two_channels):
    settings = TrainingSettings(steps=6, batch=5, residual="state", validate_every=0)
    samplers = [UniformSampler(len(two_channels), 5, seed) for seed in (0, 1)]
    members = [of_two_channels(seed, ImbalanceAwareLoss(0.1), samplers[seed]) for seed in (0, 1)]
    together = train_together(members, two_channels, settings, scale=(1.0, 20.0))
    for seed, result in enumerate(together):
        one = of_two_channels(seed, ImbalanceAwareLoss(0.1), samplers[seed])
        alone = train(one.model, two_channels, settings, loss=one.loss, sampler=one.sampler, scale=(1.0, 20.0))
        for ours, theirs in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@dataclass(frozen=True)
class Later(UniformSampler):
    """Draws what another seed draws, and is equal to the sampler that it is made from."""

    later: int = dataclasses.field(default=0, compare=False)

    def __call__(self, step: int) -> torch.Tensor:
        return super().__call__(step + self.later)


def test_a_sampler_of_ones_own_draws_for_its_own_member(two_channels):
    settings = TrainingSettings(steps=4, batch=5, validate_every=0)
    samplers = [Later(len(two_channels), 5, 0, later=later) for later in (0, 100)]
    members = [of_two_channels(0, MeanSquaredError(), sampler) for sampler in samplers]
    for sampler, result in zip(samplers, train_together(members, two_channels, settings), strict=True):
        one = of_two_channels(0, MeanSquaredError(), sampler)
        alone = train(one.model, two_channels, settings, loss=one.loss, sampler=one.sampler)
        for ours, theirs in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_minibatches_may_differ_in_size_from_step_to_step(two_channels):
    settings = TrainingSettings(steps=4, batch=5, validate_every=0)
    found = train_together(
        [of_two_channels(0, MeanSquaredError(), lambda step: torch.arange(2 + step))], two_channels, settings
    )
    assert found[0].finished


def test_each_member_is_validated_by_its_own(two_channels):
    """Where it is not the same for all, one by one; and not where there is none."""
    settings = TrainingSettings(steps=4, batch=5, validate_every=2)
    sampler = UniformSampler(len(two_channels), 5, 0)
    validations = [lambda _, i=i: Validation(Score(0, i), {"member": i}) for i in (1, 2)]
    members = [of_two_channels(i, MeanSquaredError(), sampler, validate=v) for i, v in enumerate([*validations, None])]
    first, second, third = train_together(members, two_channels, settings)
    for i, result in ((1, first), (2, second)):
        assert [line["validation"] for line in result.history if "validation" in line] == [{"member": i}] * 2
    assert not any("validation" in line for line in third.history)


class Own(RolloutValidation):
    def __call__(self, model: torch.nn.Module) -> Validation:
        return Validation(Score(0, 0.5), {"own": 1})


def test_a_validation_of_ones_own_is_called(source):
    one = dataclasses.replace(member(0, MeanSquaredError(), source), validate=Own(source))
    (found,) = train_together([one], Transitions(source), SETTINGS)
    assert [line["validation"] for line in found.history if "validation" in line] == [{"own": 1}] * 3


class Slow(Stops):
    """Takes longer to save than the steps take that follow."""

    def saved(self, checkpoint) -> None:
        time.sleep(0.2)
        self.saves.append(checkpoint)  # as it is then, and no copy


def test_what_is_saved_late_is_what_was_there_in_time(two_channels):
    settings = TrainingSettings(steps=6, batch=5, checkpoint_every=2, validate_every=0)
    sampler = UniformSampler(len(two_channels), 5, 0)
    slow, quick = Slow(), [Stops(step) for step in (2, 4)]
    train_together([of_two_channels(0, MeanSquaredError(), sampler, recorder=slow)], two_channels, settings)
    assert [checkpoint.step for checkpoint in slow.saves] == [2, 4, 6]
    for recorder, late in zip(quick, slow.saves, strict=False):
        train_together([of_two_channels(0, MeanSquaredError(), sampler, recorder=recorder)], two_channels, settings)
        for name, weight in recorder.resume().weights.items():
            assert torch.equal(weight, late.weights[name])


def test_weights_that_are_not_finite_end_their_member_at_the_next_save(two_channels):
    """Adam may spoil weights that no prediction depends on."""
    settings = TrainingSettings(steps=4, batch=5, checkpoint_every=2, validate_every=0)
    members = [of_two_channels(0, MeanSquaredError(), UniformSampler(len(two_channels), 5, 0)) for _ in range(2)]
    for one in members:
        one.model.register_parameter("idle", torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    members[0].model.idle.data.fill_(torch.nan)
    lost, kept = train_together(members, two_channels, settings)
    assert isinstance(lost, TrainingDiverged)
    assert lost.step == 2
    assert "idle" in str(lost)
    assert kept.finished


class Counting(torch.nn.Module):
    """Holds buffers: one that tells the members apart, and one that moves in training."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.register_buffer("gain", torch.tensor(gain, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls.add_(1)
        return self.weight * self.gain * u


def test_buffers_are_those_of_each_member_and_come_back(two_channels):
    settings = TrainingSettings(steps=4, batch=5, validate_every=0)
    sampler = UniformSampler(len(two_channels), 5, 0)
    found = train_together(
        [Member(Counting(gain), MeanSquaredError(), sampler) for gain in (1.0, 3.0)], two_channels, settings
    )
    for gain, result in zip((1.0, 3.0), found, strict=True):
        alone = train(Counting(gain), two_channels, settings, loss=MeanSquaredError(), sampler=sampler)
        for name, ours in result.model.state_dict().items():
            torch.testing.assert_close(ours, alone.model.state_dict()[name])


def test_what_cannot_be_trained_together_is_refused(source):
    one = member(0, MeanSquaredError(), source)
    with pytest.raises(ValueError, match="no member"):
        train_together([], Transitions(source), SETTINGS)
    with pytest.raises(ValueError, match="differ in their parameters"):
        train_together([one, member(0, MeanSquaredError(), source, kind="node")], Transitions(source), SETTINGS)
    with pytest.raises(ValueError, match="a loss is MSELoss"):
        train_together([member(0, torch.nn.MSELoss(), source)], Transitions(source), SETTINGS)
