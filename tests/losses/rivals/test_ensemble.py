"""The almost fair CRPS against its published sum and against the package scores."""

import numpy as np
import pytest
import torch

from squall.losses.rivals import AlmostFairCRPS

SHAPE = (4, 2, 5)


def ensemble(members: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forecasts (member, *SHAPE) and the truth."""
    generator = torch.Generator().manual_seed(members)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in ((members, *SHAPE), SHAPE))


def of(x: torch.Tensor, y: torch.Tensor, alpha: float, **given: torch.Tensor) -> torch.Tensor:
    return AlmostFairCRPS(members=len(x), alpha=alpha)(x.flatten(0, 1), y.repeat(len(x), 1, 1), **given)


@pytest.mark.parametrize("members", [2, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.95, 1.0])
def test_it_is_the_sum_of_the_paper(members, alpha):
    """(1/M) Σ|x_j − y| − (1 − ε)/(2M(M−1)) ΣΣ|x_j − x_k| with ε = (1 − α)/M."""
    x, y = ensemble(members)
    spread = sum((x[j] - x[k]).abs() for j in range(members) for k in range(members))
    epsilon = (1 - alpha) / members
    by_hand = (x - y).abs().mean(0) - (1 - epsilon) / (2 * members * (members - 1)) * spread
    torch.testing.assert_close(of(x, y, alpha), by_hand.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("alpha", "method"), [(0.0, "ecdf"), (1.0, "fair")])
def test_its_ends_are_the_crps_of_the_package_scores(alpha, method):
    probability = pytest.importorskip("scores.probability", reason="pip install scores")
    xarray = pytest.importorskip("xarray")
    x, y = ensemble(3)
    theirs = probability.crps_for_ensemble(
        xarray.DataArray(x.numpy(), dims=("member", "a", "b", "c")),
        xarray.DataArray(y.numpy(), dims=("a", "b", "c")),
        ensemble_member_dim="member",
        method=method,
    )
    assert of(x, y, alpha).item() == pytest.approx(float(theirs), rel=1e-12)


def test_a_mask_leaves_points_out_and_areas_count_them():
    x, y = ensemble(2)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    areas = torch.linspace(1, 3, 5, dtype=torch.float64)
    of_points = torch.stack([of(x[..., i : i + 1], y[..., i : i + 1], 0.95) for i in range(5)])
    torch.testing.assert_close(of(x, y, 0.95, measure=areas), (of_points * areas).sum() / areas.sum())
    spoiled = torch.where(mask, x, torch.nan).requires_grad_()
    value = of(spoiled, y, 0.95, mask=mask)
    by_channel = [of(x[:, :, c : c + 1, m], y[:, c : c + 1, m], 0.95) for c, m in enumerate(mask)]
    torch.testing.assert_close(value, (3 * by_channel[0] + 4 * by_channel[1]) / 7)
    value.backward()
    assert spoiled.grad.isfinite().all()
    assert (spoiled.grad[:, :, ~mask] == 0).all()


def test_the_gradient_is_the_derivative_of_the_value():
    x, y = ensemble(2)
    assert torch.autograd.gradcheck(lambda p: of(p, y, 0.95), x.requires_grad_())


def test_the_truth_twice_is_perfect_and_alike_members_have_their_absolute_error():
    x, y = ensemble(2)
    assert of(y.expand_as(x), y, 0.95) == 0
    torch.testing.assert_close(of(x[:1].expand_as(x), y, 0.95), (x[0] - y).abs().mean())


def test_a_fair_score_is_smallest_on_average_where_the_members_are_drawn_like_the_truth():
    """Two members of too little, the right and too much spread; 20 000 draws of a normal truth."""
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 20_000, 1, 1)))
    scores = [of(spread * z[:2], z[2], 1.0).item() for spread in (0.5, 1.0, 1.6)]
    assert scores[1] < min(scores[0], scores[2])


def test_a_batch_that_does_not_hold_every_sample_as_often_as_there_are_members_is_refused():
    loss, (x, y) = AlmostFairCRPS(), ensemble(2)
    with pytest.raises(ValueError, match="a batch of 3 does not hold 2 members of each sample"):
        loss(x[0, :3], y[:3])
    with pytest.raises(ValueError, match="the targets of the 2 members differ; hold every sample 2 times"):
        loss(x[0], y)
