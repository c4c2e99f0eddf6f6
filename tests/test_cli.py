"""The command as a user meets it: in a process of its own where signals matter, else by `main`."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from problems import Stops
from processes import COMMAND, run_program, run_signalled
from safetensors.torch import load_file
from shortcuts import without_drawing

import squall
from squall.cli import main
from squall.runs.config import from_dict
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import RunFolder
from squall.runs.train import run

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = ["--model.hidden", "8", "--training.batch", "16", "--training.validate_every", "10", "--device.threads", "1"]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ch.hdf5"
    assert (
        main(
            ["simulate", "cahn-hilliard", "--out", str(path), "--trajectories", "6", "--steps", "30", "--points", "12"]
        )
        == 0
    )
    return path


def train(data: Path, out: Path, steps: int = 20, *more: str) -> list[str]:
    split = ["--data.path", str(data), "--data.validation", "1", "--data.test", "2"]
    return ["train", *split, *SMALL, "--training.steps", str(steps), "--out", str(out), *more]


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    made = []
    for loss in ("mse", "imbalance-aware"):
        for seed in ("0", "1"):
            out = base / f"{loss}-{seed}"
            assert main(train(data, out, 20, "--loss.name", loss, "--training.seed", seed)) == 0
            with without_drawing() if made else contextlib.nullcontext():  # the first one's figures are looked at
                assert main(["evaluate", str(out)]) == 0
            made.append(out)
    return made


def test_simulate_writes_what_the_system_gives(data):
    file = squall.data.open(data)
    system = squall.CahnHilliard(points=12)
    expected = system.simulate(system.initial_states(6, np.random.RandomState(0)), 30)
    assert torch.equal(file.read(range(6)), expected)
    assert file.parameters["gamma"] == system.gamma
    assert file.provenance["seed"] == 0


def test_a_run_folder_explains_itself(runs):
    names = {path.name for path in runs[0].iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "evaluation.json", "figures"} <= names
    found = json.loads((runs[0] / "evaluation.json").read_text())
    assert found["steps"] == 30
    best = found["checkpoints"]["best"]
    assert best["rollout"]["trajectories"] == 2
    assert {"states", "energy", "mass", "diverged", "vrmse"} <= best["rollout"].keys()
    figures = {path.name: path.read_bytes() for path in (runs[0] / "figures").iterdir()}
    assert {"error_growth.png", "energy.png", "rollout_0.png"} <= figures.keys()
    assert all(content.startswith(b"\x89PNG") for content in figures.values())


def test_a_rival_trains_resumes_and_is_evaluated_by_its_name(data, tmp_path, capsys):
    out = tmp_path / "rival"
    words = ["train", "--data", str(data), "--data.validation", "1", "--data.test", "2", "--model.hidden", "3"]
    words += ["--training.steps", "4", "--training.batch", "4", "--training.checkpoint_every", "2", "--out", str(out)]
    words += ["--loss.name", "channel", "--loss.options", '{"window": 5}']
    assert main(words) == 0
    assert main(words) == 0, "the folder holds the finished run"
    assert "no loss is shown to beat MSE" not in capsys.readouterr().err
    assert main([*words, "--loss.options", '{"window": 6}']) == 2
    assert "loss.options.window: 5 -> 6" in capsys.readouterr().err
    assert main(["evaluate", str(out)]) == 0
    assert "window: 5" in (out / "config.yaml").read_text()


def test_a_memory_of_every_sample_is_resumed_as_it_was(data, tmp_path):
    def words(out: str, *more: str) -> list[str]:
        sizes = ["--training.checkpoint_every", "3", "--loss.name", "vrba", "--loss.options", '{"eta": 0.5}']
        return [*train(data, tmp_path / out, 6), *sizes, *more]

    assert main(words("whole")) == 0
    config = from_dict(RunFolder(tmp_path / "whole").read_config())
    assert not run(config, tmp_path / "part", Stops(3)).finished
    run(config, tmp_path / "part")
    whole, part = (RunFolder(tmp_path / name).load("last") for name in ("whole", "part"))
    assert whole.state["loss"]["memory"].any()
    assert torch.equal(whole.state["loss"]["memory"], part.state["loss"]["memory"])
    assert all(torch.equal(x, part.weights[name]) for name, x in whole.weights.items())


def test_the_last_line_of_progress_shows_the_last_loss(data, tmp_path, capsys):
    """Of fewer steps than `log_every`, and of a log with the last step."""
    for steps, every in ((3, "100"), (4, "2")):
        out = tmp_path / str(steps)
        assert main(train(data, out, steps, "--training.log_every", every, "--training.validate_every", "0")) == 0
        text = (out / "metrics.jsonl").read_text()
        losses = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
        (line,) = (x for x in capsys.readouterr().err.splitlines() if f"{steps} of {steps} steps" in x)
        assert f"loss {losses[-1]:.3g} " in line


@pytest.mark.drawn
def test_diagnose_shows_how_uneven_data_and_a_run_are(data, runs, tmp_path, capsys):
    assert main(["diagnose", str(data), "--out", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert "top 1 % of points" in out
    assert "begin with" in out
    assert "no better than a coin" in out
    assert (tmp_path / "d" / "diagnosis.png").stat().st_size > 10_000
    assert "Gini coefficient" in (tmp_path / "d" / "diagnosis.md").read_text()
    assert main(["diagnose", str(data), "--out", str(tmp_path / "d")]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert main(["diagnose", str(runs[0]), "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "squared error" in out
    assert "test trajectory" in out
    assert main(["diagnose", str(runs[0]), "--dt", "1", "--out", str(tmp_path / "s")]) == 2
    assert "is a run folder" in capsys.readouterr().err
    assert main(["diagnose", str(data), "--trust", "--out", str(tmp_path / "s")]) == 2
    assert "are for a run folder" in capsys.readouterr().err


def test_constant_data_have_no_diagnosis(tmp_path, capsys):
    squall.data.write(tmp_path / "still.hdf5", torch.ones(2, 5, 1, 8), dt=1.0)
    assert main(["diagnose", str(tmp_path / "still.hdf5"), "--out", str(tmp_path / "d")]) == 2
    assert "no field changes in time" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_compare_shows_both_losses_with_their_spread(runs, tmp_path, capsys):
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "mse" in out
    assert "2 seeds" in out
    assert (tmp_path / "c" / "comparison.png").exists()
    assert "| rollout: states |" in (tmp_path / "c" / "comparison.md").read_text()
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c")]) == 2
    assert "is not overwritten" in capsys.readouterr().err


def test_another_integrator_is_evaluated_beside(runs, capsys):
    before = (runs[0] / "evaluation.json").read_bytes()
    assert main(["evaluate", str(runs[0]), "--integrator", "rk4", "--substeps", "4"]) == 0
    assert "4 × rk4" in capsys.readouterr().out
    assert (runs[0] / "evaluation.json").read_bytes() == before
    assert json.loads((runs[0] / "evaluation-rk4-4.json").read_text())["integrator"] == "4 × rk4"


def test_an_implicit_integrator_trains_and_is_evaluated_by_the_command(data, runs, tmp_path, capsys):
    words = [*train(data, tmp_path / "run"), "--model.name", "hnn", "--integrator", "discrete_gradient"]
    assert main(words) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["integrator"] == "discrete_gradient"
    evaluate_runs(runs[:2], method="implicit_midpoint")  # members of a stack elsewhere
    assert (
        json.loads((runs[1] / "evaluation-implicit_midpoint-1.json").read_text())["integrator"] == "implicit_midpoint"
    )
    assert main(["evaluate", str(runs[0]), "--integrator", "discrete_gradient"]) == 2
    assert "needs a model of an energy" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0


def test_predict_rolls_out_states_of_ones_own(runs, tmp_path, capsys):
    initial, file = np.random.default_rng(0).uniform(-0.05, 0.05, (3, 12)), tmp_path / "initial.npy"
    np.save(file, initial)
    words = ["predict", str(runs[0]), "--initial", str(file), "--steps", "7", "--out", str(tmp_path / "p.hdf5")]
    assert main(words) == 0
    found = squall.data.open(tmp_path / "p.hdf5")
    assert found.shape == (3, 8, 1, 12)
    np.testing.assert_allclose(found.read(range(3))[:, 0, 0], initial, rtol=1e-6)
    assert main(words) == 2
    assert "is not overwritten" in capsys.readouterr().err


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    path = sorted((run / "checkpoints").glob("last-*"))[-1] / "weights.safetensors"
    return {name: tensor.clone() for name, tensor in load_file(path).items()}  # not a map of the file


def lines(run: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def test_an_interrupted_command_resumes_to_the_same_bits(data, tmp_path):
    """The unbroken run and the resumed ones in this process, after whatever ran here before."""
    settings = ("--training.checkpoint_every", "20", "--training.log_every", "15", "--training.validate_every", "50")
    assert main(train(data, tmp_path / "whole", 100, *settings)) == 0
    for blow in (signal.SIGKILL, signal.SIGINT):
        folder = tmp_path / blow.name
        ended = run_signalled(blow, 45, train(data, folder, 100, *settings))
        assert ended.returncode == (-signal.SIGKILL if blow == signal.SIGKILL else 130), ended.stderr
        assert len(lines(folder)) < len(lines(tmp_path / "whole"))
        assert main(train(data, folder, 100, *settings)) == 0
        whole, broken = last_weights(tmp_path / "whole"), last_weights(folder)
        assert all(torch.equal(whole[name], broken[name]) for name in whole)
        assert lines(tmp_path / "whole") == lines(folder)


def test_a_finished_run_is_not_trained_again(data, tmp_path, capsys):
    assert main(train(data, tmp_path / "run")) == 0
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert main(train(data, tmp_path / "run")) == 0
    assert "finished" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_folder_of_another_configuration_is_refused_with_the_difference(data, tmp_path, capsys):
    assert main(train(data, tmp_path / "run")) == 0
    assert main(train(data, tmp_path / "run", 10)) == 2
    assert "training.steps: 20 -> 10" in capsys.readouterr().err
    assert main(train(data, tmp_path / "run", 30, "--training.seed", "3")) == 2
    assert "training.seed: 0 -> 3" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train(data, run, 20, "--training.checkpoint_every", "10")) == 0
    expected = last_weights(run)
    (run / "checkpoints" / "last-00000020" / "weights.safetensors").write_bytes(b"broken")
    assert main(train(data, run, 20, "--training.checkpoint_every", "10")) == 0
    assert "last-00000020 is damaged" in " ".join(capsys.readouterr().err.split())
    assert all(torch.equal(expected[name], tensor) for name, tensor in last_weights(run).items())


def test_a_yaml_file_and_dotted_overrides(data, tmp_path):
    config = tmp_path / "ch.yaml"
    config.write_text(
        f"data: {{path: {data}, validation: 1, test: 2}}\n"
        "model: {name: hnn, hidden: 8}\n"
        "training: {steps: 3, batch: 8}\n"
    )
    words = ["train", "--config", str(config), "--training.seed", "4", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "name: hnn" in text
    assert "seed: 4" in text


@pytest.mark.parametrize(
    ("text", "message"), [("", "must hold keys"), ("data: {path: [", "not YAML"), ("- 1", "must hold keys")]
)
def test_a_configuration_file_that_is_none(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_module_of_ones_own_by_its_import_path(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Next(torch.nn.Module):\n"
        "    def __init__(self, points):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(points, points)\n"
        "    def forward(self, u):\n"
        "        return self.linear(u)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--model.name", "mine.Next", "--model.arguments", '{"points": 12}', "--model.predicts", "state"]
    assert main(train(data, tmp_path / "run", 5, *own)) == 0
    assert "no loss is shown to beat MSE" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--integrator", "rk4"]) == 2
    assert "predicts the next state" in " ".join(capsys.readouterr().err.split())


OWN = """
import torch
class Counted(torch.nn.Module):  # running statistics, an integer counter, a complex weight, a transposed one
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.phase = torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))
        self.mixing = torch.nn.Parameter(torch.eye(12)[:, :6].contiguous().T)
    def forward(self, u):
        return self.norm(u) * self.phase.real + u @ self.mixing.T @ self.mixing
