"""Losses that remember: their recursions by hand, their checkpoints, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
from scipy import optimize

from squall.data.measure import lengths
from squall.losses.rivals import RBA, VRBA, ChannelLoss, RegimeBudget
from squall.losses.rivals.regimes import steepness

from .cases import fields

SAMPLES, BATCH, SHAPE = 6, 3, (2, 5)


def batches(steps: int):
    """Indices, predictions and targets of a few steps over six samples."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(steps):
        index = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        yield index, *fields(BATCH, *SHAPE, seed=seed)


def rba_by_hand(steps: int, gamma: float, eta: float, r) -> tuple[list[float], np.ndarray]:
    weights, values = np.zeros((SAMPLES, *SHAPE)), []
    for k, (index, prediction, target) in enumerate(batches(steps)):
        e = (prediction - target).detach().numpy()
        for row, sample in enumerate(index.tolist()):
            weights[sample] = gamma * weights[sample] + eta * r(np.abs(e), row, k)
        values.append(np.mean([(weights[s] * e[row]) ** 2 for row, s in enumerate(index.tolist())]))
    return values, weights


def run(loss: torch.nn.Module, steps: int, start: int = 0) -> list[float]:
    todo = list(batches(steps))[start:]
    return [loss(prediction, target, index=index).item() for index, prediction, target in todo]


def test_rba_follows_its_recursion():
    values, weights = rba_by_hand(5, 0.9, 0.1, lambda size, row, k: size[row] / size.max())
    loss = RBA((SAMPLES, *SHAPE), gamma=0.9, eta=0.1).double()
    assert run(loss, 5) == pytest.approx(values, rel=1e-12)
    np.testing.assert_allclose(loss.memory.numpy(), weights, rtol=1e-12)


def test_vrba_follows_its_recursion():
    def increment(size, row, k):
        epsilon = 0.7 * size[row].max() / np.log(k + 2)
        q = np.exp(size[row] / epsilon)
        return 0.6 * q / q.max() + 0.4

    values, weights = rba_by_hand(5, 0.9, 0.1, increment)
    loss = VRBA((SAMPLES, *SHAPE), gamma=0.9, eta=0.1, phi=0.6, c=0.7).double()
    assert run(loss, 5) == pytest.approx(values, rel=1e-12)
    np.testing.assert_allclose(loss.memory.numpy(), weights, rtol=1e-12)


@pytest.mark.parametrize("kind", [RBA, VRBA])
def test_weights_stay_below_their_bound(kind):
    loss = kind((1, 1, 3), gamma=0.5, eta=1.0)
    prediction = torch.tensor([[[1.0, 2.0, 3.0]]], requires_grad=True)
    for _ in range(60):
        loss(prediction, torch.zeros(1, 1, 3), index=torch.tensor([0]))
    assert loss.memory.max().item() == pytest.approx(2.0)
    assert (loss.memory <= 2).all()


@pytest.mark.parametrize("kind", [RBA, VRBA])
def test_a_killed_and_resumed_run_equals_an_unbroken_one(kind):
    unbroken = run(kind((SAMPLES, *SHAPE)).double(), 8)
    first = kind((SAMPLES, *SHAPE)).double()
    values = run(first, 4)
    saved = copy.deepcopy(first.state_dict())
    second = kind((SAMPLES, *SHAPE)).double()
    second.load_state_dict(saved)
    assert values + run(second, 8, start=4) == unbroken


@pytest.mark.parametrize("kind", [RBA, VRBA])
def test_validation_changes_no_memory(kind):
    loss = kind((SAMPLES, *SHAPE)).double()
    run(loss, 2)
    before = copy.deepcopy(loss.state_dict())
    with torch.no_grad():
        run(loss, 2)
    run(loss.eval(), 2)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", [RBA, VRBA])
def test_masked_points_keep_their_weight(kind):
    loss = kind((SAMPLES, *SHAPE)).double()
    run(loss, 3)
    before = loss.memory.clone()
    mask = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(3)) > 0.5
    loss(*fields(BATCH, *SHAPE), index=torch.arange(BATCH), mask=mask)
    assert torch.equal(loss.memory[:BATCH][~mask], before[:BATCH][~mask])
    assert (loss.memory[:BATCH][mask] != before[:BATCH][mask]).all()


@pytest.mark.parametrize("kind", [RBA, VRBA])
def test_calls_without_the_right_samples_are_refused(kind):
    loss = kind((SAMPLES, *SHAPE)).double()
    prediction, target = fields(BATCH, *SHAPE)
    with pytest.raises(ValueError, match=f"{kind.__name__} remembers every training sample: pass index"):
        loss(prediction, target)
    with pytest.raises(ValueError, match=r"made for samples 0 to 5, got 1 to 6"):
        loss(prediction, target, index=torch.tensor([1, 2, 6]))
    with pytest.raises(ValueError, match=r"made for samples 0 to 5, got -1 to 3"):
        loss(prediction, target, index=torch.tensor([-1, 2, 3]))
    with pytest.raises(ValueError, match=r"made for samples of shape \[2, 5\], got \[2, 4\]"):
        loss(prediction[..., :4], target[..., :4], index=torch.arange(BATCH))
    for bad in (torch.arange(2), torch.ones(BATCH), torch.tensor([True, False, True])):
        with pytest.raises(ValueError, match=r"index must be integers of shape \(batch,\)"):
            loss(prediction, target, index=bad)
    with pytest.raises(RuntimeError, match="size mismatch for memory"):
        kind((SAMPLES + 1, *SHAPE)).load_state_dict(loss.state_dict())
    assert (loss.memory == 0).all(), "a refused call leaves no trace"


