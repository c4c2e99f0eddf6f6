"""A stack computes what its members compute, to rounding."""

import pytest
import torch
from problems import SYSTEM, separating
from problems import model as network

from squall._process.replay import Replayed
from squall.data import InMemory
from squall.evaluation.growth import growth_factor, growth_factors
from squall.evaluation.rollouts import RolloutValidation, evaluate, evaluate_each
from squall.integrators import euler, midpoint, rollout, substeps
from squall.models import HNN, NODE
from squall.models.stacked import Stacked


@pytest.fixture(params=["hnn", "node"])
def models(request) -> list[torch.nn.Module]:
    return [network(seed, request.param) for seed in range(3)]


@pytest.fixture(scope="module")
def source() -> InMemory:
    return separating(3, 40, 20)


def test_rates_are_those_of_the_members(models):
    u = torch.randn(3, 4, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stacked = Stacked(models)
    rates = stacked(u)
    for i, model in enumerate(models):
        torch.testing.assert_close(rates[i], model(u[i]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stacked.member(i)(u[i]), model(u[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [euler, substeps(midpoint, 2)], ids=str)
def test_rollouts_are_those_of_the_members(models, source, step):
    first = source.read()[:, 0]
    together = Stacked(models).rollout(step, first, SYSTEM.dt, 5)
    with torch.no_grad():
        for one, model in zip(together, models, strict=True):
            torch.testing.assert_close(one, rollout(step, model, first, SYSTEM.dt, 5), rtol=1e-11, atol=1e-12)


def test_a_stack_holds_copies(models):
    stacked = Stacked(models)
    before = {name: x.clone() for name, x in stacked.parameters.items()}
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.zero_()
    assert all(torch.equal(x, before[name]) for name, x in stacked.parameters.items())


def test_what_cannot_be_stacked():
    with pytest.raises(ValueError, match="no model"):
        Stacked([])
    for other in (NODE(1, 5), NODE(1, 4).double(), HNN(SYSTEM.structure, 4), NODE(1, 4).eval()):
        with pytest.raises(ValueError, match="differ in their parameters or their class"):
            Stacked([NODE(1, 4), other])


@pytest.mark.parametrize(("limit", "numbers"), [(512, 2**20), (512, 2 * 50**2), (10, 2**20)])
def test_growth_factors_of_each_member(models, limit, numbers, monkeypatch):
    """By the whole Jacobian, of all members at once and of two at a time, and by Arnoldi's method."""
    monkeypatch.setattr("squall.evaluation.growth.DENSE_LIMIT", limit)
    monkeypatch.setattr("squall.evaluation.growth.JACOBIAN_NUMBERS", numbers)
    u = torch.randn(2, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = growth_factors(euler, Stacked(models), u, SYSTEM.dt)
    apart = [growth_factor(euler, model, u, SYSTEM.dt) for model in models]
    torch.testing.assert_close(together, torch.stack(apart), equal_nan=True)


def test_evaluations_are_those_of_the_members(models, source):
    found = evaluate_each(Stacked(models), source, system=SYSTEM, keep=1)
    for ours, model in zip(found, models, strict=True):
        theirs = evaluate(model, source, system=SYSTEM, keep=1)
        a, b = (torch.tensor(list(numbers(x.to_dict()))) for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
        for name, field in vars(theirs.rollouts).items():
            torch.testing.assert_close(torch.tensor(vars(ours.rollouts)[name]), torch.tensor(field))


def numbers(value):
    """All numbers of nested dictionaries and lists."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield float(value)


def test_validations_are_those_of_the_members(models, source):
    validate = RolloutValidation(source, states=2)
    models[1].network.last.weight.data.fill_(1e4)  # pyright: ignore[reportAttributeAccessIssue]
    for ours, model in zip(validate.each(Stacked(models)), models, strict=True):
        theirs = validate(model)
        assert ours.score.diverged == theirs.score.diverged
        assert ours.metrics == {name: x if x is None else pytest.approx(x) for name, x in theirs.metrics.items()}


def test_on_a_cpu_work_is_done_as_it_is():
    done = []
    work = Replayed(lambda: done.append(1), torch.device("cpu"))
    for _ in range(5):
        work()
    assert len(done) == 5
