"""Tables and figures from hand-made run folders: nothing is trained, and a losing or diverged run stays visible."""

import dataclasses
import statistics

import numpy as np
import pytest
import torch
from rich.console import Console

from squall.data import InMemory
from squall.evaluation.diagnosis import change
from squall.report import (
    compare,
    comparison_figure,
    comparison_note,
    comparison_table,
    evaluation_table,
    markdown,
    terminal,
    write_figures,
)
from squall.report.diagnosis import diagnosis_figure
from squall.report.fields import field_comparison, field_figure, step_error_figure
from squall.report.tables import Cell, Line, Table
from squall.runs.config import from_dict, to_dict
from squall.runs.folder import RunFolder, RunFolderError
from squall.study.outcome import FIELDS, Outcome
from squall.study.results import Row

BASELINES = {"persistence": {"states": 3.0, "energy": 0.5, "mass": 0.0}, "mean state": {"states": 2.0, "energy": 0.25}}


def evaluation(error: float | None, data: str = "a") -> dict:
    """What `evaluate` leaves, with one error everywhere; None is a run of which one rollout diverged."""
    curve = [error, error, error, None if error is None else 2 * error]
    item = {
        "step": 5,
        "rollout": {"trajectories": 2, "diverged": int(error is None), "states": error, "energy": error, "mass": error},
        "one_step": {"mean": error or 1.0, "top_1_percent": error or 1.0, "max": error or 1.0},
        "regimes": {name: {"share": 0.3, "error": error or 1.0} for name in ("quiet", "active", "extreme")},
        "growth": {"median": 1.0, "max": None if error is None else 1.5},
        "baselines": BASELINES,
        "curves": {
            "time": [0.1, 0.2, 0.3, 0.4],
            "states": curve,
            "energy_truth": [[1.0, 0.9, 0.8, 0.7]],
            "energy_prediction": [curve],
        },
    }
    about = {
        "integrator": "euler",
        "dt": 0.1,
        "steps": 4,
        "trajectories": 2,
        "fields": ["u"],
        "system": None,
        "data": data,
    }
    about["standardized"] = False
    return {**about, "checkpoints": {"best": item, "last": item}}


def run(path, error: float | None, seed: int = 0, data: str = "a", **loss):
    folder = RunFolder(path)
    folder.create()
    folder.write_config(to_dict(from_dict({"training": {"seed": seed}, "loss": loss})))
    folder.write_json("evaluation.json", evaluation(error, data))
    return path


def printed(table) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    return console.export_text()


STATES = ("rollout", "states")


def table(paths):
    return comparison_table(compare(paths))


def test_runs_that_differ_by_seed_are_one_column_with_their_median_and_interval(tmp_path):
    errors = [0.5, 0.1, 0.3]
    paths = [run(tmp_path / f"mse-{i}", error, i, name="mse") for i, error in enumerate(errors)]
    paths += [run(tmp_path / f"kl-{i}", error / 2, i) for i, error in enumerate(errors)]
    comparison = compare(paths)
    assert [row.name for row in comparison.rows] == ["mse", "imbalance-aware"]
    assert [[outcome.seed for outcome in row.outcomes] for row in comparison.rows] == [[0, 1, 2]] * 2
    summary = comparison.rows[0].summary(STATES, "best")
    assert summary is not None
    assert summary.median == statistics.median(errors)
    assert (summary.low, summary.high) == (0.1, 0.5)
    assert "0.3 [0.1, 0.5]" in printed(terminal(comparison_table(comparison)))
    assert "| **0.15** [0.05, 0.25] |" in markdown(comparison_table(comparison))


def test_a_diverged_run_counts_as_infinite_and_is_shown(tmp_path):
    comparison = compare([run(tmp_path / str(i), error, i) for i, error in enumerate([0.1, None, 0.2])])
    assert "0.2 [0.1, diverged]" in printed(terminal(comparison_table(comparison)))
    worse = compare([run(tmp_path / f"w{i}", error, i) for i, error in enumerate([None, None, 0.2])])
    assert worse.rows[0].summary(STATES, "best").median == float("inf")
    assert "| diverged [0.2, diverged] |" in markdown(comparison_table(worse))


def test_persistence_and_the_mean_state_are_columns_of_a_comparison(tmp_path):
    text = markdown(table([run(tmp_path / "a", 0.1)]))
    assert "| imbalance-aware (1 seed) | persistence | mean state |" in text
    assert "| rollout: states | 0.1 | 3 | 2 |" in text


def test_one_step_errors_of_standardized_data_name_their_unit(tmp_path):
    path = run(tmp_path / "a", 0.1)
    assert "standard deviation" not in comparison_note(compare([path]))
    RunFolder(path).write_json("evaluation.json", evaluation(0.1) | {"standardized": True})
    assert "standard deviation" in comparison_note(compare([path]))


def test_text_from_data_is_text_in_every_writer():
    words = "a|b <i>*x* [bold]c[/bold] [d](e)\n&f"
    line = Line(words, (Cell(words), Cell("0.1", "[0.05, 0.2]", strong=True)))
    written = Table("", (words, "n"), (line,))
    text = "a\\|b &lt;i>\\*x\\* [bold]c[/bold] [d\\](e) &amp;f"
    assert markdown(written).splitlines()[2] == f"| {text} | {text} | **0.1** [0.05, 0.2] |"
    assert "a|b <i>*x* [bold]c[/bold] [d](e)" in printed(terminal(written))


