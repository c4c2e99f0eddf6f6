"""What the moments of one pass say about other temperatures, and how they are put together, against float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from squall.losses.fused_cpu import BlockPasses, SmallPasses
from squall.losses.fused_numba import CompiledPasses
from squall.losses.sums import Moments, Sums
from squall.losses.tilting import Tilting

from . import oracle

RNG = np.random.default_rng(0)
ERRORS = {
    "Gaussian": RNG.normal(size=4000) ** 2,
    "ruled by one": np.append(0.01 * RNG.normal(size=4000) ** 2, 3.0),
    "log-normal": (RNG.normal(size=4000) * np.exp(0.7 * RNG.normal(size=4000))) ** 2,
    "nearly equal": 1 + 0.01 * RNG.random(4000),
    "late": np.where(np.arange(4000) < 3000, 0.0, RNG.normal(size=4000) ** 2),
    "two values": np.where(np.arange(4000) < 3, 2.0, 0.0),
}


def moments(values: np.ndarray, beta: float, count: int = 14, span: float | None = None) -> Sums:
    """The sums over points, as the definition has them."""
    z = beta * values
    top = z.max()
    span = span or top
    angles, e = np.arccos(np.clip(2 * z / span - 1, -1, 1)), np.exp(z - top)
    once, twice = (np.cos(np.outer(np.arange(n), angles)) @ f for n, f in ((count, e), (3, e * e)))
    return Sums.of_moments(len(z), float(top), float(z.sum()), Moments(float(span), once, twice))


def tilted(values: np.ndarray, beta: float) -> tuple[float, float, float]:
    z = beta * values
    weights = oracle.weights(values, beta)
    mean = weights @ values
    return z.max() + math.log(np.exp(z - z.max()).mean()), mean, weights @ (values - mean) ** 2


@pytest.mark.parametrize("passes", [SmallPasses, BlockPasses, CompiledPasses])
@pytest.mark.parametrize("name", ERRORS)
def test_the_passes_sum_what_is_defined(name, passes):
    roots = torch.from_numpy(np.sqrt(ERRORS[name]))
    beta = 4 / ERRORS[name].max()
    found = passes(roots, torch.zeros_like(roots)).sweep(beta, (9, 3))
    expected = moments(ERRORS[name], beta, 9, found.moments.span)
    for field in ("count", "top", "plain", "zeroth", "first", "squares"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-12)
    assert found.moments.once == pytest.approx(expected.moments.once, abs=1e-11 * found.zeroth)
    assert found.moments.twice == pytest.approx(expected.moments.twice, abs=1e-11 * found.squares)


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 12.0])
@pytest.mark.parametrize("name", ERRORS)
def test_the_error_is_below_its_bound(name, sharpness):
    """And the bound is small where it has to be: within a factor of two of β at a sharpness of 4."""
    values, near = ERRORS[name], Tilting()
    beta = sharpness / values.max()
    near.add(moments(values, beta), beta)
    for factor in np.geomspace(0.05, 8, 60):
        (log_partition, mean, variance), bound = near.near(factor * beta)
        expected = tilted(values, factor * beta)
        assert abs(mean / expected[1] - 1) <= bound + 1e-12
        assert abs(log_partition - expected[0]) <= bound + 1e-12
        if bound < 1e-8:
            assert variance == pytest.approx(expected[2], rel=1e-3, abs=1e-9 * expected[1] ** 2)
        if sharpness <= 4 and 0.5 < factor < 1.6:
            assert bound < 2e-6


def test_the_best_of_several_passes_is_taken():
    values, near = ERRORS["Gaussian"], Tilting()
    for beta in (0.1, 0.3):
        near.add(moments(values, beta, 8), beta)
    alone = Tilting()
    alone.add(moments(values, 0.1, 8), 0.1)
    for beta in (0.1, 0.2, 0.3, 0.6):
        assert near.error(beta) <= alone.error(beta)
        assert near(beta).mean == pytest.approx(tilted(values, beta)[1], rel=near.error(beta) + 1e-12)
    assert near.error(0.1) == near.error(0.3) == 0


@pytest.mark.parametrize(("start", "beta"), [(0.2, 100.0), (100.0, 1e-3)])
def test_far_away_there_is_a_tangent_and_no_promise(start, beta):
    values, near = ERRORS["Gaussian"], Tilting()
    near.add(moments(values, start), start)
    (log_partition, mean, _), bound = near.near(beta)
    assert bound == math.inf
    assert any(mean == pytest.approx(tilted(values, centre)[1]) for centre in (start, 2 * start))
    assert log_partition <= tilted(values, beta)[0]


def test_parts_of_different_spans_are_merged():
    values, beta = ERRORS["log-normal"], 0.2
    parts = [moments(part, beta) for part in np.split(values, 8)]
    assert len({part.moments.span for part in parts}) == 8
    merged, whole = Sums.merged(parts), moments(values, beta)
    assert merged.moments.span == whole.moments.span
    assert merged.moments.once == pytest.approx(whole.moments.once, abs=1e-12 * whole.zeroth)
    assert merged.moments.twice == pytest.approx(whole.moments.twice, abs=1e-12 * whole.squares)
    for field in ("count", "top", "plain", "zeroth", "first", "squares"):
        assert getattr(merged, field) == pytest.approx(getattr(whole, field), rel=1e-12)
    plain = Sums(4, 1.0, 2.0, 3.0, 1.0, 2.0)
    assert Sums.merged([*parts, plain]).moments is None


def test_the_heaviest_point_of_all_parts_is_found():
    z, measure = 0.3 * ERRORS["Gaussian"], RNG.random(4000)

    def heaviest(part: slice) -> Sums:
        e = measure[part] * np.exp(z[part] - z[part].max())
        below = z[part].max() - z[part][e.argmax()]
        return Sums(len(e), z[part].max().item(), 1.0, 1.0, 1.0, 1.0, None, e.max().item(), below.item())

    measure[z.argmax() // 500 * 500 :][:500] *= 1e-6  # so that the heaviest is in another part than the largest
    merged, whole = Sums.merged([heaviest(slice(k, k + 500)) for k in range(0, 4000, 500)]), heaviest(slice(None))
    assert whole.heaviest_below > 0
    for field in ("top", "heaviest", "heaviest_below"):
        assert getattr(merged, field) == pytest.approx(getattr(whole, field), rel=1e-12)


@pytest.mark.parametrize("sums", [moments(ERRORS["Gaussian"], 0.3), Sums(4, 1.0, 2.0, 3.0, 1.0, 2.0, None, 1.5, 0.5)])
def test_numbers_are_sent_and_received(sums):
    found = Sums.of_numbers(sums.numbers())
    assert replace(found, moments=None) == replace(sums, moments=None)
    for mine, theirs in zip(found.moments or (), sums.moments or (), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_points_without_an_error_are_taken_off():
    values, beta = ERRORS["Gaussian"], 0.2
    hidden = moments(np.append(values, np.zeros(500)), beta).without_zeros(500)
    expected = moments(values, beta)
    assert hidden.moments.once == pytest.approx(expected.moments.once, abs=1e-12 * expected.zeroth)
    assert hidden.moments.twice == pytest.approx(expected.moments.twice, abs=1e-12 * expected.squares)
    assert (hidden.count, hidden.first) == (expected.count, pytest.approx(expected.first))
