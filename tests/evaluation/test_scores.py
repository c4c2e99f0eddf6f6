"""Scores against independent formulas in NumPy, SciPy or by hand."""

import math

import numpy as np
import pytest
import torch

import squall.evaluation.rolling
import squall.evaluation.scores
from squall.data import DataError, InMemory
from squall.evaluation import Scoring, evaluate
from squall.evaluation.basin import basin_spectrum
from squall.evaluation.scores import BANDS, contingency_scores, shells, spectrum, valid_time
from squall.integrators import euler, next_state, rollout

DT = 0.1


def truth(trajectories: int = 4, channels: int = 2, space: tuple[int, ...] = (16,), steps: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(trajectories, channels, *space, dtype=torch.float64, generator=generator)
    return rollout(euler, lambda u: -u + 0.2 * torch.roll(u, 1, -1), first, DT, steps)


def model(u):
    return -0.8 * u


def test_relative_errors_and_correlations_against_numpy():
    u = truth(7)
    found = evaluate(model, InMemory(u, dt=DT))
    v, w = rollout(euler, model, u[:, 0], DT, 10)[:, 1:].numpy(), u[:, 1:].numpy()
    for i, name in enumerate(("u0", "u1")):
        a, b = v[:, :, i], w[:, :, i]
        each = np.sqrt(((a - b) ** 2).sum((1, 2)) / (b**2).sum((1, 2)))
        assert found.scores["nrmse"][name] == pytest.approx(each.mean())
        assert found.scores["nrmse_p99"][name] == pytest.approx(each.max())
        at_each_time = np.sqrt(((a - b) ** 2).sum(2) / (b**2).sum(2)).mean(0)
        assert found.curves["nrmse"][name] == pytest.approx(at_each_time)
        expected = np.mean(
            [[np.corrcoef(p, t)[0, 1] for p, t in zip(*x, strict=True)] for x in zip(a, b, strict=True)], 0
        )
        assert found.curves["correlation"][name] == pytest.approx(expected)


def test_a_forecast_is_valid_until_it_first_crosses_the_limit():
    curve = torch.tensor([[0.9, 0.85, 0.7, 0.95], [0.9, 0.9, 0.9, 0.9], [0.1, 1.0, 1.0, 1.0]])[..., None]
    assert valid_time(curve, 0.8, 0.5, above=True).flatten().tolist() == [1.0, 2.0, 0.0]
    assert valid_time(torch.tensor([0.1, math.nan, 0.1]).reshape(1, 3, 1), 0.4, 1.0, above=False).item() == 1


@pytest.mark.parametrize(("end", "areas"), [("periodic", False), ("wall", False), ("wall", True)])
def test_the_bands_hold_the_power_of_their_waves_by_the_fast_fourier_transform_of_numpy(end, areas):
    """Of anomalies times a Hann window along an axis with walls, and times the root of the areas."""
    rng = np.random.default_rng(0)
    area = np.linspace(0.5, 1.5, 120).reshape(12, 10)
    weight = np.hanning(14)[1:-1, None] if end == "wall" else np.ones(1)
    weight, measure = (weight * np.sqrt(area), torch.tensor(area)) if areas else (weight, None)
    u, v = rng.normal(size=(2, 1, 1, 1, 12, 10))
    spacing = (0.5, 0.6)  # one side of 6, like the other
    sums = spectrum(torch.tensor(v), torch.tensor(u), spacing, (end, "periodic"), measure)[:, 0, 0, 0]
    a, b = (np.fft.fft2((x[0, 0, 0] - x.mean()) * weight) / x[0, 0, 0].size for x in (v, u))
    k = 6 * np.hypot(np.fft.fftfreq(12, 0.5)[:, None], np.fft.fftfreq(10, 0.6)[None])
    edges = [1, 5 ** (1 / 3), 5 ** (2 / 3), np.inf]  # 5 waves are what the coarser axis resolves
    for j in range(len(BANDS)):
        inside = (k >= edges[j] - 1e-9) & (k < edges[j + 1] - 1e-9)
        expected = [np.sum(abs(a[inside]) ** 2), np.sum(abs(b[inside]) ** 2), np.sum((a * b.conj())[inside].real)]
        assert sums[:, j].tolist() == pytest.approx(expected, rel=1e-5)  # the window is in single precision
    assert sums[1].sum().item() == pytest.approx(((u[0, 0, 0] - u.mean()) * weight).var(), rel=1e-5)  # Parseval


def test_damped_short_waves_are_in_the_high_band():
    x = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
    long, short = torch.sin(x), torch.cos(20 * x)
    u = (long + short).expand(2, 3, 1, 64).clone()
    found = evaluate(lambda u: long + 0.5 * short.expand_as(u), InMemory(u, dt=1.0), integrator=next_state)
    bands = found.scores["spectrum"]["u"]
    assert bands["low"]["power_ratio"] == pytest.approx(1)
    assert bands["high"]["power_ratio"] == pytest.approx(0.25)
    assert bands["high"]["coherence"] == pytest.approx(1)
    assert found.curves["power_ratio"]["high"]["u"] == pytest.approx([0.25, 0.25])


def test_waves_out_of_phase_have_power_but_no_coherence():
    x = torch.arange(32, dtype=torch.float64) * 2 * math.pi / 32
    u = torch.sin(x).expand(1, 3, 1, 32).clone()
    found = evaluate(lambda u: torch.cos(x).expand_as(u), InMemory(u, dt=1.0), integrator=next_state)
    assert found.scores["spectrum"]["u"]["low"] == pytest.approx({"power_ratio": 1, "coherence": 0}, abs=1e-12)


def test_every_wave_but_the_mean_is_in_a_band_once():
    for space, spacing in (((8,), (1.0,)), ((6, 9), (1.0, 0.5)), ((4, 6, 5), (1.0, 1.0, 2.0))):
        band, times = shells(space, spacing)
        assert times[band >= 0].sum() == math.prod(space) - 1
        assert set(band.tolist()) <= {-1, 0, 1, 2}


def test_scores_of_events_by_hand():
    scores = contingency_scores(30, 10, 20, 940)
    H, F = 0.75, 20 / 960
    expected = (math.log(F) - math.log(H) - math.log(1 - F) + math.log(1 - H)) / (
        math.log(F) + math.log(H) + math.log(1 - F) + math.log(1 - H)
    )
    assert scores == pytest.approx(
        {"hit_rate": H, "false_alarm_rate": F, "csi": 0.5, "frequency_bias": 1.25, "sedi": expected}
    )
    chance = contingency_scores(10, 90, 90, 810)  # of a forecast that knows nothing
    assert chance["sedi"] == pytest.approx(0, abs=1e-12)
    assert contingency_scores(0, 0, 5, 95)["hit_rate"] is None


def test_events_of_a_rollout_against_numpy():
    u = truth(6)
    found = evaluate(model, InMemory(u, dt=DT), scoring=Scoring(events={"u0": 0.4})).scores["events"]
    assert found.keys() == {"u0"}
    a, b = rollout(euler, model, u[:, 0], DT, 10)[:, 1:, 0].numpy(), u[:, 1:, 0].numpy()
    here, there = b > 0.4, a > 0.4
    assert found["u0"]["hit_rate"] == pytest.approx((here & there).sum() / here.sum())
    assert found["u0"]["csi"] == pytest.approx((here & there).sum() / (here | there).sum())
    assert found["u0"]["frequency_bias"] == pytest.approx(there.sum() / here.sum())
    mean = u[:, :-1, 0].mean().item()
    assert found["u0"]["relative_intensity"] == pytest.approx((a[here] - mean).sum() / (b[here] - mean).sum())


def test_the_threshold_of_events_is_a_quantile_of_the_truth():
    u = truth(6)
    found = evaluate(model, InMemory(u, dt=DT), scoring=Scoring(events=0.9)).scores["events"]
    assert found["u1"]["threshold"] == pytest.approx(np.quantile(u[:, :-1, 1].numpy(), 0.9))


def test_conserved_quantities_of_ones_own_and_of_fields():
    u = truth(3)
    scoring = Scoring(conserved={"total": "u1", "square": lambda u: u.square().sum((1, 2))})
    found = evaluate(model, InMemory(u, dt=DT, lengths=8.0), scoring=scoring)
    v = rollout(euler, model, u[:, 0], DT, 10).numpy()
    total, true = v[:, :, 1].sum(-1) * 0.5, u[:, :, 1].numpy().sum(-1) * 0.5
    assert found.scores["conserved"]["total"] == pytest.approx(
        {
            "error": ((total - true)[:, 1:] ** 2).mean(),
            "drift": np.sqrt(((total[:, -1] - total[:, 0]) ** 2).mean()),
            "drift_of_truth": np.sqrt(((true[:, -1] - true[:, 0]) ** 2).mean()),
        }
    )
    square = (v**2).sum((2, 3))
    assert found.curves["conserved"]["square"][-1] == pytest.approx(
        np.sqrt(((square[:, -1] - square[:, 0]) ** 2).mean())
    )


def test_a_diverged_rollout_leaves_no_number():
    found = evaluate(lambda u: 1e3 * u.abs() ** 3, InMemory(truth(3), dt=DT)).scores
    assert found["nrmse"] == {"u0": None, "u1": None}
    assert found["events"]["u0"]["csi"] is None
    assert found["spectrum"]["u0"]["high"] == {"power_ratio": None, "coherence": None}
    assert found["valid_time"]["nrmse"]["u0"] < 1


def test_scores_leave_masked_points_out():
    u = truth(4)
    sea = torch.ones(16, dtype=torch.bool)
    sea[2:7] = False
    pick = Scoring(events=0.9, conserved={"total": "u0"})
    masked = evaluate(model, InMemory(u.masked_fill(~sea, 5.0), dt=DT, mask=sea, lengths=16.0), scoring=pick).scores
    alone = evaluate(
        model,
        InMemory(u[..., sea], dt=DT, lengths=11.0),
        scoring=Scoring(events={"u0": masked["events"]["u0"]["threshold"]}, conserved={"total": "u0"}),
    ).scores
    assert masked["nrmse"] == pytest.approx(alone["nrmse"])
    assert masked["events"]["u0"] == pytest.approx(alone["events"]["u0"])
    assert masked["conserved"]["total"] == pytest.approx(alone["conserved"]["total"])
    assert masked["spectrum_of"].startswith("modes of the Laplacian on the points that count")
    other = evaluate(model, InMemory(u.masked_fill(~sea, -3.0), dt=DT, mask=sea, lengths=16.0), scoring=pick).scores
    assert masked["spectrum"]["u0"]["low"] == pytest.approx(other["spectrum"]["u0"]["low"], rel=1e-12)


def test_few_points_that_count_have_no_spectrum_but_the_reason():
    sea = torch.zeros(16, dtype=torch.bool)
    sea[:3] = True
    found = evaluate(model, InMemory(truth(2), dt=DT, mask=sea)).scores
    assert found["spectrum"] == {}
    assert found["no_spectrum"] == "only 19% of the points of a field count: too few for waves"


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_bands_of_a_basin_hold_the_modes_of_its_laplacian(axes):
    """The modes are those of a matrix, computed by NumPy."""
    space, boundary = ((40,), (14, 12), (7, 6, 5))[axes - 1], ("wall", "periodic", "open")[:axes]
    mask = np.ones(space, dtype=bool)
    mask[2:5] = False
    mask[(slice(6, None), *(slice(2, 4),) * (axes - 1))] = axes == 1
    number = np.where(mask, np.cumsum(mask).reshape(space) - 1, -1)
    matrix = np.zeros((mask.sum(),) * 2)
    for axis, end in enumerate(boundary):
        pairs = np.stack([number, np.roll(number, -1, axis)]).swapaxes(1, axis + 1)
        pairs = pairs if end == "periodic" else pairs[:, :-1]
        for i, j in pairs.reshape(2, -1).T:
            if min(i, j) >= 0:
                matrix[[i, j], [i, j]] += 1
                matrix[[i, j], [j, i]] -= 1
    squares, modes = np.linalg.eigh(matrix)
    edges, rng = [0.8, 1.6], np.random.default_rng(0)
    low, high = (2 - 2 * np.cos(edge) for edge in edges)  # a wave k has the eigenvalue 2 - 2 cos k on a grid
    bands = [(0.01, 0.7 * low), (1.3 * low, 0.8 * high), (1.2 * high, 20)]
    for band, ends in enumerate(bands):
        inside = (squares > ends[0]) & (squares < ends[1])
        u = np.full((2, *space), 1e6)
        u[:, mask] = rng.normal(size=(2, inside.sum())) @ modes[:, inside].T
        states = torch.tensor(u)[:, None, None, None]
        sums = basin_spectrum(states[0], states[1], torch.tensor(mask)[None], [1.0] * axes, boundary, edges)[:, 0, 0, 0]
        anomalies = u[:, mask] - u[:, mask].mean(1, keepdims=True)
        products = [np.mean(a * b) for a, b in (anomalies[[0, 0]], anomalies[[1, 1]], anomalies)]
        assert sums.sum(-1).tolist() == pytest.approx(products)  # Parseval
        assert sums[:2, band].tolist() == pytest.approx(products[:2], rel=0.15)


def test_chunks_do_not_change_the_scores(monkeypatch):
    whole = evaluate(model, InMemory(truth(5), dt=DT)).scores
    monkeypatch.setattr(squall.evaluation.rolling, "CHUNK_NUMBERS", 700)
    monkeypatch.setattr(squall.evaluation.scores, "PIECE_NUMBERS", 352)
    parts = evaluate(model, InMemory(truth(5), dt=DT)).scores
    for key in ("nrmse", "nrmse_p99"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-12)
    for name in ("u0", "u1"):
        for key in ("csi", "frequency_bias", "relative_intensity"):
            assert parts["events"][name][key] == pytest.approx(whole["events"][name][key], rel=1e-12)
        assert parts["spectrum"][name]["mid"] == pytest.approx(whole["spectrum"][name]["mid"], rel=1e-12)


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"events": {"v": 1.0}}, "no field 'v'"),
        ({"conserved": {"mass": "rho"}}, "no field 'rho': the data have u0, u1"),
    ],
)
def test_an_unknown_field_is_named(scoring, message):
    with pytest.raises(DataError, match=message):
        evaluate(model, InMemory(truth(2), dt=DT), scoring=Scoring(**scoring))


def test_a_quantile_outside_of_its_range_is_refused():
    with pytest.raises(ValueError, match="events is 99"):
        Scoring(events=99)
