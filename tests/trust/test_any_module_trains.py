"""What a model of the user's own holds is saved and resumed, or refused before the first step."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_signalled

import squall
import squall.data
from squall.cli import main

MODULES = """
import torch
class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv1d(1, 1, 3, padding=1)
    def forward(self, u): return self.net(u)
class Extra(Base):
    def get_extra_state(self): return {"calls": 3}
    def set_extra_state(self, state): assert state == {"calls": 3}
class Masked(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((16,), -torch.inf))
class Tied(Base):
    def __init__(self):
        super().__init__()
        self.again = self.net
class Frozen(Base):
    def __init__(self):
        super().__init__()
        self.net.weight.requires_grad_(False)
class Complex(Base):
    def __init__(self):
        super().__init__()
        self.phase = torch.nn.Parameter(torch.ones(16, dtype=torch.complex128))
    def forward(self, u): return self.net(u) * self.phase.real.to(u)
class Lazy(Base):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.LazyConv1d(1, 3, padding=1)
class Live:
    pass
class Unsavable(Base):
    def get_extra_state(self): return Live()
    def set_extra_state(self, state): pass
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    squall.data.write("u.hdf5", np.random.default_rng(0).normal(size=(6, 11, 1, 16)), dt=0.1)
    (tmp_path / "modules_of_ones_own.py").write_text(MODULES)
    return tmp_path


def train(folder: str, *options: str) -> list[str]:
    words = "train --data.path u.hdf5 --data.validation 1 --data.test 1 --training.batch 8 --device.accelerator cpu"
    words += " --training.steps 4 --training.validate_every 2 --training.checkpoint_every 2 --model.hidden 4"
    return [*words.split(), "--out", folder, *options]


@pytest.mark.parametrize("name", ["Extra", "Masked", "Tied", "Frozen", "Complex", "Lazy"])
def test_every_legal_module_trains_and_resumes_to_the_same_bits(project, name):
    words = train("run", "--model.name", f"modules_of_ones_own.{name}")
    assert main(words) == 0
    whole = squall.open_run("run")
    whole.load("last")
    shutil.rmtree("run/checkpoints/last-00000004")
    assert main(words) == 0
    broken = squall.open_run("run")
    broken.load("last")
    expected, got = whole.experiment.model.state_dict(), broken.experiment.model.state_dict()
    assert all(
        torch.equal(x, got[name]) if isinstance(x, torch.Tensor) else x == got[name] for name, x in expected.items()
    )


def test_a_module_that_cannot_be_saved_is_refused_before_anything_is_trained(project, capsys):
    assert main(train("run", "--model.name", "modules_of_ones_own.Unsavable")) == 2
    assert "cannot be saved and loaded again, so nothing was trained" in " ".join(capsys.readouterr().err.split())
    assert not (project / "run").exists()


def test_a_pipe_in_a_checkpoint_and_a_checkpoint_of_another_model_are_passed_over(project, capsys):
    assert main(train("run")) == 0
    assert main([*train("other"), "--model.hidden", "5"]) == 0
    shutil.rmtree("run/checkpoints/last-00000004")
    shutil.copytree("other/checkpoints/last-00000004", "run/checkpoints/last-00000004")
    assert main(train("run")) == 0
    assert "does not fit the model" in " ".join(capsys.readouterr().err.split())
    weights = Path("run/checkpoints/last-00000004/weights.safetensors")
    weights.unlink()
    os.mkfifo(weights)
    assert main(train("run")) == 0
    assert "weights.safetensors is a named pipe" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_the_notice_of_a_batch_system_saves_at_the_step(project, name, code):
    words = train("run", "--training.steps", "1000", "--training.checkpoint_every", "1000", "--training.log_every", "1")
    ended = run_signalled(getattr(signal, name), 7, words, folder=project)
    assert ended.returncode == code, ended.stderr
    (saved,) = Path("run/checkpoints").glob("last-*")
    assert 7 <= int(saved.name[5:]) <= 8
