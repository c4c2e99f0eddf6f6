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
class Whole(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.net.register_forward_hook(lambda module, inputs, output: 2 * output)
        torch.nn.utils.parametrizations.weight_norm(self.net)
    def forward(self, u):
        if self.training: self.calls += 1
        return self.net(u)
class Short(Base):
    def __init__(self):
        super().__init__()
        self.to(torch.bfloat16)
    def forward(self, u): return self.net(u.bfloat16()).to(u)
class Scripted(Base):
    def __init__(self):
        super().__init__()
        self.net = torch.jit.script(self.net)
class Recorded(Base):
    # as neuraloperator records its arguments: within another module nobody takes them back
    arguments = {"activation": torch.nn.functional.gelu, "layer": torch.nn.Conv1d, "args": ()}
    def state_dict(self, *args, **options):
        state = super().state_dict(*args, **options)
        state["_metadata"] = self.arguments
        return state
    def load_state_dict(self, state, *args, **options):
        return super().load_state_dict({k: x for k, x in state.items() if k != "_metadata"}, *args, **options)
class RecordedPlainly(Recorded):
    arguments = {"width": 1, "args": (1,)}
class Detached(Base):
    def forward(self, u): return self.net(u).detach()
class FailsToBegin(Base):
    def __init__(self): raise RuntimeError("no width")
class FailsLater(Base):
    def forward(self, u): return self.net(u) if not self.training else {}["width"]
class DividesByZero(Base):
    def forward(self, u): return self.net(u) if not self.training else u / (1 // 0)
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


NAMES = ["Extra", "Masked", "Tied", "Frozen", "Complex", "Lazy", "Whole", "Short", "Scripted", "Recorded"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [*NAMES, "RecordedPlainly"])
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
    assert main(["predict", "run", "--initial", "u.hdf5", "--steps", "2", "--out", "p.nc"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Detached", "the loss has no gradient: the model detaches its result"),
        ("FailsToBegin", "raised RuntimeError: no width"),
        ("FailsLater", "raised KeyError: 'width'"),
        ("DividesByZero", "raised ZeroDivisionError"),
    ],
)
def test_a_module_of_ones_own_that_fails_is_named_and_not_called_a_fault_of_squall(project, capsys, name, message):
    assert main(train("run", "--model.name", f"modules_of_ones_own.{name}")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert name == "Detached" or "code of your own, " in error
    assert name == "Detached" or "modules_of_ones_own.py:" in error


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
