"""A training goes to the tools that track experiments: the real ones, offline, where they are installed."""

import json
import sqlite3
import time

import numpy as np
import pytest

import squall.data
from squall.cli import main
from squall.runs.config import from_dict
from squall.runs.folder import RunFolder
from squall.runs.tracking import rollout_picture

STEPS = 20


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The words of a training into `tmp_path/run`."""
    monkeypatch.chdir(tmp_path)
    squall.data.write("u.hdf5", np.random.default_rng(0).normal(size=(5, 9, 1, 16)), dt=0.1)
    options = "--data.path u.hdf5 --data.validation 1 --data.test 1 --training.batch 8 --training.log_every 10"
    options += " --training.validate_every 20"
    return ["train", *options.split(), "--model.hidden", "4", "--device.accelerator", "cpu", "--out", "run"]


def train(words: list[str], logger: str) -> list[tuple[int, float]]:
    """Train, and return steps and losses of metrics.jsonl."""
    assert main([*words, "--training.steps", str(STEPS), "--logger", logger]) == 0
    lines = RunFolder("run").read_metrics()
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_tensorboard(words):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    expected = train(words, "tensorboard")
    found = events.EventAccumulator("run/tensorboard")
    found.Reload()
    np.testing.assert_allclose([(x.step, x.value) for x in found.Scalars("loss")], expected, rtol=1e-6)
    (picture,) = found.Images("rollout")
    assert (picture.step, picture.width) == (STEPS, 135 + 4)  # nine times, each 15 pixels wide


@pytest.mark.filterwarnings("ignore")
def test_mlflow(words, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = train(words, "mlflow")
    client = mlflow.MlflowClient("sqlite:///run/mlflow/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("squall").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    np.testing.assert_allclose([(x.step, x.value) for x in history], expected)
    assert (found.info.status, found.data.params["model.hidden"]) == ("FINISHED", "4")
    names = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    assert any("rollout" in name for name in names)


@pytest.mark.filterwarnings("ignore")
def test_trackio(words, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", exc_type=ImportError)
    expected = train(words, "trackio")
    (path,) = (tmp_path / "trackio").glob("squall*.db")
    rows = sqlite3.connect(path).execute("select step, metrics from metrics order by step").fetchall()
    found = [(step, json.loads(text)["loss"]) for step, text in rows if "loss" in json.loads(text)]
    np.testing.assert_allclose(found, expected)
    assert [step for step, text in rows if "rollout" in json.loads(text)] == [STEPS]
    assert list((tmp_path / "trackio").rglob("*.png"))


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(words, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(words, "wandb")
    (log,) = RunFolder("run").path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 300
    while b"loss" not in log.read_bytes() and time.monotonic() < deadline:  # wandb's own process writes it
        time.sleep(0.1)
    assert b"loss" in log.read_bytes()
    assert list(log.parent.rglob("rollout*.png"))


def test_several_at_once_and_names_of_none(words, capsys):
    pytest.importorskip("tensorboard")
    assert from_dict({"logger": ["tensorboard", "mlflow"]}).trackers == ["tensorboard", "mlflow"]
    assert from_dict({"logger": "wandb"}).trackers == ["wandb"]
    assert from_dict({}).trackers == []
    assert main([*words, "--logger", "tensorbord"]) == 2
    assert "'tensorboard'" in capsys.readouterr().err


def test_the_old_key_still_works_and_warns(words, capsys, tmp_path):
    pytest.importorskip("tensorboard")
    assert main([*words, "--training.steps", "10", "--tensorboard", "true"]) == 0
    assert "tensorboard: true is now logger: tensorboard" in capsys.readouterr().err
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("space", "shape"), [((200,), (204, 132)), ((128, 64), (132, 260)), ((2, 128, 64), (132, 260))]
)
def test_a_picture_has_truth_prediction_and_their_difference(space, shape):
    truth = np.random.default_rng(0).normal(size=(4, 2, *space)).astype("f4")
    prediction = truth.copy()
    prediction[-1, 1] = np.nan
    picture = rollout_picture(truth, prediction)
    height, width = shape
    assert picture.shape == (3 * height, 2 * width, 3)
    above, middle, below = picture.reshape(3, height, 2 * width, 3)[:, : height - 4]
    first, last = np.s_[:, : width - 4], np.s_[:, -8:-4]  # a field that is predicted exactly; a time that is not
    assert (above[first] == middle[first]).all()
    assert (below[first] == 255).all()
    assert (middle[last] == 127).all()
