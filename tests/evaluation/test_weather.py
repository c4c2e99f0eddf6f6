"""Scores on the sphere, on fields made by hand with known answers and against independent formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import squall
import squall.data
from squall.evaluation import Scoring, evaluate
from squall.evaluation.sphere import EARTH_RADIUS, SphereGrid, great_circle
from squall.evaluation.storms import Storms, cyclonic, find_storms, match_storms, storm_scores
from squall.evaluation.weather import (
    acc,
    area_mean,
    bias,
    climatology,
    event_scores,
    predictability_horizon,
    quantile_curve,
    rmse,
    spectra,
)
from squall.integrators import next_state, rollout

LONGITUDE = np.arange(0.0, 360.0, 7.5)
GAUSS = np.degrees(np.arcsin(np.polynomial.legendre.leggauss(24)[0]))[::-1].copy()


def gaussian_grid(latitude: np.ndarray = GAUSS) -> SphereGrid:
    return SphereGrid(latitude, LONGITUDE)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(grid: SphereGrid) -> torch.Tensor:
    """Points of the grid as unit vectors (3, latitude, longitude)."""
    north, east = torch.from_numpy(np.radians(grid.latitude))[:, None], torch.from_numpy(np.radians(grid.longitude))
    return torch.stack((north.cos() * east.cos(), north.cos() * east.sin(), north.sin().expand(-1, len(east))))


def rotation(seed: int) -> torch.Tensor:
    q, r = torch.linalg.qr(random(seed, 3, 3))
    return q * r.diagonal().sign()


# The grid


def test_areas_of_gaussian_latitudes_integrate_polynomials_of_the_sine_exactly():
    grid = gaussian_grid()
    sine = torch.from_numpy(np.sin(np.radians(GAUSS)))[:, None].expand(24, 48)
    assert area_mean(sine**2, grid.areas).item() == pytest.approx(1 / 3, rel=1e-13)
    assert area_mean(sine**20, grid.areas).item() == pytest.approx(1 / 21, rel=1e-12)


@pytest.mark.parametrize("latitude", [GAUSS, np.linspace(-90, 90, 37)])
def test_a_rotated_field_has_the_same_error_to_quadrature_error(latitude):
    grid = gaussian_grid(latitude)
    x = directions(grid)

    def field(vectors: torch.Tensor) -> torch.Tensor:
        return (vectors[0] * vectors[1] + torch.exp(vectors[2] + vectors[0] / 2))[None, None, None]

    other = field(0.9 * x)
    error = rmse(field(x), other, grid.areas).item()
    for seed in range(3):
        turned = torch.einsum("ij,jyx->iyx", rotation(seed), x)
        assert rmse(field(turned), field(0.9 * turned), grid.areas).item() == pytest.approx(error, rel=2e-3)
    plain = [rmse(field(y), field(0.9 * y), torch.ones(x.shape[1:])).item() for y in (x, x[[2, 0, 1]])]
    assert abs(plain[0] / plain[1] - 1) > 0.02  # without areas it does not


def test_a_rotated_field_has_the_same_weighted_loss_to_quadrature_error():
    grid = gaussian_grid()
    x = directions(grid)

    def field(vectors: torch.Tensor) -> torch.Tensor:
        return (vectors[0] * vectors[1] + torch.exp(vectors[2] + vectors[0] / 2))[None, None]

    def loss(vectors: torch.Tensor, measure: torch.Tensor) -> float:
        return squall.imbalance_aware_loss(field(vectors), field(0.9 * vectors), measure=measure).item()

    expected = loss(x, grid.areas)
    for seed in range(3):
        assert loss(torch.einsum("ij,jyx->iyx", rotation(seed), x), grid.areas) == pytest.approx(expected, rel=5e-3)
    assert abs(loss(x[[2, 0, 1]], torch.ones_like(grid.areas)) / loss(x, torch.ones_like(grid.areas)) - 1) > 0.02


def test_great_circles_are_known_distances():
    assert great_circle(0.0, 0.0, 0.0, 10.0) == pytest.approx(EARTH_RADIUS * math.pi / 18)
    assert great_circle(60.0, 10.0, 60.0, 190.0) == pytest.approx(EARTH_RADIUS * math.pi / 3)
    assert great_circle(0.0, 359.0, 0.0, 1.0) == pytest.approx(EARTH_RADIUS * math.pi / 90)


@pytest.mark.parametrize(
    ("latitude", "longitude", "words"),
    [
        ([10.0, 30.0, 20.0], LONGITUDE, "not in order"),
        ([-95.0, 0.0, 95.0], LONGITUDE, "within ±90"),
        ([-60.0, 0.0, 60.0], LONGITUDE[::-1], "have to rise"),
        ([-60.0, 0.0, 60.0], [0.0, math.nan, 90.0], "not in order"),
    ],
)
def test_a_grid_that_is_no_sphere_is_refused(latitude, longitude, words):
    with pytest.raises(ValueError, match=words):
        SphereGrid(np.array(latitude), np.array(longitude))


def test_longitudes_close_or_do_not():
    assert gaussian_grid().closes
    assert not SphereGrid(GAUSS, LONGITUDE[:-1]).closes
    assert not SphereGrid(GAUSS, np.append(LONGITUDE, 360.0)).closes
    assert SphereGrid(GAUSS, LONGITUDE - 180).closes


def test_the_grid_of_a_source_without_latitudes_says_what_a_sphere_needs():
    source = squall.data.InMemory(torch.zeros(1, 2, 1, 4, 8), dt=1.0)
    with pytest.raises(ValueError, match="latitude and longitude"):
        SphereGrid.of(source)


# Means over the sphere


def test_rmse_bias_and_acc_agree_with_numpy():
    grid, prediction, truth = gaussian_grid(), random(0, 3, 4, 2, 24, 48), random(1, 3, 4, 2, 24, 48)
    climate = random(2, 2, 24, 48)
    weight = grid.areas.numpy() / grid.areas.sum().item()
    p, t, c = prediction.numpy(), truth.numpy(), climate.numpy()
    assert np.allclose(rmse(prediction, truth, grid.areas), np.sqrt(((p - t) ** 2 * weight).sum((3, 4)).mean(0)))
    assert np.allclose(bias(prediction, truth, grid.areas), ((p - t) * weight).sum((3, 4)).mean(0))
    sums = [(x * weight).sum((0, 3, 4)) for x in ((p - c) * (t - c), (p - c) ** 2, (t - c) ** 2)]
    assert np.allclose(acc(prediction, truth, climate, grid.areas), sums[0] / np.sqrt(sums[1] * sums[2]))


def test_acc_is_one_for_the_truth_and_undefined_for_climatology():
    grid, truth = gaussian_grid(), random(1, 3, 4, 2, 24, 48)
    climate = climatology(truth)
    assert torch.allclose(acc(truth, truth, climate, grid.areas), torch.ones(4, 2, dtype=torch.float64))
    assert acc(climate.expand_as(truth), truth, climate, grid.areas).isnan().all()


def test_masked_points_do_not_count_even_as_nan():
    grid, truth = gaussian_grid(), random(1, 1, 2, 1, 24, 48)
    mask = torch.ones(24, 48, dtype=torch.bool)
    mask[:12] = False
    prediction = truth + 1
    prediction[..., :12, :] = math.nan
    assert torch.allclose(rmse(prediction, truth, grid.areas * mask), torch.ones(2, 1, dtype=torch.float64))


def test_quantiles_count_areas():
    grid = gaussian_grid()
    latitude = torch.from_numpy(GAUSS)[:, None].expand(24, 48)
    levels = [0.25, 0.5, 0.75]
    found = quantile_curve(latitude[None], levels, grid.areas)
    exact = [math.degrees(math.asin(2 * level - 1)) for level in levels]  # a share q lies south of this latitude
    assert found.tolist() == pytest.approx(exact, abs=7.5)
    numbers, cells = torch.arange(100.0).reshape(10, 10), torch.ones(10, 10)
    assert quantile_curve(numbers, [0.5, 0.7, 0.9, 0.99, 1.0], cells).tolist() == [49, 69, 89, 98, 99]
    cells[0] = 0
    assert quantile_curve(numbers, [0.0, 1.0], cells).tolist() == [10, 99], "masked points do not count"
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile_curve(latitude[None], [99.0], grid.areas)


def test_events_count_by_area():
    grid = SphereGrid(np.array([60.0, 0.0, -60.0]), np.arange(0.0, 360.0, 90.0))  # areas 0.75, 1.5 and 0.75
    truth, prediction = torch.zeros(2, 1, 1, 3, 4).double()
    truth[0, 0, 1, :2] = prediction[0, 0, 1, 1:3] = 1  # one hit, one miss and one false alarm at the equator
    truth[0, 0, 0, 0] = 1  # a miss of half their size
    truth[0, 0, 2, 0] = prediction[0, 0, 2, 1] = 0.5  # at the threshold, not above it
    scores = event_scores(prediction, truth, grid.areas, threshold=0.5)
    assert scores["hit_rate"] == [pytest.approx(1.5 / 3.75)]
    assert scores["csi"] == [pytest.approx(1.5 / 5.25)]
    assert scores["frequency_bias"] == [pytest.approx(3 / 3.75)]
    with pytest.raises(ValueError, match=r"exceeds the threshold 2; its largest value is 1"):
        event_scores(prediction, truth, grid.areas, threshold=2.0)


# Spectra


def harmonic(grid: SphereGrid) -> torch.Tensor:
    """A pure harmonic of degree 4 and order 3: cos³φ sin φ cos 3λ."""
    north, east = torch.from_numpy(np.radians(grid.latitude))[:, None], torch.from_numpy(np.radians(grid.longitude))
    return (north.cos() ** 3 * north.sin() * (3 * east).cos())[None, None, None]


@pytest.mark.parametrize("latitude", [GAUSS, GAUSS[::-1].copy(), np.linspace(90, -90, 25)])
def test_a_harmonic_has_its_power_at_its_total_wavenumber(latitude):
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    grid = gaussian_grid(latitude)
    u = harmonic(grid)
    result = spectra(0.5 * u, u, grid)
    power = result["power_of_truth"][0, 0]
    assert power.argmax() == 4
    assert power[4] / power.sum() > 1 - 1e-10
    assert power[4].item() == pytest.approx(
        4 * math.pi * area_mean(u.square(), gaussian_grid(latitude).areas).item(), rel=1e-2
    )
    assert result["power_ratio"][0, 0, 4].item() == pytest.approx(0.25)
    assert result["coherence"][0, 0, 4].item() == pytest.approx(1)


def test_a_displaced_harmonic_keeps_its_power_and_loses_coherence():
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    grid = gaussian_grid()
    u = harmonic(grid)
    result = spectra(u.roll(2, -1), u, grid)  # 15 degrees, an eighth of the wave
    assert result["power_ratio"][0, 0, 4].item() == pytest.approx(1)
    assert result["coherence"][0, 0, 4].item() == pytest.approx(math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("latitude", "longitude", "words"),
    [(GAUSS, LONGITUDE[:-1], "do not close"), (np.linspace(-80, 80, 24), LONGITUDE, "neither Gaussian")],
)
def test_spectra_of_a_part_of_the_sphere_are_refused(latitude, longitude, words):
    with pytest.raises(ValueError, match=words):
        SphereGrid(latitude, longitude).harmonics(torch.zeros(len(latitude), len(longitude)))


# Storms


def storm(grid: SphereGrid, *centres: tuple[float, float, float], radius: float = 500) -> torch.Tensor:
    """Gaussian hills: (latitude, longitude, height)."""
    field = np.zeros((len(grid.latitude), len(grid.longitude)))
    for latitude, longitude, height in centres:
        away = great_circle(grid.latitude[:, None], grid.longitude[None], latitude, longitude)
        field += height * np.exp(-((away / radius) ** 2))
    return torch.from_numpy(field)


FINE = SphereGrid(np.arange(89.0, -90.0, -2.0), np.arange(0.0, 360.0, 2.0))


def test_centres_are_found_across_the_date_line_and_the_stronger_of_two_counts():
    field = storm(FINE, (45, 0, 5.0), (45, 100, 3.0), (51, 100, 2.5), (-31, 358, 4.0), radius=250)
    near, apart = find_storms(field, FINE, 1.0), find_storms(field, FINE, 1.0, separation=600)
    assert (near.latitude.tolist(), near.longitude.tolist()) == ([45, -31, 45], [0, 358, 100])
    assert near.intensity.tolist() == pytest.approx([5.0, 4.0, 3.0], abs=0.02)
    assert (apart.latitude.tolist(), apart.longitude.tolist()) == ([45, -31, 45, 51], [0, 358, 100, 100])


def test_one_storm_at_the_seam_is_one_storm():
    assert len(find_storms(storm(FINE, (45, 359, 5.0)), FINE, 1.0)) == 1


def test_storms_are_matched_missed_and_false():
    truth = Storms(np.array([45.0, 10.0, -40.0]), np.array([0.0, 90.0, 200.0]), np.array([5.0, 3.0, 2.0]))
    forecast = Storms(np.array([45.0, -40.0, 70.0]), np.array([356.0, 205.0, 90.0]), np.array([4.0, 2.5, 3.0]))
    match = match_storms(forecast, truth)
    degree = EARTH_RADIUS * math.pi / 180
    chord = 2 * EARTH_RADIUS * math.asin(math.cos(math.radians(45)) * math.sin(math.radians(2)))
    assert sorted(match.distance)[0] == pytest.approx(chord)
    assert max(match.distance) < 5 * degree
    assert sorted(match.intensity) == pytest.approx([-1.0, 0.5])
    assert (match.missed, match.false_alarms) == (1, 1)


def test_as_many_storms_as_possible_are_matched():
    """The nearest pair first would leave one storm alone: 0-1 is near, 0-2 is too far."""
    truth = Storms(np.zeros(2), np.array([0.0, 6.0]), np.ones(2))
    forecast = Storms(np.zeros(2), np.array([5.0, 13.0]), np.ones(2))
    match = match_storms(forecast, truth, within=800)
    assert (len(match.distance), match.missed) == (2, 0)


def test_scores_of_storms_by_lead_time():
    truth = torch.stack([storm(FINE, (45, 10, 5.0), (-31, 80, 4.0)), storm(FINE, (45, 14, 5.0), (-31, 84, 4.0))])[None]
    late = torch.stack([truth[0, 0], storm(FINE, (45, 10, 4.0), (60, 200, 3.0))])[None]
    scores = storm_scores(late, truth, FINE, threshold=2.0)
    assert scores["hits"] == [2, 1]
    assert scores["missed"] == [0, 1]
    assert scores["false_alarms"] == [0, 1]
    assert scores["csi"] == [1.0, pytest.approx(1 / 3)]
    chord = 2 * EARTH_RADIUS * math.asin(math.cos(math.radians(45)) * math.sin(math.radians(2)))
    assert scores["position_error"] == [0.0, pytest.approx(chord)]
    assert scores["intensity_bias"] == [0.0, pytest.approx(-1.0, abs=0.05)]


def test_a_threshold_that_no_point_passes_names_the_largest_value():
    truth = storm(FINE, (45, 10, 5.0))[None, None]
    with pytest.raises(ValueError, match=r"reaches the storm threshold 9.*largest value is (4\.9|5)"):
        storm_scores(truth, truth, FINE, threshold=9.0)


def test_a_diverged_forecast_misses_all_storms():
    truth = storm(FINE, (45, 10, 5.0))[None, None]
    scores = storm_scores(torch.full_like(truth, math.nan), truth, FINE, threshold=2.0)
    assert (scores["missed"], scores["position_error"]) == ([1], [None])


def test_cyclones_of_both_hemispheres_are_positive():
    vorticity = torch.from_numpy(np.sign(GAUSS))[:, None].expand(24, 48)
    assert (cyclonic(vorticity, gaussian_grid()) == 1).all()


# Predictability


def test_twins_that_drift_apart_linearly_have_their_horizon():
    grid = gaussian_grid()
    first = random(0, 200, 1, 1, 24, 48).expand(200, 6, 1, 24, 48)  # standard deviation 1
    twin = first + torch.arange(6.0).double().reshape(6, 1, 1, 1) * 0.2
    horizon = predictability_horizon(first, twin, grid.areas, dt=6.0)
    assert horizon.tolist() == [18.0]  # 0.6 ≤ √2 / 2 < 0.8
    assert predictability_horizon(first, first, grid.areas, dt=6.0).tolist() == [math.inf]


# In an evaluation


def weather(trajectories: int = 3, steps: int = 5) -> squall.data.InMemory:
    """Two fields of drifting bumps on the sphere, of which the second is called vorticity."""
    grid = gaussian_grid()
    smooth = torch.nn.functional.avg_pool2d(random(5, trajectories * 2, 24, 48), 3, 1, 1).reshape(-1, 1, 2, 24, 48)
    states = torch.cat([torch.roll(smooth, time, -1) for time in range(steps + 1)], 1) + 0.01 * random(6, 1, 2, 24, 48)
    return squall.data.InMemory(
        states,
        dt=6.0,
        fields=("height", "vorticity"),
        axes=("latitude", "longitude"),
        coordinates=(GAUSS, LONGITUDE),
        boundary=("wall", "periodic"),
        measure=grid.areas,
    )


def damped(u):
    return 0.9 * torch.roll(u, 1, -1)


def test_an_evaluation_on_the_sphere_has_the_scores_of_the_functions():
    source, grid = weather(), gaussian_grid()
    found = evaluate(damped, source, integrator=next_state, scoring=Scoring(storms="vorticity", storm_share=0.99))
    truth = source.read().double()
    forecast = rollout(next_state, damped, truth[:, 0], 6.0, 5)
    expected = acc(forecast[:, 1:], truth[:, 1:], climatology(truth), grid.areas)
    for i, name in enumerate(source.fields):
        assert found.curves["acc"][name] == pytest.approx(expected[:, i].tolist())
    strength, here = (cyclonic(u[:, 1:, 1], grid) for u in (truth, forecast))
    storms = storm_scores(here, strength, grid, found.scores["storms"]["threshold"])
    assert found.curves["storms"] == storms
    assert found.scores["storms"]["hits"] == sum(storms["hits"]) > 0
    level = quantile_curve(cyclonic(truth[:, :, 1], grid), [0.99], grid.areas).item()
    assert found.scores["storms"]["threshold"] == pytest.approx(level, rel=0.05)
    stays = cyclonic(truth[:, :1, 1], grid).expand_as(strength)
    persistent = storm_scores(stays, strength, grid, found.scores["storms"]["threshold"])
    assert found.baselines["persistence"]["storms"]["hits"] == sum(persistent["hits"])
    assert found.to_xarray()["storm_csi"].values == pytest.approx([math.nan if x is None else x for x in storms["csi"]])


def test_storms_are_lows_of_a_field_with_a_minus_before_it():
    source = weather()
    turned = squall.data.InMemory.described(-source.read(), source.description, source)
    high, low = (
        evaluate(damped, x, integrator=next_state, scoring=Scoring(storms=name)).scores["storms"]
        for x, name in ((source, "height"), (turned, "-height"))
    )
    assert {**high, "field": "-height"} == low


@pytest.mark.parametrize(("called", "cyclonic"), [("vo_500", True), ("volume", False)])
def test_only_the_vorticity_turns_its_sign_with_the_hemisphere(called, cyclonic):
    source = weather()
    about = dataclasses.replace(source.description, fields=(called, "vorticity"))
    renamed = squall.data.InMemory.described(source.read(), about, source)
    scores = [
        evaluate(damped, x, integrator=next_state, scoring=Scoring(storms=x.fields[0])).scores["storms"]
        for x in (source, renamed)
    ]
    assert (scores[0]["threshold"] != scores[1]["threshold"]) == cyclonic


def test_storms_of_an_unknown_field_or_off_the_sphere_are_refused():
    with pytest.raises(squall.data.DataError, match="no field 'rain': the data have height, vorticity"):
        evaluate(damped, weather(), integrator=next_state, scoring=Scoring(storms="rain"))
    plane = squall.data.InMemory(random(0, 2, 4, 1, 6, 6), dt=1.0)
    with pytest.raises(squall.data.DataError, match="storms need latitude and longitude"):
        evaluate(damped, plane, integrator=next_state, scoring=Scoring(storms=plane.fields[0]))
