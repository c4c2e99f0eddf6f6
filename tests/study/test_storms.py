"""A study of storms on a sphere: simulated, trained, rolled out and scored."""

import csv
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from in_process import assert_takes_a_step, run_here
from shortcuts import without_drawing

import squall
import squall.data
from squall.data.errors import DataError
from squall.models import UNet
from squall.runs.build import _unet
from squall.runs.config import ConfigError, from_dict
from squall.study.definition import read_study

STUDY = """
name: sphere
seeds: 2
baseline: MSE
keep_weights: true
base:
  system: {name: shallow-water, start: vortices, latitudes: 16, longitudes: 32, step: 900.0, trajectories: 4, steps: 20}
  data: {validation: 1, test: 2}
  model: {name: unet, predicts: state, residual: true, arguments: {width: 4, levels: 1}}
  training: {steps: 2, batch: 2, residual: state, validate_every: 2, unroll: 2}
  device: {accelerator: cpu}
variants:
  MSE: {loss.name: mse}
  KL budget 1: {loss.kl_budget: 1.0}
  afCRPS: {loss.name: afcrps, model.arguments.noise: 1}
grids:
  all: {axes: [[afCRPS, MSE, KL budget 1]]}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    folder = tmp_path_factory.mktemp("storms")
    (folder / "study.yaml").write_text(STUDY)
    assert run_here(read_study(folder / "study.yaml"), folder / "out") == []
    return folder / "out"


def test_storms_are_simulated_into_the_study_and_trained_on(study):
    (path,) = (study / "data").iterdir()
    assert squall.data.open(path).shape == (4, 21, 3, 16, 32)
    runs = sorted(path.name for path in (study / "runs").iterdir())
    assert runs == [
        "afcrps-seed-0",
        "afcrps-seed-1",
        "kl-budget-1-seed-0",
        "kl-budget-1-seed-1",
        "mse-seed-0",
        "mse-seed-1",
    ]


def test_the_program_scores_the_storms_of_every_loss(study, tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "score_storms.py"
    names: dict = {"__name__": "score_storms"}
    exec(compile(path.read_text(), path, "exec"), names)
    films = []
    names["animate"] = lambda path, fields, *_, times, **__: films.append((path.name, list(fields), len(times)))
    with without_drawing():
        names["main"]([str(study), "--out", str(tmp_path / "scores"), "--shown", "MSE", "--animate"])
    assert films == [("storms.gif", ["truth", "MSE"], 21)]
    lines = (tmp_path / "scores" / "storms.md").read_text().splitlines()
    assert lines[2] == ("| score | day | MSE | KL budget 1 | afCRPS | afCRPS, mean of 8 | persistence | climatology |")
    assert "…" in lines[4].split("|")[4]  # paired with the baseline
    assert "…" not in lines[4].split("|")[3]
    assert "Predictability horizon" in lines[-1]
    rows = list(csv.DictReader((tmp_path / "scores" / "storms.csv").read_text().splitlines()))
    assert {row["score"] for row in rows} >= {"storm CSI", "storm hit rate", "position error, km", "point SEDI"}
    errors = [float(row["value"]) for row in rows if row["score"] == "position error, km" and row["value"]]
    assert errors
    assert 0 <= min(errors) <= max(errors) <= 1000
    assert len(list((tmp_path / "scores").glob("storms_*.png"))) == 4
    with pytest.raises(SystemExit, match="not overwritten"):
        names["main"]([str(study), "--out", str(tmp_path / "scores")])
    (data,) = (study / "data").iterdir()
    with without_drawing():
        names["main"]([str(study), "--on", str(data), "--out", str(tmp_path / "again")])
    again = list(csv.DictReader((tmp_path / "again" / "storms.csv").read_text().splitlines()))
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert again != rows  # the training trajectories count too
    capsys.readouterr()


def test_a_variant_that_adds_to_the_arguments_of_the_model_leaves_the_others_alone(study):
    noise = {
        trial.labels: trial.config.model.arguments.get("noise") for trial in read_study(study / "study.yaml").trials
    }
    assert noise == {("afCRPS",): 1, ("MSE",): None, ("KL budget 1",): None}


def test_every_loss_of_the_large_study_takes_a_step_on_small_data(study):
    """Its models are made smaller, and its data are those of the study above."""
    (path,) = (study / "data").iterdir()
    trials = [trial for trial in read_study("storms").trials if trial.seed == 0]
    definition = yaml.safe_load((files("squall.study") / "presets" / "storms.yaml").read_text())
    assert {label for trial in trials for label in trial.labels} == set(definition["variants"])
    for trial in trials:
        if trial.labels[1:] == ("four steps", "width 16"):
            small = {"width": 2, "levels": 1}
            assert_takes_a_step(trial, path, trial.config.model.arguments | small)


def weather(path: Path, latitude: torch.Tensor, longitudes: int) -> Path:
    """A file of four random fields."""
    xarray = pytest.importorskip("xarray")
    field = torch.randn(4, len(latitude), longitudes, generator=torch.Generator().manual_seed(0)).numpy()
    coordinates = {
        "time": [0, 6, 12, 18],
        "latitude": latitude.numpy(),
        "longitude": 22.5 * torch.arange(longitudes).numpy(),
    }
    data = xarray.Dataset({"u": (("time", "latitude", "longitude"), field)}, coords=coordinates)
    data.to_netcdf(path, engine="h5netcdf")
    return path


@pytest.mark.parametrize(
    ("latitude", "longitudes", "boundary"),
    [
        (torch.linspace(90, -90, 8), 16, ("pole", "periodic")),
        (torch.linspace(-78, 78, 8), 16, ("pole", "periodic")),  # cell centres: half a step from the poles
        (torch.linspace(60, -60, 8), 16, ("open", "periodic")),
        (torch.linspace(90, -90, 8), 15, ("open", "open")),  # a piece is missing
    ],
)
def test_a_unet_goes_over_the_poles_where_the_data_cover_the_sphere(latitude, longitudes, boundary, tmp_path):
    path = weather(tmp_path / "a.nc", latitude, longitudes)
    config = from_dict(yaml.safe_load("model: {name: unet, arguments: {width: 2, levels: 1}}"))
    model = _unet(config, squall.data.open(path), None, torch.Generator().manual_seed(0))
    assert isinstance(model, UNet)
    assert model.boundary == boundary


@pytest.mark.parametrize(
    ("latitude", "longitudes"), [(torch.linspace(60, -60, 8), 16), (torch.linspace(90, -90, 8), 15)]
)
def test_a_pole_in_a_part_of_the_sphere_is_refused(latitude, longitudes, tmp_path):
    source = squall.data.open(weather(tmp_path / "a.nc", latitude, longitudes))
    config = from_dict(yaml.safe_load("model: {name: unet, arguments: {boundary: [pole, periodic]}}"))
    with pytest.raises(ConfigError, match="'pole', but the data are a part of the sphere"):
        _unet(config, source, None, torch.Generator().manual_seed(0))


def test_latitudes_that_are_not_in_order_are_named(tmp_path):
    path = weather(tmp_path / "a.nc", torch.tensor([80.0, 50, 60, 40, 20, -20]), 16)
    with pytest.raises(
        DataError, match="axis latitude have to be finite and in order, but 60 comes after 50: sort them"
    ):
        squall.data.open(path)
