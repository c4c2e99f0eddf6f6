"""Every way to weigh a batch against the definitions in float64: weights, value and gradient."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from squall.losses import EffectiveFraction, Huber, ImbalanceAwareLoss, KLBudget, Relative, program
from squall.losses.errors import squared_error
from squall.losses.sketch import SMALL
from squall.losses.weights import from_groups, to_groups

from . import oracle

# A budget that few points cannot meet is a warning, and the limit.
pytestmark = [
    pytest.mark.usefixtures("passes"),
    pytest.mark.filterwarnings("ignore:the temperature budget:RuntimeWarning"),
]

RULES: dict[str, tuple[Any, dict[str, float]]] = {
    "sharp": (0.2, {"temperature": 0.2}),
    "warm": (3.0, {"temperature": 3.0}),
    "mean": (math.inf, {"temperature": math.inf}),
    "largest": (0.0, {"temperature": 0.0}),
    "relative": (Relative(4.0), {"relative": 4.0}),
    "kl": (KLBudget(0.3), {"kl": 0.3}),
    "sharp kl": (KLBudget(3.0), {"kl": 3.0}),
    "fraction": (EffectiveFraction(0.4), {"fraction": 0.4}),
    "capped kl": (KLBudget(1.0, cap=5.0), {"kl": 1.0, "cap": 5.0}),
    "cvar": (KLBudget(3.0, cap=5.0), {"kl": 3.0, "cap": 5.0}),
}
GUARDS = [{}, {"cap": 3.0}, {"mean_share": 0.3}, {"trim": 0.05}, {"winsorize": 0.05}, {"winsorize": 0.02, "trim": 0.1}]
ERRORS = {
    "squared": lambda d: d**2,
    "absolute": np.abs,
    "huber": lambda d: np.where(abs(d) < 1, d**2 / 2, abs(d) - 0.5),
}
SHAPE = {"few": (4, 3, 30), "many": (3, 4, 1000)}
LAYOUTS = {
    "contiguous": lambda x: x,
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}
MET = 1e-3
"""To which a budget is met where the points are binned; below `SMALL` points it is met to 1e-5."""


def fields(size: str, dtype: torch.dtype = torch.float32, tail: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, *SHAPE[size], generator=generator, dtype=torch.float64)
    prediction[0, :, :3] = target[0, :, :3]  # predicted exactly
    prediction[-1, :, -2:] = target[-1, :, -2:] + 4.0  # ties at the top, or nearly
    if tail:
        prediction = (
            target + (prediction - target) * (0.7 * torch.randn(SHAPE[size], generator=generator).double()).exp()
        )
    return prediction.to(dtype), target.to(dtype)


def options(kind: str, size: str) -> dict[str, Tensor]:
    space = SHAPE[size][-1]
    mask = torch.arange(space) % 5 > 0
    measure = torch.linspace(-1.5, 1.5, space).cos() * (torch.arange(space) % 7 > 0)
    full = torch.rand(SHAPE[size], generator=torch.Generator().manual_seed(1))
    return {
        "plain": {},
        "mask": {"mask": mask},
        "full mask": {"mask": full > 0.3},
        "measure": {"measure": measure},
        "channel measure": {"measure": full[:1, :, :1]},
        "both": {"mask": mask, "measure": full},
    }[kind]


def expected(
    prediction: Tensor, target: Tensor, given: dict[str, Tensor], rule: dict, guard: dict, over: str, error: str
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and errors, of the shape of the prediction."""
    shape = prediction.shape
    measure = given.get("measure", torch.ones(())).double().expand(shape)
    measure = torch.where(given.get("mask", torch.tensor(True)).expand(shape), measure, 0)
    real = np.float64 if prediction.dtype == torch.float64 else np.float32
    d = prediction.numpy().astype(real) - target.numpy().astype(real)  # ties are those of the precision in use
    errors = torch.from_numpy(ERRORS[error](d).astype(np.float64))
    rows, masses = (to_groups(x, over).numpy() for x in (errors, measure))
    found = [oracle.group_weights(l, m, rule, guard) for l, m in zip(rows, masses, strict=True)]
    w, totals = (np.stack(x) for x in zip(*found, strict=True))
    share = (totals / totals.sum())[:, None]
    return from_groups(torch.from_numpy(w * share), shape, over).numpy(), errors.numpy()


