"""Weather scores against the package `scores` (Leeuwenburg et al., JOSS 2024), which shares no code with squall."""

import numpy as np
import pytest
import torch

from squall.evaluation.scores import contingency_scores
from squall.evaluation.sphere import SphereGrid
from squall.evaluation.weather import bias, event_scores, rmse

scores = pytest.importorskip("scores", reason="the package scores is not installed")
xarray = pytest.importorskip("xarray", reason="xarray is not installed")

GRID = SphereGrid(np.linspace(-75.0, 75.0, 6), np.arange(0.0, 360.0, 45.0))


def fields(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 1, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arrays(*values: torch.Tensor):
    dims = ("trajectory", "time", "latitude", "longitude")
    return [xarray.DataArray(x[:, :, 0].numpy(), dims=dims) for x in values]


def test_rmse_and_bias_weighted_by_area():
    prediction, truth = fields(0), fields(1)
    forecast, observed = arrays(prediction, truth)
    weights = xarray.DataArray(GRID.areas.numpy(), dims=("latitude", "longitude"))
    options = {"preserve_dims": ["time"], "weights": weights}
    expected = scores.continuous.rmse(forecast, observed, **options)
    np.testing.assert_allclose(rmse(prediction, truth, GRID.areas)[:, 0], expected, rtol=1e-12)
    expected = scores.continuous.additive_bias(forecast, observed, **options)
    np.testing.assert_allclose(bias(prediction, truth, GRID.areas)[:, 0], expected, rtol=1e-12)


def test_scores_of_events_from_their_table():
    truth = fields(1)
    prediction = truth + fields(0)
    forecast, observed = arrays(prediction, truth)
    manager = scores.categorical.BinaryContingencyManager(forecast > 0.5, observed > 0.5)
    table = manager.transform(preserve_dims=["time"])
    expected = {
        "hit_rate": table.hit_rate(),
        "false_alarm_rate": table.false_alarm_rate(),
        "csi": table.critical_success_index(),
        "frequency_bias": table.frequency_bias(),
        "sedi": table.symmetric_extremal_dependence_index(),
    }
    counts = table.get_counts()
    for time in range(4):
        names = ("tp_count", "fn_count", "fp_count", "tn_count")
        found = contingency_scores(*(float(counts[name][time]) for name in names))
        assert found == pytest.approx({name: float(value[time]) for name, value in expected.items()})
    alike = event_scores(prediction[:, :, 0], truth[:, :, 0], torch.ones(6, 8).double(), 0.5)
    for name, value in expected.items():
        np.testing.assert_allclose(alike[name], value, rtol=1e-12)
