"""A run folder runs no code of its own, and what it says about itself is what was recorded."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import COMMAND, run_program

import squall
import squall.data
from squall.cli import main
from squall.runs.build import ConfigError
from squall.runs.installed import is_installed
from squall.runs.record import sealed

MODEL = """
import pathlib, torch
pathlib.Path("ran").touch()
class Model(torch.nn.Conv1d):
    def __init__(self):
        super().__init__(1, 1, 3, padding=1)
"""


def train(folder, *options: str, steps: int = 4) -> int:
    words = "train --data.path u.hdf5 --data.validation 1 --data.test 1 --training.batch 8 --device.accelerator cpu"
    words += f" --training.validate_every 2 --training.checkpoint_every 2 --model.hidden 4 --training.steps {steps}"
    return main([*words.split(), "--out", str(folder), *options])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with data."""
    monkeypatch.chdir(tmp_path)
    squall.data.write("u.hdf5", np.random.default_rng(0).normal(size=(6, 11, 1, 16)), dt=0.1)
    return tmp_path


@pytest.fixture
def own_run(project, request):
    """A run of a module of the working folder; its name is that of the test, as modules are imported once."""
    name = "own_" + "".join(x if x.isalnum() else "_" for x in request.node.name)
    (project / f"{name}.py").write_text(MODEL)
    assert train("run", "--model.name", f"{name}.Model") == 0
    (project / "ran").unlink()
    del sys.modules[name]
    return name


def pretend(name: str, **arguments: object) -> None:
    """Let `run` name another model, with a record that fits: whoever makes a folder can write all that is in it."""
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["model"] |= {"name": name, "arguments": arguments}
    environment = json.loads(Path("run/environment.json").read_text())
    environment.pop("record")
    normalization = json.loads(Path("run/normalization.json").read_text())
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    Path("run/environment.json").write_text(json.dumps(sealed(environment, config, normalization, None)))


def error_of(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("subprocess.check_call", {"args": "touch ran", "shell": True}),
        ("antigravity.Model", {}),
        ("os.system", {"command": "touch ran"}),
        ("torch.hub.load", {"repo_or_dir": "."}),
        ("here.Model", {}),
        ("torch_.Model", {}),
        ("yaml.here.Model", {}),
    ],
)
def test_a_run_folder_cannot_name_code(project, capsys, name, arguments):
    for path in ("here", "torch_", "this", "antigravity"):
        (project / f"{path}.py").write_text(MODEL)
    assert train("run") == 0
    pretend(name, **arguments)
    np.save("i.npy", np.zeros((1, 1, 16)))
    modules = set(sys.modules)
    assert main(["evaluate", "run"]) == 2
    assert main(["predict", "run", "--initial", "i.npy", "--out", "p.hdf5"]) == 2
    assert not (project / "ran").exists()
    assert not {"antigravity", "this"} & (set(sys.modules) - modules)


def test_a_module_of_an_installed_package_is_not_taken_from_the_working_folder(project):
    assert train("run", "--model.name", "torch.nn.Conv1d", "--model.arguments", ARGUMENTS) == 0
    (project / "torch").mkdir()
    (project / "torch" / "__init__.py").write_text(MODEL)
    assert main(["evaluate", "run"]) == 0
    assert not (project / "ran").exists()
    assert is_installed("torch.nn")
    assert is_installed("squall.models")


ARGUMENTS = "{in_channels: 1, out_channels: 1, kernel_size: 3, padding: 1}"


def test_ones_own_run_is_evaluated_without_a_word(project, own_run):
    assert main(["evaluate", "run"]) == 0
    assert (project / "ran").exists()


def test_ones_own_run_is_known_after_the_module_was_edited_or_the_project_was_moved(project, own_run):
    (project / f"{own_run}.py").write_text(MODEL + "# edited\n")
    squall.open_run("run")
    (project / f"{own_run}.py").write_text(MODEL)
    (project / "elsewhere").mkdir()
    shutil.move("run", "elsewhere/run")
    shutil.move(f"{own_run}.py", f"elsewhere/{own_run}.py")
    os.chdir("elsewhere")
    del sys.modules[own_run]
    squall.open_run("run")


def test_a_module_of_a_stranger_runs_only_where_it_is_trusted(project, own_run, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(project / "of somebody else"))
    assert main(["evaluate", "run"]) == 2
    assert "if you trust it, say so by --trust" in error_of(capsys)
    with pytest.raises(ConfigError, match=r"open_run\(..., trust=True\)"):
        squall.open_run("run")
    assert not (project / "ran").exists()
    squall.open_run("run", trust=True)
    assert (project / "ran").exists()
    assert main(["evaluate", "run", "--trust"]) == 0


def test_a_run_of_ones_own_with_another_module_of_that_name_is_not_trusted(project, own_run):
    (project / f"{own_run}.py").unlink()
    (project / "got").mkdir()
    (project / "got" / f"{own_run}.py").write_text(MODEL + "# another\n")
    os.chdir("got")
    with pytest.raises(ConfigError, match="nothing shows that you trained"):
        squall.open_run("../run")
    assert not (project / "got" / "ran").exists()


HOMELESS = """
import os, sys
os.environ["XDG_STATE_HOME"] = "/dev/null/x"
from squall.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="home folders as on POSIX")
def test_without_a_home_folder_a_module_of_ones_own_trains_and_asks_to_be_trusted(project, tmp_path):
    (project / "nowhere.py").write_text(MODEL)
    words = "train --data.path u.hdf5 --data.validation 0 --data.test 1 --training.steps 1 --training.batch 8 --out run"
    more = ["--model.name", "nowhere.Model", "--device.accelerator", "cpu"]
    evaluate = ["evaluate", "run"]
    for arguments, code in (([*words.split(), *more], 0), (evaluate, 2), ([*evaluate, "--trust"], 0)):
        assert run_program(HOMELESS, *arguments, modules=COMMAND, folder=project).returncode == code


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_configuration_that_was_edited_is_refused_with_the_difference(project, capsys, command):
    assert train("run") == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["data"]["test"] = 3
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert (train("run") if command == "train" else main(["evaluate", "run"])) == 2
    assert "config.yaml was edited after the training" in (message := error_of(capsys))
    assert "data.test: 1 -> 3" in message


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("environment.json", lambda values: values["trajectories"].update(test=5)),
        ("environment.json", lambda values: values["record"].update(config="data: {}")),
        ("environment.json", lambda values: values.update(record=3)),
        ("environment.json", lambda values: values["record"].pop("checksum")),
        ("normalization.json", lambda values: values.update(mean=[7.0])),
    ],
)
def test_other_recorded_files_that_were_edited_are_named(project, capsys, name, edit):
    assert train("run") == 0
    values = json.loads(Path(f"run/{name}").read_text())
    edit(values)
    Path(f"run/{name}").write_text(json.dumps(values))
    assert main(["evaluate", "run"]) == 2
    message = error_of(capsys)
    assert f"{name} was edited after the training" in message or f"{name} is damaged" in message


def test_a_comment_in_a_configuration_is_no_edit_and_a_run_of_an_earlier_version_opens_with_a_warning(project):
    assert train("run") == 0
    with open("run/config.yaml", "a") as file:
        file.write("# mine\n")
    squall.open_run("run")
    values = json.loads(Path("run/environment.json").read_text())
    del values["record"]
    Path("run/environment.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="earlier version, without a record"):
        squall.open_run("run")
