"""Members of an ensemble end where they would have ended alone."""

import pytest
import torch

import squall.ensemble
from squall.data import InMemory, Transitions
from squall.ensemble import Member, train_together
from squall.evaluation import RolloutValidation
from squall.integrators import euler, midpoint
from squall.losses import ImbalanceAwareLoss, KLBudget, MeanSquaredError, Schedule
from squall.models import HNN, NODE
from squall.sampling import UniformSampler
from squall.systems import CahnHilliard
from squall.training import Recorder, TrainingDiverged, TrainingSettings, train

SETTINGS = TrainingSettings(steps=30, batch=16, log_every=10, validate_every=10, checkpoint_every=10)
LOSSES = {
    "mean": MeanSquaredError,
    "max": lambda: ImbalanceAwareLoss(0.0),
    "temperature": lambda: ImbalanceAwareLoss(50.0),
    "budget": lambda: ImbalanceAwareLoss(KLBudget(0.3)),
    "differentiated": lambda: ImbalanceAwareLoss(50.0, differentiate_weights=True),
}


@pytest.fixture(scope="module")
def source() -> InMemory:
    system = CahnHilliard()
    states = system.simulate(system.initial_states(4, torch.Generator().manual_seed(0)), 100)
    return InMemory(states[:, 60:], dt=system.dt)


def model(seed: int, kind: str = "hnn", dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    made = HNN(CahnHilliard().structure, 6, generator=generator) if kind == "hnn" else NODE(1, 6, generator=generator)
    return made.to(dtype)


def member(seed: int, loss, source, recorder: Recorder | None = None, **options) -> Member:
    sampler = UniformSampler(len(Transitions(source)), SETTINGS.batch, seed)
    validate = RolloutValidation(source, options.pop("step", euler), states=1)
    return Member(model(seed, **options), loss, sampler, validate, recorder or Recorder())


@pytest.fixture(params=[1, 100], ids="{} at once".format)
def at_once(request, monkeypatch):
    """Steps between two looks at the losses: one as on a CPU, or more as on a CUDA device."""
    monkeypatch.setitem(squall.ensemble.STEPS_AT_ONCE, "cpu", request.param)


@pytest.mark.parametrize(("kind", "step"), [("hnn", euler), ("node", midpoint)])
def test_an_ensemble_equals_its_members_alone(source, kind, step, at_once):
    combinations = [(0, name) for name in LOSSES] + [(1, "temperature")]
    members = [member(seed, LOSSES[name](), source, kind=kind, step=step) for seed, name in combinations]
    together = train_together(members, Transitions(source), SETTINGS, step=step)
    for (seed, name), result, one in zip(combinations, together, members, strict=True):
        alone = train(
            model(seed, kind), Transitions(source), SETTINGS, loss=LOSSES[name](), step=step,
            sampler=one.sampler, validate=one.validate,
        )  # fmt: skip
        for ours, theirs in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # the solver's tolerance
        assert [line["step"] for line in result.history] == [line["step"] for line in alone.history]
        assert result.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-6)
        assert result.best.step == alone.best.step


def test_a_schedule_goes_on_where_it_stood(source):
    """Half of the steps together, the rest alone, as all of them alone."""
    rule = Schedule(KLBudget(0.5), steps=20)
    memory = Memory(stop=20)
    train_together([member(0, ImbalanceAwareLoss(rule), source, memory)], Transitions(source), SETTINGS)
    kept = Memory(checkpoint=memory.checkpoint)
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


class Memory(Recorder):
    """Keeps the last checkpoint, and stops after some steps."""

    def __init__(self, stop: int | None = None, checkpoint=None) -> None:
        self.stop, self.checkpoint, self.steps = stop, checkpoint, 0

    def resume(self):
        return self.checkpoint

    def stepped(self, step: int) -> None:
        self.steps = step

    def stopping(self) -> bool:
        return self.stop is not None and self.steps >= self.stop

    def saved(self, checkpoint) -> None:
        self.checkpoint = checkpoint


def test_a_stopped_ensemble_goes_on_to_the_same_bits_and_its_members_can_go_on_alone(source):
    unbroken = train_together([member(s, MeanSquaredError(), source) for s in (0, 1)], Transitions(source), SETTINGS)
    memories = [Memory(stop=14), Memory(stop=14)]
    train_together([member(s, MeanSquaredError(), source, memories[s]) for s in (0, 1)], Transitions(source), SETTINGS)
    assert [memory.checkpoint.step for memory in memories] == [14, 14]
    resumed = train_together(
        [member(s, MeanSquaredError(), source, Memory(None, memories[s].checkpoint)) for s in (0, 1)],
        Transitions(source),
        SETTINGS,
    )
    one = member(1, MeanSquaredError(), source)
    alone = train(
        one.model, Transitions(source), SETTINGS, loss=one.loss, sampler=one.sampler,
        recorder=Memory(None, memories[1].checkpoint),
    )  # fmt: skip
    for ours, theirs in zip(resumed, unbroken, strict=True):
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(alone.model.parameters(), unbroken[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_member_that_diverges_leaves_the_others_alone(source, at_once):
    members = [member(s, ImbalanceAwareLoss(50.0), source) for s in (0, 1)]
    with torch.no_grad():
        next(members[0].model.parameters()).fill_(float("nan"))
    found = train_together(members, Transitions(source), SETTINGS)
    assert isinstance(found[0], TrainingDiverged)
    assert found[0].step == 1
    alone = train_together([member(1, ImbalanceAwareLoss(50.0), source)], Transitions(source), SETTINGS)
    for a, b in zip(found[1].model.parameters(), alone[0].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_trained_together_is_refused(source):
    one = member(0, MeanSquaredError(), source)
    with pytest.raises(ValueError, match="no member"):
        train_together([], Transitions(source), SETTINGS)
    with pytest.raises(ValueError, match="differ in their parameters"):
        train_together([one, member(0, MeanSquaredError(), source, kind="node")], Transitions(source), SETTINGS)
    with pytest.raises(ValueError, match="a loss is MSELoss"):
        train_together([member(0, torch.nn.MSELoss(), source)], Transitions(source), SETTINGS)