class Constant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))
    def forward(self, u):
        return self.value.expand(u.shape)
class Empty(torch.nn.Module):
    def forward(self, u):
        return u
class Narrow(torch.nn.Linear):
    def __init__(self):
        super().__init__(12, 3)
"""


def test_a_module_in_the_working_folder(data, tmp_path, monkeypatch):
    """By the installed command, whose import path does not hold the working folder."""
    (tmp_path / "own.py").write_text(OWN)
    squall_command = str(Path(sys.executable).parent / "squall")
    words = [squall_command, *train(data, tmp_path / "run", 4, "--model.name", "own.Counted")]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_a_module_that_does_not_look_at_the_state(data, tmp_path, monkeypatch):
    (tmp_path / "own_constant.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    assert main(train(data, tmp_path / "run", 4, "--model.name", "own_constant.Constant")) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Empty", "no parameters"),
        ("Narrow", "to (2, 1, 3), but must return (2, 1, 12)"),
        ("Missing", "cannot be imported"),
    ],
)
def test_modules_that_cannot_be_used(data, tmp_path, monkeypatch, capsys, name, message):
    (tmp_path / f"own_{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    assert main(train(data, tmp_path / "run", 4, "--model.name", f"own_{name}.{name}")) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_is_evaluated_on_the_data_it_was_trained_on(data, tmp_path, capsys, monkeypatch):
    copy, moved = tmp_path / "copy.hdf5", tmp_path / "elsewhere" / "data.hdf5"
    copy.write_bytes(data.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(train(Path("copy.hdf5"), tmp_path / "run")) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    copy.rename(moved)
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert main(["evaluate", str(tmp_path / "run"), "--data", "data.hdf5"]) == 0
    with h5py.File(moved, "r+") as file:
        file["t0_fields/u"][0, 0, 0] = 0.01
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", "data.hdf5"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "data.hdf5, named by --data, is not the file that" in told
    assert "it has sha256 " in told
    squall.data.write("other.hdf5", np.zeros((3, 9, 2, 5)), dt=0.5)
    for command in ("evaluate", "diagnose"):
        assert main([command, str(tmp_path / "run"), "--data", "other.hdf5"]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "the fields ('u0', 'u1'), not ('u',)" in told
        assert "Name that file, or a copy of it" in told
        assert "squall predict" in told


def test_an_evaluation_that_is_out_of_date_is_not_compared(runs, tmp_path, capsys):
    stale = tmp_path / "stale"
    shutil.copytree(runs[0], stale)
    (last,) = (stale / "checkpoints").glob("last-00000020")
    last.rename(stale / "checkpoints" / "last-00000010")
    assert main(["compare", str(stale), "--out", str(tmp_path / "c")]) == 2
    assert "not trained to its end (step 10 of 20)" in " ".join(capsys.readouterr().err.split())


def test_reading_as_needed_trains_to_the_same_bits(data, tmp_path):
    """As a file that is larger than the memory it may take is read."""
    assert main(train(data, tmp_path / "memory", 12)) == 0
    assert main(train(data, tmp_path / "file", 12, "--data.memory_gib", "0")) == 0
    memory, file = last_weights(tmp_path / "memory"), last_weights(tmp_path / "file")
    assert all(torch.equal(memory[name], file[name]) for name in memory)


def test_walls_are_said_to_be_treated_as_a_ring(tmp_path, capsys):
    states = np.random.default_rng(0).random((6, 12, 1, 6))
    squall.data.write(tmp_path / "own.hdf5", states, dt=1.0, boundary="wall")
    assert main(train(tmp_path / "own.hdf5", tmp_path / "run", 3)) == 0
    assert "space axis 0 is 'wall', but 'node' treats it as an equally spaced ring" in capsys.readouterr().err


def test_two_dimensional_data_with_several_fields(tmp_path):
    generator = np.random.default_rng(0)
    first = generator.standard_normal((5, 1, 2, 6, 8)) * np.array([1.0, 1e3]).reshape(1, 1, 2, 1, 1) + 50
    states = first * np.exp(-0.1 * np.arange(9)).reshape(1, -1, 1, 1, 1)
    squall.data.write(tmp_path / "own.hdf5", states, dt=0.1, fields=["density", "pressure"], lengths=[1.0, 2.0])
    assert main(train(tmp_path / "own.hdf5", tmp_path / "run", 10)) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["checkpoints"]["best"]["rollout"]["vrmse"].keys() == {"density", "pressure"}
    assert "energy" not in found["checkpoints"]["best"]["rollout"]
    weights = last_weights(tmp_path / "run")
    np.testing.assert_allclose(weights["std"], states[:2].std((0, 1, 3, 4)), rtol=1e-5)
    assert (tmp_path / "run" / "figures" / "rollout_pressure_0.png").exists()


def spoilt(data: Path, tmp_path: Path, how: str) -> Path:
    path = tmp_path / "spoilt.hdf5"
    path.write_bytes(data.read_bytes())
    if how == "truncated":
        path.write_bytes(data.read_bytes()[:-2000])
    elif how == "text":
        path.write_text("no HDF5")
    else:
        with h5py.File(path, "r+") as file:
            if how == "nan":
                file["t0_fields/u"][3, 5, 2] = np.nan
            elif how == "group":
                del file["scalars"]
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated"),
        ("text", "HDF5"),
        ("nan", "NaN or infinit"),
        ("group", "scalars"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(data, tmp_path, capsys, how, message):
    path = spoilt(data, tmp_path, how)
    assert main(train(path, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


MISTAKES = [
    (["train", "--data.path", "nowhere.hdf5"], "nowhere.hdf5"),
    (["train", "--data=nowhere.hdf5"], "nowhere.hdf5: there is no such file"),
    (["train"], "data.path is not set"),
    (["train", "--data.path", "{data}", "--training.step", "3"], "did you mean 'training.steps'"),
    (["train", "--data.path", "{data}", "--loss.temperature", "-1"], "loss.temperature is -1"),
    (["train", "--data.path", "{data}", "--loss.temperature", ".nan"], "loss.temperature is nan"),
    (["train", "--data.path", "{data}", "--training.steps", "0"], "training.steps is 0"),
    (["train", "--data.path", "{data}", "--training.batch", "100000"], "batch is 100000"),
    (["train", "--data.path", "{data}", "--data.test", "6"], "leave none"),
    (
        ["train", "--data.path", "{data}", "--model.name", "transformer"],
        "one of node, hnn, unet, fno or the import path",
    ),
    (["train", "--data.path", "{data}", "--model.name", "no.such.Model"], "cannot be imported"),
    (["train", "--data.path", "{data}", "--integrator", "rk5"], "must be one of: euler, midpoint, rk4"),
    (["train", "--data.path", "{data}", "--integrator", "discrete_gradient"], "needs a model of an energy"),
    (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    (["train", "--data.path", "{data}", "--device.accelerator", "quantum"], "'quantum', but must be one of auto"),
    (["train", "--data.path", "{data}", "--device.threads", "-1"], "device.threads is -1"),
    (["train", "--data.path", "{data}", "--model.structure", "laplacian"], "only 'hnn' has one"),
    (["train", "--data.path", "{data}", "--model.arguments", "{{a: 1}}"], "for a module of your own"),
    (["train", "--config", "/dev/null"], "not a file"),
    (["simulate", "cahn-hilliard", "--out", "x.hdf5", "--initial", "i.npy", "--seed", "3"], "do not go with it"),
    (["evaluate", "nowhere"], "not a run folder"),
    (["compare", "nowhere"], "not a run folder"),
    (["simulate", "cahn-hilliard", "--out", "{data}"], "exists and is not overwritten"),
    (["simulate", "cahn-hilliard", "--out", "x.hdf5", "--gama", "1"], "did you mean 'gamma'"),
    (["simulate", "cahn-hilliard", "--out", "x.hdf5", "--points", "2"], "needs at least 5 points"),
    (["simulate", "burger", "--out", "x.hdf5"], "korteweg-de-vries"),
    (["simulate", "cahn-hilliard", "--out", "{data}/x.hdf5", "--steps", "1"], "ch.hdf5"),
    (["simulate", "korteweg-de-vries", "--out", "x.hdf5", "--dt", "10.0", "--steps", "5"], "Try a smaller dt"),
    (["trian"], "did you mean 'train'"),
    ([], "no command is given"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_mistake_gets_a_sentence_and_exit_code_2(data, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    small = ["--data.validation", "1", "--data.test", "2", "--training.batch", "16"] if words[:1] == ["train"] else []
    assert main([*words[:1], *small, *(word.format(data=data) for word in words[1:])]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "runs").exists()


def test_metrics_go_to_tensorboard_too(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(train(data, tmp_path / "run", 20, "--logger", "tensorboard", "--training.log_every", "10")) == 0
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {"loss", "temperature", "validation/rollout_states"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("loss")] == [10, 20]


def test_wrong_dimension_for_the_model(tmp_path, capsys):
    squall.data.write(tmp_path / "own.hdf5", np.random.default_rng(0).random((4, 3, 2, 6, 6)), dt=1.0)
    assert main(train(tmp_path / "own.hdf5", tmp_path / "run", 3, "--model.name", "hnn")) == 2
    assert "takes one scalar field, but the data have 2" in " ".join(capsys.readouterr().err.split())


def test_divergence_stops_with_the_step_and_the_last_good_checkpoint(data, tmp_path, capsys):
    wild = ("--training.learning_rate", "1e30", "--training.checkpoint_every", "1", "--loss.name", "mse")
    assert main(train(data, tmp_path / "run", 50, *wild)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "training diverged at step" in error
    assert "The last good checkpoint: " in error


def test_a_full_disk_stops_the_training_which_goes_on_when_there_is_room(data, tmp_path):
    """A limit on the size of files stands for the disk."""
    words = train(data, tmp_path / "run", 40, "--training.checkpoint_every", "10", "--training.log_every", "1")
    program = (
        "import resource, signal, sys\n"
        "from squall.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    result = run_program(program, *words, modules=COMMAND)
    assert result.returncode == 2, result.stderr
    assert "The disk is full: what was saved is whole" in result.stderr
    assert "Traceback" not in result.stderr
    assert main(words) == 0
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 41))


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("model", ["node", "hnn"])
def test_other_precisions(data, tmp_path, precision, model):
    words = train(data, tmp_path / "run", 10, "--device.precision", precision, "--model.name", model)
    assert main(words) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    kinds = {tensor.dtype for tensor in last_weights(tmp_path / "run").values()}
    assert kinds == {torch.float64 if precision == "64-true" else torch.float32}


def test_a_data_file_that_changed_is_noticed(data, tmp_path, capsys):
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes(data.read_bytes())
    assert main(train(copy, tmp_path / "run")) == 0
    with h5py.File(copy, "r+") as file:
        file["t0_fields/u"][0, 0, 0] = 0.01
    assert main(train(copy, tmp_path / "run")) == 2
    assert "has changed since" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_train_what_one_trains(data, tmp_path):
    assert main(train(data, tmp_path / "one", 10, "--device.accelerator", "cpu")) == 0
    words = ["--device.accelerator", "cpu", "--device.devices", "2", "--device.strategy", "ddp"]
    two = subprocess.Popen(
        [Path(sys.executable).parent / "squall", *train(data, tmp_path / "two", 10, *words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    out, _ = two.communicate(timeout=600)
    assert two.returncode == 0, out.decode()
    expected = last_weights(tmp_path / "one")
    for name, tensor in last_weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("command", "advised"), [("describe", False), ("train", True)])
def test_what_a_file_does_not_say_is_asked_for_by_the_option_that_says_it(tmp_path, capsys, command, advised):
    np.save(tmp_path / "u.npy", np.zeros((8, 20, 6, 7)))
    words = ["data", "describe"] if command == "describe" else ["train", "--out", str(tmp_path / "run"), "--data"]
    assert main([*words, str(tmp_path / "u.npy")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "give --axes ... with" in said
    assert ("squall data convert FILE" in said) == advised