def channel_by_hand(steps: int, window: float, limit: float) -> tuple[list[float], np.ndarray]:
    scales, values = np.ones(2), []
    for _, prediction, target in batches(steps):
        size = np.array([1.0, 10.0]).reshape(1, 2, 1)
        l = ((size * (prediction - target).detach().numpy()) ** 2).mean((0, 2))
        values.append((scales * l).mean())
        wanted = np.clip(1 / l, (1 / l).min(), limit * (1 / l).min())
        scales = ((window - 1) * scales + wanted) / window
    return values, scales


@pytest.mark.parametrize("limit", [3.0, 1e6])
def test_channel_scales_follow_their_recursion(limit):
    values, scales = channel_by_hand(6, 25, limit)
    loss = ChannelLoss(2, limit=limit).double()
    size = torch.tensor([1.0, 10.0], dtype=torch.float64).reshape(1, 2, 1)
    found = [loss(size * prediction, size * target).item() for _, prediction, target in batches(6)]
    assert found == pytest.approx(values, rel=1e-12)
    np.testing.assert_allclose(loss.scales.numpy(), scales, rtol=1e-12)


def test_in_the_long_run_channels_weigh_alike_whatever_their_unit():
    loss = ChannelLoss(2, limit=1e9).double()
    prediction, target = fields(BATCH, *SHAPE)
    size = torch.tensor([1.0, 1e-3], dtype=torch.float64).reshape(1, 2, 1)
    for _ in range(2000):
        value = loss(size * prediction, size * target)
    assert value.item() == pytest.approx(1)


def test_channel_scales_resume_and_rest_in_validation():
    def calls(loss, todo):
        return [loss(prediction, target).item() for _, prediction, target in todo]

    steps = list(batches(8))
    unbroken = calls(ChannelLoss(2).double(), steps)
    first = ChannelLoss(2).double()
    values = calls(first, steps[:4])
    with torch.no_grad():
        calls(first, steps)
    second = ChannelLoss(2).double()
    second.load_state_dict(first.state_dict())
    assert values + calls(second, steps[4:]) == unbroken


def test_a_channel_that_is_masked_wholly_keeps_its_scale():
    loss = ChannelLoss(2).double()
    prediction, target = fields(BATCH, *SHAPE)
    mask = torch.tensor([True, False]).reshape(1, 2, 1)
    value = loss(prediction, target, mask=mask)
    torch.testing.assert_close(value, (prediction - target)[:, 0].square().mean())
    assert loss.scales[1] == 1
    assert loss.scales[0] != 1


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="made for 3 channels, got 2"):
        ChannelLoss(3)(torch.ones(1, 2, 4), torch.zeros(1, 2, 4))


def test_regimes_follow_their_running_means_and_the_budget_over_them():
    """Against the dual of the budget, minimised by scipy: min over T of T log Σ p exp(m/T) + T ρ."""
    _, targets = fields(40, 2, 5, seed=9)
    loss = RegimeBudget(targets, rho=0.2, shares=(0.5, 0.2), window=4.0)
    means = np.full(6, np.nan)
    for step in range(5):
        prediction, target = fields(20, 2, 5, seed=step)
        errors, labels = (prediction - target).detach().square().numpy(), loss.regimes(target).numpy()
        p = np.array([(labels == k).mean() for k in range(6)])
        of_batch = np.array([errors[labels == k].mean() for k in range(6)])
        means = np.where(np.isnan(means), of_batch, means + (of_batch - means) / 4)

        def dual(log_t, p=p, means=means):
            t = np.exp(log_t)
            return t * np.log((p * np.exp((means - means.max()) / t)).sum()) + means.max() + t * 0.2

        t = np.exp(optimize.minimize_scalar(dual, bounds=(-5, 5), method="bounded", options={"xatol": 1e-10}).x)
        w = p * np.exp((means - means.max()) / t)
        assert loss(prediction, target).item() == pytest.approx((w / w.sum()) @ of_batch, rel=1e-5)
    np.testing.assert_allclose(loss.means.numpy(), means, rtol=1e-12)


