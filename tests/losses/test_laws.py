"""What holds for every batch."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize

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
    weight_shares,
)

from . import oracle

finite = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
arrays = hnp.arrays(np.float64, st.tuples(st.integers(2, 4), st.integers(1, 3), st.integers(2, 6)), elements=finite)
budgets = st.sampled_from([KLBudget(0.05), KLBudget(0.3), EffectiveFraction(0.8), Relative(5.0)])
rules = st.one_of(st.sampled_from([0.0, 1e-3, 1.0, 30.0, math.inf]), budgets)
guards = st.sampled_from([{}, {"cap": 2.0}, {"mean_share": 0.3}, {"trim": 0.2}, {"winsorize": 0.2}])
overs = st.sampled_from(["all", "sample", "channel", "lead"])
seeds = st.integers(0, 10_000)

# A budget that a tiny drawn batch cannot meet is a warning, and lawful.
pytestmark = [
    pytest.mark.usefixtures("passes"),
    pytest.mark.filterwarnings("ignore:the temperature budget:RuntimeWarning"),
]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(arrays, rules, guards, overs)
def test_weights_are_a_distribution(errors, rule, guard, over):
    weights = imbalance_weights(torch.from_numpy(errors**2), rule, over=over, **guard)
    assert bool((weights >= 0).all())
    assert float(weights.sum()) == pytest.approx(1, rel=1e-9)


@settings(deadline=None)
@given(arrays, rules, overs)
def test_larger_errors_never_weigh_less(errors, rule, over):
    square = torch.from_numpy(errors**2)
    weights = imbalance_weights(square, rule, over=over)
    groups = {
        "all": lambda x: x.reshape(1, -1),
        "sample": lambda x: x.flatten(1),
        "channel": lambda x: x.transpose(0, 1).flatten(1),
        "lead": lambda x: x.movedim(2, 0).flatten(1),
    }
    for group_errors, group_weights in zip(groups[over](square), groups[over](weights), strict=True):
        assert bool((group_weights[group_errors.argsort()].diff() >= -1e-12).all())


@settings(deadline=None)
@given(arrays)
def test_limits_are_exact(errors):
    square = torch.from_numpy(errors)
    zero = torch.zeros_like(square)
    assert float(imbalance_aware_loss(square, zero, math.inf)) == pytest.approx(float((errors**2).mean()), rel=1e-12)
    assert float(imbalance_aware_loss(square, zero, 0)) == pytest.approx(float((errors**2).max()), rel=1e-12)
    share = imbalance_weights(square.square(), 0)
    ties = errors**2 == (errors**2).max()
    np.testing.assert_allclose(share.numpy(), ties / ties.sum(), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seeds, budgets, st.floats(-20, 20), overs, guards)
@example(5317, KLBudget(0.05), 1.0, "sample", {"trim": 0.2})  # a Newton step that meets the budget to the last digit
def test_budget_rules_know_no_unit(seed, rule, exponent, over, guard):
    e, zero, c = normal(seed, 4, 2, 30), torch.zeros(4, 2, 30, dtype=torch.float64), 10.0**exponent
    plain, scaled = (float(imbalance_aware_loss(x, zero, rule, over=over, **guard)) for x in (e, c * e))
    assert scaled == pytest.approx(c**2 * plain, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(seeds, st.one_of(budgets, st.sampled_from([0.0, 1.0, math.inf])), guards)
def test_order_does_not_matter(seed, rule, guard):
    e = normal(seed, 60)
    shuffled = e[torch.from_numpy(np.random.RandomState(seed).permutation(60))]
    zero = torch.zeros_like(e)
    assert float(imbalance_aware_loss(e, zero, rule, **guard)) == pytest.approx(
        float(imbalance_aware_loss(shuffled, zero, rule, **guard)), rel=1e-6
    )


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_value_grows_as_the_temperature_falls(seed):
    e = normal(seed, 100)
    values = [float(imbalance_aware_loss(e, torch.zeros_like(e), t)) for t in (math.inf, 30.0, 3.0, 0.3, 0.0)]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(values))
    values = [float(imbalance_aware_loss(e, torch.zeros_like(e), KLBudget(r))) for r in (0.01, 0.1, 0.5, 2.0)]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(values))


@settings(deadline=None, max_examples=30)
@given(seeds, st.one_of(budgets, st.sampled_from([0.0, 1.0, math.inf])), st.sampled_from(["all", "channel"]))
def test_masked_is_removed(seed, rule, over):
    e = normal(seed, 6, 2, 20)
    mask = torch.ones(6, 1, 20, dtype=torch.bool)
    mask[:, :, 15:] = False
    dirty = e.clone()
    dirty[:, :, 15:] = math.nan
    dirty.requires_grad_()
    value = imbalance_aware_loss(dirty, torch.zeros_like(e), rule, mask=mask, over=over)
    kept = e[:, :, :15]
    assert float(value.detach()) == pytest.approx(
        float(imbalance_aware_loss(kept, torch.zeros_like(kept), rule, over=over)), rel=1e-6
    )
    (gradient,) = torch.autograd.grad(value, dirty)
    assert bool((gradient[:, :, 15:] == 0).all())
    assert bool(gradient.isfinite().all())


@settings(deadline=None, max_examples=30)
@given(seeds, st.one_of(budgets, st.sampled_from([0.0, 1.0, math.inf])), overs)
def test_measure_is_repetition(seed, rule, over):
    e = normal(seed, 3, 2, 12)
    times = torch.from_numpy(np.random.RandomState(seed).randint(1, 4, 12))
    repeated = e.repeat_interleave(times, dim=2)
    measured = imbalance_aware_loss(e, torch.zeros_like(e), rule, measure=0.25 * times.double(), over=over)
    plain = imbalance_aware_loss(repeated, torch.zeros_like(repeated), rule, over=over)
    assert float(measured) == pytest.approx(float(plain), rel=1e-6)


def test_gradient_is_the_one_of_term():
    """∇ Σ w l with w held = ∇ T log mean exp(l/T), by finite differences in float64."""
    e, temperature = normal(0, 40).numpy(), 1.7

    def term(x: np.ndarray) -> float:
        z = x**2 / temperature
        return temperature * (z.max() + math.log(np.mean(np.exp(z - z.max()))))

    prediction = torch.from_numpy(e.copy()).requires_grad_()
    imbalance_aware_loss(prediction, torch.zeros(40, dtype=torch.float64), temperature).backward()
    expected = optimize.approx_fprime(e, term, 1e-6)
    np.testing.assert_allclose(prediction.grad.numpy(), expected, atol=1e-5)


def test_value_is_term_plus_temperature_times_divergence():
    e, temperature = normal(1, 40), 2.0
    w = oracle.weights(e.numpy() ** 2, 1 / temperature)
    term = temperature * float(torch.logsumexp(e**2 / temperature, 0) - math.log(40))
    value = float(imbalance_aware_loss(e, torch.zeros_like(e), temperature))
    assert value == pytest.approx(term + temperature * oracle.kl(w), rel=1e-9)


@pytest.mark.parametrize("rho", [0.05, 0.3, 1.0])
def test_kl_budget_is_the_worst_case_within_the_budget(rho):
    """Against a general constrained optimizer over the weights."""
    errors = normal(2, 8).numpy() ** 2
    result = optimize.minimize(
        lambda w: -(w @ errors),
        np.full(8, 1 / 8),
        jac=lambda w: -errors,
        bounds=[(1e-9, 1)] * 8,
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1},
            {"type": "ineq", "fun": lambda w: rho - (w * np.log(8 * w)).sum()},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    value = imbalance_aware_loss(torch.from_numpy(np.sqrt(errors)), torch.zeros(8, dtype=torch.float64), KLBudget(rho))
    assert float(value) == pytest.approx(-result.fun, rel=1e-5)


def test_kl_budget_gradient_misses_nothing_through_the_temperature():
    e = normal(3, 30).numpy()

    def value(x: np.ndarray) -> float:
        return float(imbalance_aware_loss(torch.from_numpy(x), torch.zeros(30, dtype=torch.float64), KLBudget(0.3)))

    prediction = torch.from_numpy(e.copy()).requires_grad_()
    imbalance_aware_loss(prediction, torch.zeros(30, dtype=torch.float64), KLBudget(0.3)).backward()
    np.testing.assert_allclose(prediction.grad.numpy(), optimize.approx_fprime(e, value, 1e-5), atol=1e-4)


def test_differentiated_weights_raise_small_errors():
    """The gradient's factor is w (1 + (l − loss)/T): negative for l < loss − T, the reason to detach."""
    e, temperature = normal(4, 1000), 1.3
    prediction = e.clone().requires_grad_()
    value = imbalance_aware_loss(prediction, torch.zeros_like(e), temperature, differentiate_weights=True)
    value.backward()
    w, square = oracle.weights(e.numpy() ** 2, 1 / temperature), e.numpy() ** 2
    expected = 2 * e.numpy() * w * (1 + (square - w @ square) / temperature)
    np.testing.assert_allclose(prediction.grad.numpy(), expected, atol=1e-12)
    assert ((prediction.grad * e) < 0).double().mean() > 0.9