def check(
    loss: ImbalanceAwareLoss,
    prediction: Tensor,
    target: Tensor,
    given: dict,
    w: np.ndarray,
    errors: np.ndarray,
    close: float,
):
    prediction = prediction.clone().requires_grad_()
    hidden = prediction
    if "mask" in given:  # whatever is there
        hidden = torch.where(given["mask"].expand(prediction.shape), prediction, math.nan)
    value = loss(hidden, target, **given)
    value.backward()
    assert value.item() == pytest.approx((w * errors).sum(), rel=close)
    found = loss.weights(hidden.detach(), target, **given).double().numpy()
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert abs(found - w).sum() < 2 * close
    if loss.recipe.error is squared_error:
        gradient = 2 * found * (prediction.detach().double() - target.double()).numpy()
        assert np.linalg.norm(prediction.grad.double().numpy() - gradient) < 2e-6 * np.linalg.norm(gradient) + 1e-30


@pytest.mark.parametrize("size", SHAPE)
@pytest.mark.parametrize("guard", GUARDS, ids=str)
@pytest.mark.parametrize("over", ["all", "sample", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_guards_and_groups(rule, over, guard, size):
    kinds = itertools.cycle(["plain", "mask", "measure", "both", "full mask", "channel measure"])
    kind = list(itertools.islice(kinds, 60))[(3 * list(RULES).index(rule) + GUARDS.index(guard)) % 60]
    ours, theirs = RULES[rule]
    prediction, target = fields(size)
    w, errors = expected(prediction, target, options(kind, size), theirs, guard, over, "squared")
    close = MET if math.prod(SHAPE[size]) > SMALL and rule not in ("largest", "mean", "sharp", "warm") else 5e-6
    check(ImbalanceAwareLoss(ours, over=over, **guard), prediction, target, options(kind, size), w, errors, close)


@pytest.mark.parametrize("size", SHAPE)
@pytest.mark.parametrize("kind", ["plain", "mask", "full mask", "measure", "channel measure", "both"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("over", ["all", "sample", "channel"])
def test_masks_measures_and_errors(kind, error, over, size):
    prediction, target = fields(size, tail=True)
    w, errors = expected(prediction, target, options(kind, size), {"kl": 0.3}, {}, over, error)
    close = MET if math.prod(SHAPE[size]) > SMALL else 5e-6
    check(ImbalanceAwareLoss(over=over, error=error), prediction, target, options(kind, size), w, errors, close)


@pytest.mark.parametrize(("over", "axis"), [("channel", 1), ("lead", 2)])
@pytest.mark.parametrize("kind", ["plain", "mask of leads", "measure", "measure of samples"])
def test_each_channel_or_lead_time_is_weighed_by_itself_and_has_its_share_of_the_measure(over, axis, kind):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 4, 30, generator=generator, dtype=torch.float64)
    given = {
        "plain": {},
        "mask of leads": {"mask": torch.rand(2, 4, 30, generator=generator) > 0.3},
        "measure": {"measure": torch.rand(30, generator=generator)},
        "measure of samples": {"measure": torch.rand(3, 1, 4, 1, generator=generator)},
    }[kind]
    whole = ImbalanceAwareLoss(over=over).weights(prediction, target, **given)
    mass = given.get("measure", torch.ones(())).double() * given.get("mask", torch.tensor(True))
    mass = mass.expand(prediction.shape) / mass.expand(prediction.shape).sum()
    for place in range(prediction.shape[axis]):
        own = {name: x.expand(prediction.shape).select(axis, place) for name, x in given.items()}
        alone = ImbalanceAwareLoss().weights(prediction.select(axis, place), target.select(axis, place), **own)
        share = mass.select(axis, place).sum()
        torch.testing.assert_close(whole.select(axis, place), share * alone, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("over", ["all", "sample", "channel"])
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_the_layout_in_memory_does_not_matter(layout, over, kind):
    prediction, target = fields("many")
    straight, other = ImbalanceAwareLoss(over=over), ImbalanceAwareLoss(over=over)
    a, b = prediction.clone().requires_grad_(), LAYOUTS[layout](prediction).clone(memory_format=torch.preserve_format)
    b = LAYOUTS[layout](prediction).detach().requires_grad_()
    value, same = (
        straight(a, target, **options(kind, "many")),
        other(b, LAYOUTS[layout](target), **options(kind, "many")),
    )
    value.backward()
    same.backward()
    torch.testing.assert_close(same, value)
    torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SHAPE)
def test_precisions(dtype, size):
    prediction, target = fields(size, dtype)
    w, errors = expected(
        prediction.float() if dtype.itemsize == 2 else prediction,
        target.float() if dtype.itemsize == 2 else target,
        {},
        {"kl": 0.3},
        {},
        "all",
        "squared",
    )
    loss = ImbalanceAwareLoss()
    prediction.requires_grad_()
    value = loss(prediction, target)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert prediction.grad.dtype == dtype
    assert value.item() == pytest.approx((w * errors).sum(), rel=MET if size == "many" else 5e-6)


@pytest.mark.parametrize("exponent", [-18, -10, 0, 10, 18])
@pytest.mark.parametrize("rule", ["kl", "capped kl", "cvar", "fraction", "relative", "largest"])
@pytest.mark.parametrize("guard", [{}, {"cap": 3.0}, {"trim": 0.05}])
@pytest.mark.parametrize("size", SHAPE)
def test_the_scale_does_not_matter(rule, exponent, guard, size):
    """Errors down to 1e-38 and up to 1e37, by exact powers of two."""
    prediction, target = fields(size)
    factor = 2.0 ** round(exponent / math.log10(2))
    for given in ({}, options("measure", size)):
        loss = ImbalanceAwareLoss(RULES[rule][0], **guard)
        expected = loss.weights(prediction, target, **given)
        torch.testing.assert_close(
            loss.weights(factor * prediction, factor * target, **given), expected, rtol=2e-4, atol=1e-7
        )


def test_denormal_errors_are_told_apart():
    errors = torch.arange(5000) * 2.0**-149
    w = ImbalanceAwareLoss(error=lambda p, t: p).weights(errors, torch.zeros(5000)).double().numpy()
    e = errors.double().numpy()
    exact, _ = oracle.group_weights(e / e.max(), np.ones(5000), {"kl": 0.3}, {})
    assert abs(w - exact).sum() < 1e-3


@pytest.mark.parametrize("exponent", [0, 3, 6, 8, 12, 20])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("size", SHAPE)
def test_the_weights_of_the_gradient_sum_to_one_however_sharp(exponent, measured, size):
    """No difference of large rounded numbers stands in an exponent: max l / T up to 1e20."""
    prediction, target = fields(size)
    d = prediction - target
    d = torch.where(d == 0, 0.01, d).requires_grad_()
    given = options("measure", size) if measured else {}
    loss = ImbalanceAwareLoss(float((d.detach() ** 2).max()) / 10.0**exponent)
    loss(d, torch.zeros_like(d), **given).backward()
    weights = d.grad.double() / (2 * d.detach().double())
    assert weights.sum().item() == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "cvar"])
@pytest.mark.parametrize("guard", GUARDS, ids=str)
@pytest.mark.parametrize("size", SHAPE)
def test_a_traced_program_gives_the_same_weights(rule, guard, size, monkeypatch):
    prediction, target = fields(size, tail=True)
    for kind in ("plain", "both"):
        loss = ImbalanceAwareLoss(RULES[rule][0], over="channel", **guard)
        given = options(kind, size)
        errors, total = loss.recipe.checked_errors(prediction, target, given.get("mask"), given.get("measure"))
        total = None if total is None else to_groups(total, "channel")
        with monkeypatch.context() as patch:
            patch.setattr(program, "is_traced", lambda _: True)
            made = program.weigh(to_groups(errors, "channel"), total, loss.recipe.weighing, 1.0)
        traced = from_groups(made.weights, errors.shape, "channel")
        assert (traced - loss.weights(prediction, target, **given)).abs().sum() < 2e-3


@pytest.mark.parametrize("rho", [1e-8, 1e-5, 1e-2, 0.3, 3.0, 6.0])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_budgets_are_met_to_a_thousandth(rho, measured, tail):
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(200_000, generator=generator, dtype=torch.float64)
    if tail:
        d = d * (0.7 * torch.randn(200_000, generator=generator, dtype=torch.float64)).exp()
    measure = torch.rand(200_000, generator=generator, dtype=torch.float64) if measured else None
    w = ImbalanceAwareLoss(KLBudget(rho)).weights(d, torch.zeros_like(d), measure=measure).numpy()
    p = np.full(200_000, 1 / 200_000) if measure is None else (measure / measure.sum()).numpy()
    # 1 + x log x − x, which does not cancel where w is near p
    x = w / p - 1
    assert (p * ((1 + x) * np.log1p(x) - x)).sum() == pytest.approx(rho, rel=1e-3)


@pytest.mark.parametrize("tail", [1, 2, 3])  # of the logarithm of the residual: up to 1e11 times the mean error
@pytest.mark.parametrize(("rho", "cap"), [(1.0, 3.0), (0.69, 2.0), (2.99, 20.0)], ids=str)  # ρ just below log c
def test_a_capped_budget_is_met_however_sharp(tail, rho, cap):
    generator = torch.Generator().manual_seed(tail)
    d = torch.randn(10_000, generator=generator, dtype=torch.float64)
    d = d * (tail * torch.randn(10_000, generator=generator, dtype=torch.float64)).exp()
    w = ImbalanceAwareLoss(KLBudget(rho, cap=cap)).weights(d, torch.zeros_like(d)).numpy()
    assert w.max() * 10_000 < cap * (1 + 1e-6)
    assert oracle.kl(w) == pytest.approx(rho, rel=1e-3)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_a_budget_among_errors_that_lie_in_one_bin(spread):
    errors = 1 + spread * torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = ImbalanceAwareLoss(KLBudget(0.3), error=lambda p, t: p).weights(errors, torch.zeros_like(errors))
    assert oracle.kl(w.numpy()) == pytest.approx(0.3, rel=1e-3)


def test_huber_of_a_parameter_is_the_one_of_pytorch():
    prediction, target = fields("many")
    value = ImbalanceAwareLoss(math.inf, error=Huber(0.3))(prediction, target)
    torch.testing.assert_close(value, torch.nn.functional.huber_loss(prediction, target, delta=0.3))


@pytest.mark.parametrize("error", ["squared", "huber", lambda p, t: (p - t) ** 4])
def test_second_derivatives(error):
    prediction, target = fields("few", torch.float64)
    prediction = prediction.requires_grad_()
    loss = ImbalanceAwareLoss(2.0, error)
    w = loss.weights(prediction.detach(), target)
    (gradient,) = torch.autograd.grad(loss(prediction, target), prediction, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), prediction)
    p = prediction.detach().requires_grad_()
    (plain,) = torch.autograd.grad((w * loss.recipe.error(p, target)).sum(), p, create_graph=True)
    torch.testing.assert_close(gradient, plain)
    torch.testing.assert_close(second, torch.autograd.grad(plain.square().sum(), p)[0])