def test_points_of_one_regime_count_alike_and_regimes_have_their_share_of_the_targets():
    _, targets = fields(200, 2, 10)
    loss = RegimeBudget(targets, shares=(0.5, 0.1))
    shares = np.bincount(loss.regimes(targets).flatten().numpy()) / targets.numel()
    np.testing.assert_allclose(shares, [0.25, 0.2, 0.05] * 2, atol=1e-3)
    prediction, target = fields(20, 2, 10, seed=1)
    loss(prediction, target).backward()
    ratio = (prediction.grad / (prediction - target).detach()).flatten()
    regimes = loss.regimes(target).flatten()
    for k in range(6):
        torch.testing.assert_close(ratio[regimes == k], ratio[regimes == k][:1].expand((regimes == k).sum()))


def test_one_channel_may_set_the_regimes_of_all():
    _, targets = fields(20, 2, 10)
    labels = RegimeBudget(targets, shares=(0.5,), channel=1).regimes(targets)
    assert torch.equal(labels[:, 0] + 2, labels[:, 1])
    for name in ("channel", "front"):
        with pytest.raises(ValueError, match=f"{name} is 2, but the data have channels 0 to 1"):
            RegimeBudget(targets, **{name: 2})


def globe(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, list[tuple[torch.Tensor, bool]]]:
    """Latitudes and longitudes in radians, and the cells of their grid."""
    latitude, longitude = 90 - 180 * (np.arange(rows) + 0.5) / rows, 360 * np.arange(columns) / columns
    cells = list(zip(lengths([latitude, longitude], ["latitude", "longitude"]), (False, True), strict=True))
    return np.radians(latitude)[:, None], np.radians(longitude)[None], cells


def test_the_gradient_on_the_sphere_is_that_of_a_spherical_harmonic():
    north, east, cells = globe(64, 128)
    field = torch.from_numpy(np.cos(north) * np.cos(east))
    exact = np.sqrt(np.sin(north) ** 2 * np.cos(east) ** 2 + np.sin(east) ** 2)  # |∇u|² = u_φ² + u_λ²/cos²φ
    np.testing.assert_allclose(steepness(field, cells)[1:-1], exact[1:-1], atol=2e-3)
    np.testing.assert_allclose(steepness(field, cells), exact, atol=5e-2)  # one-sided at the ends
    one_level = list(zip(lengths([np.zeros(1), np.arange(64.0)], ["z", "x"]), (False, False), strict=True))
    torch.testing.assert_close(steepness(torch.arange(64.0).reshape(1, 64), one_level), torch.ones(1, 64))


@pytest.mark.parametrize("leads", [(), (2,)])
def test_weather_has_storms_and_fronts_by_the_area_of_each_state(leads):
    """Point by point: a storm where less than the share of the area is larger, else a front where it is steep."""
    north, _, cells = globe(6, 8)
    _, target = fields(3, 2, *leads, 6, 8)
    area = torch.from_numpy(np.cos(north)).expand(target.shape)
    target[1] *= 100  # a violent day has no more storms than a calm one
    loss = RegimeBudget(target, cells, shares=(0.2, 0.05), channel=1, each_state=True, front=0, front_share=0.25)
    labels = loss.regimes(target, area)
    assert torch.equal(labels[:, 0] + 4, labels[:, 1])
    days = [x.movedim(1, -1).reshape(-1, 48, 2).movedim(-1, 1).numpy() for x in (target, area, labels)]
    steep = steepness(target[:, 0], cells).reshape(-1, 48).numpy()
    for (_, vorticity), (_, mass), (found, _), gradient in zip(*days, steep, strict=True):
        larger, steeper = (
            np.array([mass[size > x].sum() for x in size]) / mass.sum() for size in (np.abs(vorticity), gradient)
        )
        storm = (larger < 0.2).astype(int) + (larger < 0.05)
        assert found.tolist() == np.where(storm > 0, storm + 1, steeper < 0.25).tolist()
        assert set(found) == {0, 1, 2, 3}


def test_a_coast_is_no_front_and_masked_points_are_in_no_tail():
    target = torch.full((1, 1, 4, 12), 5.0, dtype=torch.float64)
    target[..., 8:] = target[..., 8:] + 0.1 * torch.arange(4) ** 2
    mask = torch.arange(12) > 3
    target = torch.where(mask, target, 0)
    loss = RegimeBudget(target, shares=(0.1,), each_state=True, front=0, front_share=0.2)
    assert loss.regimes(target, mask.double().expand(target.shape))[0, 0, 0, 4:].tolist() == [0, 0, 0, 0, 0, 0, 1, 2]


def test_regimes_killed_and_resumed_equal_an_unbroken_run():
    _, targets = fields(20, 2, 5)

    def values(loss, seeds):
        return [loss(*fields(4, 2, 5, seed=seed)).item() for seed in seeds]

    whole = values(RegimeBudget(targets), range(6))
    first, second = RegimeBudget(targets), RegimeBudget(targets)
    start = values(first, range(3))
    second.load_state_dict(first.state_dict())
    second.eval()(*fields(4, 2, 5, seed=7))  # a validation moves nothing
    assert start + values(second.train(), range(3, 6)) == whole