def test_cap_holds_and_keeps_the_order():
    square = normal(5, 1000).square()
    weights, free = imbalance_weights(square, 0.5, cap=5.0), imbalance_weights(square, 0.5)
    assert float(weights.max()) == pytest.approx(5 / 1000, rel=1e-6)
    below = weights < 5 / 1000 * (1 - 1e-6)
    ratio = weights[below] / free[below]
    assert float(ratio.std() / ratio.mean()) < 1e-6  # shared out in proportion


def test_trim_drops_the_largest_and_winsorize_levels_them():
    square = torch.arange(1.0, 101.0, dtype=torch.float64)
    trimmed = imbalance_weights(square, 20.0, trim=0.05)
    np.testing.assert_array_equal(trimmed > 0, torch.arange(100) < 95)
    torch.testing.assert_close(trimmed[:95], imbalance_weights(square[:95], 20.0))
    levelled = imbalance_weights(square, 20.0, winsorize=0.05)
    torch.testing.assert_close(levelled, imbalance_weights(square.clamp(max=95), 20.0))


def test_mixture_is_between_the_mean_and_the_whole():
    e, zero = normal(6, 100), torch.zeros(100, dtype=torch.float64)
    mean, whole = float(MeanSquaredError()(e, zero)), float(imbalance_aware_loss(e, zero, 1.0))
    mixed = float(imbalance_aware_loss(e, zero, 1.0, mean_share=0.25))
    assert mixed == pytest.approx(0.25 * mean + 0.75 * whole)