@pytest.mark.parametrize("errors", [[0.1, 0.2], [0.1, None], [None, None]])
def test_figures_are_drawn_whatever_diverged(tmp_path, errors):
    paths = [run(tmp_path / str(i), error, i) for i, error in enumerate(errors)]
    comparison_figure(compare(paths)).savefig(tmp_path / "comparison.png")
    time = np.linspace(0, 0.4, 5)
    truth = np.random.default_rng(0).random((1, 5, 1, 6))
    prediction = np.where(np.arange(5).reshape(1, 5, 1, 1) > 2, np.inf, truth)
    RunFolder(paths[1]).write_arrays(
        "rollouts.npz", time=time, truth=truth, prediction=prediction, axis_0=np.linspace(0, 1, 6)
    )
    names = {path.name for path in write_figures(paths[1])}
    assert names == {"error_growth.png", "energy.png", "rollout_0.png"}


def test_three_space_dimensions_show_a_middle_slice(tmp_path):
    path = run(tmp_path / "run", 0.1)
    fields = np.random.default_rng(0).random((1, 5, 1, 4, 5, 6))
    axes = {f"axis_{i}": np.linspace(0, 1, n) for i, n in enumerate((4, 5, 6))}
    RunFolder(path).write_arrays("rollouts.npz", time=np.arange(5.0), truth=fields, prediction=fields, **axes)
    assert any(found.name == "rollout_0.png" for found in write_figures(path))
    kept = {"time": np.arange(5.0), "truth": fields, "prediction": fields, **axes}
    about = {"fields": ["u"], "units": {"time": "hours"}}
    labels = {axis.get_ylabel() for axis in field_figure(kept, 0, 0, "", about).axes}
    assert {"u at z = 0.6", "error of u at z = 0.6"} <= labels
    assert "truth, t = 4 hours" in {axis.get_title() for axis in field_figure(kept, 0, 0, "", about).axes}


def test_the_table_of_a_run_says_diverged(tmp_path):
    text = printed(evaluation_table(evaluation(None)))
    assert "diverged" in text
    assert "persistence" in text


def test_runs_on_other_data_are_not_compared(tmp_path):
    paths = [run(tmp_path / "a", 0.1), run(tmp_path / "b", 0.1, 1, data="b")]
    with pytest.raises(RunFolderError, match="evaluated on other test data"):
        compare(paths)


def test_a_run_that_is_not_evaluated_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_config(to_dict(from_dict({})))
    with pytest.raises(RunFolderError, match="squall evaluate"):
        compare([tmp_path / "run"])


@pytest.mark.parametrize("missing", ["steps", "checkpoints"])
def test_an_evaluation_that_lacks_a_part_is_refused(tmp_path, missing):
    path = run(tmp_path / "a", 0.1)
    RunFolder(path).write_json("evaluation.json", {k: v for k, v in evaluation(0.1).items() if k != missing})
    with pytest.raises(RunFolderError, match=f"lacks '{missing}'.*squall evaluate"):
        compare([path])


def test_the_same_seed_twice_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="same seed"):
        compare([run(tmp_path / "a", 0.1), run(tmp_path / "b", 0.2)])


def test_fields_over_two_axes_are_drawn_on_the_middle_line_of_the_second():
    draw = np.random.default_rng(0)
    arrays = {name: draw.random((1, 4, 1, 6, 5)) for name in ("truth", "prediction", "step_error")}
    arrays |= {"time": np.arange(4.0), "axis_0": np.arange(6.0), "axis_1": np.arange(5.0)}
    outcome = Outcome("run", 0, "done", {}, arrays=lambda name: arrays if name == FIELDS else None)
    panel, _ = step_error_figure(outcome).axes
    shown = panel.collections[0].get_array().reshape(6, 4)
    np.testing.assert_allclose(shown.T, arrays["step_error"][0, :, 0, :, 2])
    assert "in the middle of the others" in panel.get_ylabel()
    row = Row(("loss",), (outcome,))
    assert len(field_comparison([row], "title").axes) == 5


def test_the_map_of_a_diagnosis_is_a_map_and_its_mean_is_over_the_fields_that_a_place_has():
    u = torch.zeros(1, 3, 2, 2, 3)
    u[:, 1] = 1.0
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[:, 0, 1] = False
    plain = InMemory(u, dt=6.0, coordinates=[[50.0, 40.0], [0.0, 10.0, 20.0]], axes=["latitude", "longitude"])
    about = dataclasses.replace(plain.description, units={"time": "h"})
    source = InMemory.described(u, about, mask=mask)
    figure = diagnosis_figure({"squared change": change(source)}, source)
    course, place = figure.axes[1:3]
    assert course.get_xlabel().endswith("[h]")
    assert (place.get_xlabel(), place.get_ylabel()) == ("longitude [°E]", "latitude [°N]")
    assert "mean over fields" in place.get_title()
    (image,) = place.collections
    values = np.ma.filled(image.get_array(), np.nan)
    assert values == pytest.approx(np.array([[1, np.nan, 1], [1, 1, 1]]), nan_ok=True)
