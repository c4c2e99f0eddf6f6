"""AMSE and binned spectra against sums over waves written out by hand, and the laws that they keep."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from squall.losses.rivals import AMSE, BinnedSpectral, SphericalAMSE
from squall.losses.rivals.base import points
from squall.losses.rivals.spectra import by_shell, power, shells, transform

from .cases import fields

SHAPES = [(9,), (8,), (6, 8), (8, 6), (5, 7), (4, 6, 5)]


def waves(u: np.ndarray) -> dict[tuple[int, ...], complex]:
    """û by the definition, of all whole wave vectors (no conjugate is left out), the mean over the grid."""
    places = list(itertools.product(*(range(n) for n in u.shape)))
    found = {}
    for k in itertools.product(*(range(-(n // 2), n - n // 2) for n in u.shape)):
        phases = [sum(a * b / n for a, b, n in zip(k, x, u.shape, strict=True)) for x in places]
        found[k] = sum(u[x] * np.exp(-2j * math.pi * phase) for x, phase in zip(places, phases, strict=True)) / u.size
    return found


def by_hand(prediction: np.ndarray, target: np.ndarray, geometric: bool) -> float:
    """The published sum over shells; with the geometric mean of P and Q for their maximum, the sibling."""
    spectra = waves(prediction), waves(target)
    shape, bins = target.shape, {}
    for k in spectra[0]:
        size = max(shape) * math.sqrt(sum((a / n) ** 2 for a, n in zip(k, shape, strict=True)))
        bins.setdefault(round(size), []).append(k)
    total = 0.0
    for members in bins.values():
        u, v = (np.array([spectrum[k] for k in members]) for spectrum in spectra)
        p, q = (abs(u) ** 2).sum(), (abs(v) ** 2).sum()
        coherence = (u * v.conj()).sum().real / math.sqrt(p * q)
        factor = math.sqrt(p * q) if geometric else max(p, q)
        total += (math.sqrt(p) - math.sqrt(q)) ** 2 + 2 * factor * (1 - coherence)
    return total


@pytest.mark.parametrize("space", SHAPES, ids=str)
def test_amse_is_the_published_sum_and_its_sibling_is_mse(space):
    prediction, target = (x.detach() for x in fields(1, 1, *space))
    u, v = prediction[0, 0].numpy(), target[0, 0].numpy()
    assert AMSE()(prediction, target).item() == pytest.approx(by_hand(u, v, geometric=False), rel=1e-12)
    assert by_hand(u, v, geometric=True) == pytest.approx(((u - v) ** 2).mean(), rel=1e-12)


@pytest.mark.parametrize("space", SHAPES, ids=str)
def test_powers_of_the_shells_add_up_to_the_mean_square(space):
    """The sibling is the sum of E_k as the code has it: MSE."""
    prediction, target = (x.detach() for x in fields(2, 3, *space))
    error = prediction - target
    sums = by_shell(power(transform(error)), *shells(space)).sum(-1)
    torch.testing.assert_close(sums, error.square().flatten(2).mean(2), rtol=1e-12, atol=0)


def test_amse_is_the_mean_over_samples_and_channels():
    prediction, target = (x.detach() for x in fields(2, 3, 8))
    values = [AMSE()(prediction[b : b + 1, c : c + 1], target[b : b + 1, c : c + 1]) for b in (0, 1) for c in (0, 1, 2)]
    torch.testing.assert_close(AMSE()(prediction, target), torch.stack(values).mean(), rtol=1e-12, atol=0)


def test_amse_is_at_least_mse_and_equal_to_it_where_only_amplitudes_differ():
    for seed in range(20):
        prediction, target = (x.detach() for x in fields(2, 1, 16, seed=seed))
        assert AMSE()(prediction, target) >= (prediction - target).square().mean()
    torch.testing.assert_close(AMSE()(0.6 * target, target), (0.4 * target).square().mean(), rtol=1e-12, atol=0)


def test_scales_with_next_to_no_power_count_as_in_mse():
    x = torch.arange(32, dtype=torch.float64) * (2 * math.pi / 32)
    strong, weak = x.sin().reshape(1, 1, -1), 1e-4 * (5 * x).sin().reshape(1, 1, -1)
    prediction, target = strong - weak, strong + weak
    torch.testing.assert_close(AMSE()(prediction, target), 4 * weak.square().mean(), rtol=1e-9, atol=0)


def test_amse_does_not_reward_smoothing_what_cannot_be_placed():
    """A wave at a random phase: MSE is best at amplitude 0, AMSE is no better there than at full amplitude."""
    x = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    target = torch.stack([(3 * x + phase).sin() for phase in torch.arange(8) * (math.pi / 4)]).unsqueeze(1)
    wave = (3 * x).sin().expand(8, 1, -1)
    mse, amse = (
        [loss(a * wave, target).item() for a in (0.2, 0.6, 1.0)] for loss in (torch.nn.functional.mse_loss, AMSE())
    )
    assert mse == sorted(mse)
    assert amse == sorted(amse, reverse=True)


def test_amse_does_not_change_where_both_are_shifted_or_turned():
    prediction, target = (x.detach() for x in fields(2, 1, 8, 8))
    value = AMSE()(prediction, target)
    for move in (lambda u: u.roll((3, 5), (2, 3)), lambda u: u.rot90(1, (2, 3)), lambda u: u.transpose(2, 3)):
        torch.testing.assert_close(AMSE()(move(prediction), move(target)), value, rtol=1e-12, atol=0)


def test_amse_keeps_its_digits_for_a_good_prediction_in_float32():
    prediction, target = (x.detach() for x in fields(2, 1, 64))
    close = target + 1e-5 * prediction
    exact = AMSE()(close, target)
    single = AMSE()(close.float(), target.float())
    rounded = AMSE()(close.float().double(), target.float().double())
    torch.testing.assert_close(single.double(), rounded, rtol=1e-4, atol=0)
    assert exact > 0


def test_a_constant_error_is_seen_as_it_is():
    _, target = fields(1, 1, 8)
    target = target - target.mean() + 2
    assert AMSE()(target + 0.5, target).item() == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(("space", "bins"), [((32,), 4), ((8, 8), 3), ((6, 10), 32)])
def test_binned_power_is_the_published_sum(space, bins):
    prediction, target = (x.detach() for x in fields(1, 1, *space))
    u, v = prediction[0, 0].numpy(), target[0, 0].numpy()
    spectra, count = (waves(u), waves(v)), min(bins, max(space) // 2)
    sizes = {k: math.sqrt(sum((a / n) ** 2 for a, n in zip(k, space, strict=True))) for k in spectra[0]}
    largest = max(sizes.values())
    members: dict[int, list] = {}
    for k, size in sizes.items():
        members.setdefault(min(count - 1, int(size / largest * count)), []).append(k)
    assert len(members) == count
    means = [[np.mean([abs(spectrum[k]) ** 2 for k in members[b]]) for b in range(count)] for spectrum in spectra]
    off = np.mean([(1 - p / q) ** 2 for p, q in zip(*means, strict=True)])
    value = BinnedSpectral(bins=bins, mu=0.7)(prediction, target).item()
    assert value == pytest.approx(((u - v) ** 2).mean() + 0.7 * off, rel=1e-5)


def test_binned_power_knows_no_phase():
    _, target = fields(2, 1, 32)
    moved = target.roll(5, 2)
    torch.testing.assert_close(BinnedSpectral()(moved, target), (moved - target).square().mean())


def test_a_bin_without_power_is_finite():
    target = torch.arange(16.0).mul(2 * math.pi / 16).sin().reshape(1, 1, 16)
    prediction = (2 * target).requires_grad_()
    BinnedSpectral()(prediction, target).backward()
    assert prediction.grad.isfinite().all()


def test_more_than_three_axes_of_space_are_refused():
    with pytest.raises(ValueError, match=r"1 to 3 axes of space; got \[1, 1, 2, 2, 2, 2\]"):
        AMSE()(torch.ones(1, 1, 2, 2, 2, 2), torch.ones(1, 1, 2, 2, 2, 2))


def test_without_torch_harmonics_the_sphere_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_harmonics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'squall\[sphere\]'"):
        SphericalAMSE()


def harmonic(degree: int, order: int, latitudes: int, longitudes: int) -> torch.Tensor:
    """A real spherical harmonic on Gaussian latitudes from the north, of mean square 1 over the sphere."""
    from scipy.special import sph_harm_y

    theta = np.arccos(np.polynomial.legendre.leggauss(latitudes)[0])[::-1].copy()
    phi = 2 * np.pi * np.arange(longitudes) / longitudes
    y = sph_harm_y(degree, order, theta[:, None], phi).real * math.sqrt(4 * math.pi * (2 if order else 1))
    return torch.from_numpy(y).reshape(1, 1, latitudes, longitudes)


def test_on_the_sphere_amse_is_the_sum_over_degrees():
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    a, b, c = (harmonic(*lm, 16, 32) for lm in ((2, 1), (2, 2), (5, 0)))
    target, prediction = 2 * a + b, a + b + 0.5 * c
    # Degree 2: P = 2, Q = 5, Re<u, v> = 3. Degree 5: P = 1/4, Q = 0: no coherence, so the error's power, 1/4.
    p, q, product = 2.0, 5.0, 3.0
    expected = (math.sqrt(p) - math.sqrt(q)) ** 2 + 2 * max(p, q) * (1 - product / math.sqrt(p * q))
    value = SphericalAMSE(grid="legendre-gauss")(prediction, target).item()
    assert value == pytest.approx(expected + 0.25, rel=1e-6)


def test_on_the_sphere_the_sibling_is_the_mean_square_over_the_area():
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    error = harmonic(3, 2, 16, 32) + 2 * harmonic(4, 0, 16, 32) + 0.5
    area = torch.from_numpy(np.polynomial.legendre.leggauss(16)[1]).reshape(16, 1)
    batch = points(error, torch.zeros_like(error), None, None)
    coefficients, _, shell, times = SphericalAMSE(grid="legendre-gauss").spectra(batch)
    sibling = by_shell(power(coefficients), shell, times).sum()
    mean = (error.square() * area).sum() / (32 * area.sum())
    torch.testing.assert_close(sibling, mean, rtol=1e-10, atol=0)


def test_on_the_sphere_each_lead_time_has_a_spectrum_of_its_own():
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    a, b = harmonic(2, 1, 16, 32), harmonic(3, 0, 16, 32)
    loss = SphericalAMSE(grid="legendre-gauss")
    one, two = loss(a, a + b), loss(b, 2 * a)
    both = loss(torch.stack((a, b), 2), torch.stack((a + b, 2 * a), 2))
    torch.testing.assert_close(both, (one + two) / 2)


def test_on_the_sphere_the_areas_of_the_data_are_taken_and_other_measures_refused():
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    a, b = harmonic(2, 1, 16, 32), harmonic(3, 0, 16, 32)
    areas = torch.from_numpy(np.polynomial.legendre.leggauss(16)[1]).reshape(16, 1).expand(16, 32)
    loss = SphericalAMSE(grid="legendre-gauss")
    assert loss(a, b, measure=areas) == loss(a, b)
    with pytest.raises(ValueError, match="measure is not the areas of the cells of a grid 'legendre-gauss'"):
        loss(a, b, measure=torch.ones(16, 32))