def test_schedule_goes_from_uniform_to_the_rule():
    e, zero = normal(7, 500), torch.zeros(500, dtype=torch.float64)
    loss = ImbalanceAwareLoss(Schedule(KLBudget(0.3), steps=4, begin=2))
    kls = []
    for _ in range(10):
        loss(e, zero)
        kls.append(loss.report()["kl"])
    assert kls[:2] == [0, 0]
    np.testing.assert_allclose(kls[2:7], 0.3 * np.arange(1, 6) / 5, rtol=1e-4)
    np.testing.assert_allclose(kls[7:], 0.3, rtol=1e-4)
    loss.eval()(e, zero)
    assert int(loss.step) == 10  # an evaluation is not a step


def test_resumed_loss_gives_the_same_bits():
    batches = [(normal(seed, 300).float(), torch.zeros(300)) for seed in range(6)]
    unbroken, first, second = (ImbalanceAwareLoss(Schedule(KLBudget(0.3), 4)) for _ in range(3))
    values = [unbroken(*batch).item() for batch in batches]
    for batch in batches[:3]:
        first(*batch)
    second.load_state_dict(first.state_dict())
    assert [second(*batch).item() for batch in batches[3:]] == values[3:]


@pytest.mark.parametrize(
    ("error", "expected"),
    [("absolute", lambda d: d.abs()), ("huber", Huber(1.0)), (lambda p, t: (p - t) ** 4, lambda d: d**4)],
)
def test_other_errors(error, expected):
    d, zero = normal(8, 50), torch.zeros(50, dtype=torch.float64)
    square = expected(d) if not isinstance(expected, Huber) else expected(d, zero)
    w = oracle.weights(square.numpy(), 1.0)
    assert float(imbalance_aware_loss(d, zero, 1.0, error=error)) == pytest.approx(float(w @ square.numpy()), rel=1e-9)


