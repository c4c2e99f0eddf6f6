"""On a CUDA device everything is as on a CPU, to rounding. Skipped where there is none."""

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import problems
import pytest
import torch
from problems import SYSTEM, separating
from problems import model as network
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from squall._process.replay import Replayed
from squall.data import InMemory, Transitions
from squall.evaluation.rollouts import RolloutValidation, evaluate, evaluate_each
from squall.integrators import euler, midpoint
from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, MeanSquaredError, Relative, Schedule
from squall.models.stacked import Stacked
from squall.training.batched import Member, train_together
from squall.training.loop import TrainingDiverged, TrainingSettings, train
from squall.training.sampling import UniformSampler

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # PyTorch's own, whichever version is there
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:no CUDA graph could be recorded"),
]


RULES: dict[str, Any] = {
    "mean": float("inf"),
    "largest": 0.0,
    "temperature": 3.0,
    "budget": KLBudget(0.3),
    "sharp budget": KLBudget(2.0),
    "fraction": EffectiveFraction(0.5),
    "relative": Relative(4.0),
}


def fields(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    prediction, target = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).unbind()
    return prediction, target


def value_and_gradient(loss: Callable[..., Tensor], prediction: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    prediction = prediction.clone().requires_grad_()
    value = loss(prediction, *rest)
    (gradient,) = torch.autograd.grad(value, prediction)
    return value.detach().cpu().double(), gradient.cpu().double()


@pytest.mark.parametrize("n", [1000, 1_000_003])
@pytest.mark.parametrize("rule", RULES)
def test_the_loss_is_that_of_the_formula_in_float64(rule, n):
    """Cold, and warm on another batch."""
    ours, formula = ImbalanceAwareLoss(RULES[rule]), ImbalanceAwareLoss(RULES[rule], reduction="none")
    for seed in range(2):
        prediction, target = fields(n, seed)
        value, gradient = value_and_gradient(ours, prediction.cuda(), target.cuda())
        exact = value_and_gradient(lambda p, t: formula(p, t).sum(), prediction.double(), target.double())
        assert abs(value / exact[0] - 1) < 2e-6
        assert (gradient - exact[1]).norm() / exact[1].norm() < 3e-6


OPTIONS: dict[str, dict[str, Any]] = {
    "channels": {"over": "channel"},
    "samples": {"over": "sample"},
    "cap": {"cap": 20.0},
    "trim": {"trim": 0.01},
    "winsorize": {"winsorize": 0.01},
    "mean share": {"mean_share": 0.2},
    "huber": {"error": "huber"},
    "differentiated": {"differentiate_weights": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_as_on_a_cpu(options):
    prediction, target = (x.reshape(10, 4, 500) for x in fields(20_000))
    loss = ImbalanceAwareLoss(**OPTIONS[options])
    ours = value_and_gradient(copy.deepcopy(loss), prediction.cuda(), target.cuda())
    for a, b in zip(ours, value_and_gradient(loss.double(), prediction, target), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_masks_and_measures_are_as_on_a_cpu():
    prediction, target = (x.reshape(100, 200) for x in fields(20_000))
    mask = torch.arange(200) % 5 > 0
    measure = torch.linspace(-89, 89, 100).deg2rad().cos().unsqueeze(1)
    for extra in ({"mask": mask}, {"measure": measure}, {"mask": mask, "measure": measure}):
        on_device = {name: x.cuda() for name, x in extra.items()}
        ours = value_and_gradient(partial(ImbalanceAwareLoss(), **on_device), prediction.cuda(), target.cuda())
        theirs = value_and_gradient(partial(ImbalanceAwareLoss(), **extra), prediction, target)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
def test_a_captured_step_of_the_loss_follows_new_batches(rule):
    loss = ImbalanceAwareLoss(RULES[rule])
    prediction, target = (x.cuda() for x in fields(10_000))
    prediction.requires_grad_()
    kept: dict[str, Tensor] = {"value": torch.zeros((), device="cuda"), "gradient": torch.zeros_like(target)}

    def work() -> None:
        value = loss(prediction, target)
        (gradient,) = torch.autograd.grad(value, prediction)
        kept["value"].copy_(value.detach())
        kept["gradient"].copy_(gradient)

    step = Replayed(work, torch.device("cuda"))
    for seed in range(6):
        for memory, new in zip((prediction.data, target), fields(10_000, seed), strict=True):
            memory.copy_(new)
        step()
        value, gradient = value_and_gradient(ImbalanceAwareLoss(RULES[rule]), *fields(10_000, seed))
        assert abs(kept["value"].item() / value - 1) < 1e-5
        torch.testing.assert_close(kept["gradient"].cpu().double(), gradient, rtol=1e-3, atol=1e-7)
    assert step._graph is not None


def test_autocast_and_the_compiler():
    prediction, target = fields(10_000)
    loss = ImbalanceAwareLoss(5.0)
    plain = value_and_gradient(loss, prediction, target)
    with torch.autocast("cuda", torch.bfloat16):
        found = [value_and_gradient(loss, prediction.cuda(), target.cuda())]
    found.append(value_and_gradient(torch.compile(loss, fullgraph=True), prediction.cuda(), target.cuda()))
    for ours in found:
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_under_ddp_by_nccl(tmp_path):
    """One process: that nothing of the global loss fails on a device."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, y = (field.reshape(-1, 4).cuda() for field in fields(4000))
        weighted = {"measure": torch.arange(1.0, 5.0, device="cuda")}
        gradients = []
        for group in ("world", None):
            model = nn.Linear(4, 4, bias=False).cuda()
            nn.init.eye_(model.weight)
            predict = DistributedDataParallel(model) if group else model
            for extra in ({}, {"mask": torch.arange(4, device="cuda") > 0}, weighted):
                model.zero_grad()
                ImbalanceAwareLoss(group=group)(predict(x), y, **extra).backward()
                assert model.weight.grad is not None
                gradients.append(model.weight.grad.clone())
        for a, b in zip(gradients[:3], gradients[3:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    finally:
        distributed.destroy_process_group()


# Models, trainings, evaluations


@pytest.fixture(scope="module")
def source() -> InMemory:
    return separating()


LOSSES: dict[str, Callable[[], nn.Module]] = problems.LOSSES | {
    "scheduled": lambda: ImbalanceAwareLoss(Schedule(KLBudget(0.5), steps=10)),
}
SETTINGS = TrainingSettings(steps=25, batch=16, log_every=10, validate_every=10, checkpoint_every=10)


@pytest.mark.parametrize("held", [True, False], ids=["data on the device", "data read step by step"])
@pytest.mark.parametrize(("kind", "step"), [("hnn", euler), ("node", midpoint)])
def test_trainings_together_end_where_each_ends_alone_on_a_cpu(source, kind, step, held, monkeypatch):
    if not held:
        monkeypatch.setattr("squall.training.batched.HELD_BYTES", 0)
    transitions, validate = Transitions(source), RolloutValidation(source, step, states=1)
    chosen = [(seed, name) for seed in (0, 1) for name in LOSSES]
    members = [
        Member(network(seed, kind, hidden=8), LOSSES[name](), UniformSampler(len(transitions), 16, seed), validate)
        for seed, name in chosen
    ]
    together = train_together(members, transitions, SETTINGS, integrator=step, device="cuda")
    for (seed, name), result in zip(chosen, together, strict=True):
        alone = train(
            network(seed, kind, hidden=8),
            transitions,
            SETTINGS,
            loss=LOSSES[name](),
            integrator=step,
            validate=validate,
            sampler=UniformSampler(len(transitions), 16, seed),
        )
        assert not isinstance(result, TrainingDiverged)
        for a, b in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(result.history, alone.history, strict=True):
            assert ours["step"] == theirs["step"]
            if "loss" in ours:
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert result.best is not None
        assert alone.best is not None
        assert result.best.step == alone.best.step


def test_a_member_that_diverges_is_named_by_its_step(source):
    transitions = Transitions(source)
    models = [network(0, "node", hidden=8), network(1, "node", hidden=8)]
    models[0].network.last.weight.data.fill_(1e200)  # type: ignore[union-attr, operator]
    members = [Member(model, MeanSquaredError(), UniformSampler(len(transitions), 16, 0)) for model in models]
    lost, kept = train_together(members, transitions, SETTINGS, device="cuda")
    assert isinstance(lost, TrainingDiverged)
    assert lost.step == 1
    assert not isinstance(kept, TrainingDiverged)


def test_one_training_alone(source):
    from lightning_fabric import Fabric

    transitions = Transitions(source)
    ends = []
    for accelerator in ("cuda", "cpu"):
        fabric = Fabric(accelerator=accelerator, devices=1)
        sampler = UniformSampler(len(transitions), 16, 0)
        result = train(
            network(0, "hnn", torch.float32, hidden=8),
            transitions, SETTINGS, loss=ImbalanceAwareLoss(), sampler=sampler,
            fabric=fabric, scale=(2.0,),
        )  # fmt: skip
        ends.append([p.detach().cpu() for p in result.model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["hnn", "node"])
def test_evaluations(source, kind):
    models = [network(seed, kind, hidden=8) for seed in range(3)]
    found = evaluate_each(Stacked(models, "cuda"), source, system=SYSTEM)
    for ours, model in zip(found, models, strict=True):
        theirs = evaluate(model, source, system=SYSTEM)
        on_device = evaluate(copy.deepcopy(model).cuda(), source, system=SYSTEM)
        for name in ("states", "energy", "mass"):
            assert ours.rollout[name] == pytest.approx(theirs.rollout[name], rel=1e-6)
            assert on_device.rollout[name] == pytest.approx(theirs.rollout[name], rel=1e-6)
        assert ours.one_step == pytest.approx(theirs.one_step, rel=1e-6)
        assert ours.growth == pytest.approx(theirs.growth, rel=1e-6)
        for name, regime in theirs.regimes.items():
            assert ours.regimes[name] == pytest.approx(regime, rel=1e-6)