@pytest.mark.parametrize("over", ["all", "sample", "channel"])
def test_weights_map_and_reduction_none_agree_with_the_loss(over):
    p, t = normal(9, 4, 3, 10), normal(10, 4, 3, 10)
    loss = ImbalanceAwareLoss(over=over)
    value, weights = loss(p, t), loss.weights(p, t)
    torch.testing.assert_close((weights * (p - t) ** 2).sum(), value)
    torch.testing.assert_close(ImbalanceAwareLoss(over=over, reduction="none")(p, t), weights * (p - t) ** 2)


def test_report_is_of_the_weights():
    p, t = normal(11, 400), normal(12, 400)
    for kwargs in ({}, {"cap": 3.0}, {"over": "sample"}):
        loss = ImbalanceAwareLoss(2.0, **kwargs)
        shape = (20, 20)
        value, weights = loss(p.view(shape), t.view(shape)), loss.weights(p.view(shape), t.view(shape)).reshape(-1)
        report, errors = loss.report(), (p - t).square()
        assert report["loss"] == pytest.approx(float(value))
        assert report["temperature"] == pytest.approx(2.0)
        assert report["kl"] == pytest.approx(oracle.kl(weights.numpy()), rel=1e-6)
        assert report["effective_fraction"] == pytest.approx(float(1 / weights.square().sum()) / 400, rel=1e-6)
        assert report["max_weight"] == pytest.approx(float(weights.max()), rel=1e-6)
        assert report["mean_error"] == pytest.approx(float(errors.mean()), rel=1e-6)
        assert report["max_error"] == pytest.approx(float(errors.max()), rel=1e-6)
        assert report["top_share"] == pytest.approx(float(weights[errors.topk(4).indices].sum()), rel=1e-6)
        for name, q in {"median_error": 0.5, "p90_error": 0.9, "p99_error": 0.99}.items():
            expected = float(errors.quantile(q, interpolation="lower"))
            assert report[name] == pytest.approx(expected, rel=0.02), name


def test_quantiles_of_a_report_count_points_by_their_measure():
    errors, measure = normal(13, 1, 50_000).abs(), normal(14, 1, 50_000).abs()
    loss = ImbalanceAwareLoss()
    loss(errors, torch.zeros_like(errors), measure=measure)
    order = errors.flatten().argsort()
    share = measure.flatten()[order].cumsum(0) / measure.sum()
    for name, q in {"median_error": 0.5, "p99_error": 0.99}.items():
        expected = float(errors.flatten()[order][int((share < q).sum())]) ** 2
        assert loss.report()[name] == pytest.approx(expected, rel=0.02)


def test_shares_by_channel_sum_to_one():
    weights = imbalance_weights(normal(13, 5, 3, 20).square() * torch.tensor([1.0, 2.0, 3.0]).view(3, 1))
    shares = weight_shares(weights, "channel", ["a", "b", "c"])
    assert sum(s["weight"] for s in shares.values()) == pytest.approx(1)
    assert shares["c"]["weight"] == pytest.approx(float(weights[:, 2].sum()))
    assert shares["c"]["ratio"] > 1 > shares["a"]["ratio"]


def test_shares_count_points_by_their_measure_and_not_behind_a_mask():
    """Uniform weights: every class has the share of its points, whatever is masked and however cells are measured."""
    errors, labels = torch.ones(40, dtype=torch.float64), torch.arange(40) % 2
    mask, measure = torch.arange(40) >= 15, torch.linspace(1, 3, 40, dtype=torch.float64)
    for options in ({"mask": mask}, {"measure": measure}, {"mask": mask, "measure": measure}):
        weights = imbalance_weights(errors, math.inf, **options)
        shares = weight_shares(weights, labels, ["even", "odd"], **options)
        assert [share["ratio"] for share in shares.values()] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, "labels has shape"),
        (torch.tensor([0, -1, 0, 0]), None, "but the least is -1"),
        (torch.tensor([0, 1, 2, 0]), ["a", "b"], "names has 2 names, but the labels go up to 2: give 3"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        weight_shares(torch.full((4,), 0.25), labels, names)


def test_the_share_of_the_top_is_not_fooled_by_the_structure_of_a_batch():
    """Every 8th column is badly predicted; a regular sample would meet only these, or none. A sample of some 16 000
    points is within a tenth."""
    errors = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    errors[:, ::8] += 3
    loss = ImbalanceAwareLoss(KLBudget(0.3), error=lambda prediction, target: prediction)
    loss(errors, torch.zeros_like(errors))
    weights = loss.weights(errors, torch.zeros_like(errors)).flatten()
    top = errors.flatten().topk(errors.numel() // 100).indices
    assert loss.report()["top_share"] == pytest.approx(weights[top].sum().item(), rel=0.1)


def test_an_infinite_cap_is_none():
    errors = torch.rand(50)
    torch.testing.assert_close(imbalance_weights(errors, 0.1, cap=math.inf), imbalance_weights(errors, 0.1))


@pytest.mark.parametrize("value", [-math.inf, -1.0])
def test_negative_errors_are_refused(value):
    with pytest.raises(ValueError, match=r"(non-finite|negative) values of 3, the first at index"):
        imbalance_weights(torch.tensor([1.0, value, 2.0]))


def test_a_measure_that_is_nan_behind_the_mask_counts_nothing():
    errors, mask = torch.rand(6), torch.tensor([True, True, False, True, True, True])
    measure = torch.where(mask, 2.0, math.nan)
    torch.testing.assert_close(
        imbalance_weights(errors, mask=mask, measure=measure), imbalance_weights(errors, mask=mask)
    )


def test_a_relative_temperature_where_the_sum_of_the_errors_overflows():
    residuals = 1e153 * torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = imbalance_aware_loss(residuals, torch.zeros_like(residuals), Relative(4.0))
    plain = imbalance_aware_loss(residuals / 1e153, torch.zeros_like(residuals), Relative(4.0))
    torch.testing.assert_close(scaled / 1e306, plain, rtol=1e-12, atol=0)


def test_budget_that_cannot_be_met_is_the_limit_and_a_warning():
    errors = torch.tensor([1.0, 2.0, 2.0])
    with pytest.warns(RuntimeWarning, match="cannot be met in 1 of 1 groups"):
        weights = imbalance_weights(errors, KLBudget(1.0))
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.5, 0.5]))


@pytest.mark.parametrize("rule", [KLBudget(), EffectiveFraction(), Relative(), 1.0, 0.0])
def test_perfect_and_equal_predictions_weigh_alike(rule):
    for errors in (torch.zeros(10), torch.full((10,), 3.0)):
        torch.testing.assert_close(imbalance_weights(errors, rule), torch.full((10,), 0.1))
    assert ImbalanceAwareLoss(rule)(torch.ones(10), torch.ones(10)).item() == 0


@pytest.mark.parametrize("exponent", range(-18, 19, 3))
@pytest.mark.parametrize("rule", [KLBudget(), EffectiveFraction(), Relative()], ids=str)
def test_no_overflow_where_the_squared_error_is_representable(rule, exponent):
    e = normal(14, 2000).float()
    value = ImbalanceAwareLoss(rule)(e * 10.0**exponent, torch.zeros(2000))
    assert value.item() == pytest.approx(
        ImbalanceAwareLoss(rule)(e, torch.zeros(2000)).item() * 10.0 ** (2 * exponent), rel=1e-5
    )
