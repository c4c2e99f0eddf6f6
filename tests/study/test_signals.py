"""A study that is asked to stop, by Ctrl-C or by a batch system."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from in_process import run_here

from squall._process.signals import Stopped, handled, held, notices_raise
from squall.study import runner
from squall.study.definition import read_study
from squall.study.folder import StudyFolder
from squall.study.worker import Worker

STUDY = {
    "name": "stopped",
    "seeds": 2,
    "base": {
        "data": {"validation": 1, "test": 2},
        "model": {"hidden": 3},
        "training": {"steps": 800, "batch": 8, "log_every": 50, "validate_every": 500, "checkpoint_every": 100},
        "device": {"accelerator": "cpu"},
    },
    "variants": {"CH": {"system": {"name": "cahn-hilliard", "trajectories": 6, "steps": 10}, "model.name": "node"}},
    "grids": {"all": {"axes": [["CH"]], "show": ["table"]}},
}


def results_of(folder: Path) -> dict[str, object]:
    lines = {path.parent.name: path.read_text().splitlines() for path in sorted(folder.glob("runs/*/metrics.jsonl"))}
    assert len(lines) == 2
    kept = {name: [json.loads(line) | {"seconds": 0} for line in of_run] for name, of_run in lines.items()}
    return kept | {str(p.parent.name): json.loads(p.read_text()) for p in folder.glob("runs/*/evaluation.json")}


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("runs/*/checkpoints/last-*"))


@pytest.mark.slow
def test_a_study_that_is_stopped_saves_at_the_step_and_resumes_to_the_same_bits(tmp_path):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    command = [sys.executable, "-m", "squall.cli", "study", "run", str(path), "--out", str(out), "--workers"]
    process = subprocess.Popen(
        [*command, "2"], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 600
    while not checkpoints(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGUSR1)  # as a batch system: also its workers
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGUSR1, printed
    assert "the same command resumes" in printed
    assert "Traceback" not in printed
    assert not list(out.rglob("*.part"))
    assert any(int(path.name[5:]) % 100 for path in checkpoints(out)), "saved between two checkpoints"
    run_here(read_study(path), out)
    run_here(read_study(path), tmp_path / "whole")
    assert results_of(out) == results_of(tmp_path / "whole")


def test_a_worker_saves_a_training_and_leaves_all_else_at_once():
    worker = Worker()
    with worker.working():
        worker.stepped(3)
        worker.notice(signal.SIGTERM)
        assert worker.stopping()
        with pytest.raises(Stopped):
            worker.check()  # what would follow the training
    with pytest.raises(Stopped), worker.working():
        raise AssertionError("a job was begun after the notice")
    worker.notice(signal.SIGTERM)  # idle: nothing to leave
    other = Worker()
    with pytest.raises(Stopped) as stopped, other.working():
        other.notice(signal.SIGUSR1)
    assert stopped.value.number == signal.SIGUSR1


def die(_: object) -> None:
    time.sleep(0.2)  # until the worker waits for a word to stop
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork, which spares the imports
def test_a_study_whose_worker_is_killed_ends_and_waits_for_nobody(monkeypatch):
    fork = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(runner, "multiprocessing", fork)
    monkeypatch.setattr(runner, "run_batch", die)
    with runner._processes(1) as workers:
        with pytest.raises(BrokenProcessPool):
            workers.submit([]).result(300)
        stopping = threading.Thread(target=workers.stop, daemon=True)
        stopping.start()
        stopping.join(120)
        assert not stopping.is_alive()


def test_the_first_notice_raises_and_later_ones_do_not():
    before = signal.getsignal(signal.SIGTERM)
    with notices_raise():
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_held_signals_come_after_the_block():
    received = []
    with handled(lambda number, frame: received.append(number)):
        with held():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # another thread would take it
            assert not received
        assert received == [signal.SIGUSR1]


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_study_killed_while_its_folder_is_made_can_be_given_again(tmp_path, monkeypatch, survived):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    study, made, real = read_study(path), [], Path.mkdir

    def mkdir(folder: Path, *options: object, **named: object) -> None:
        real(folder, *options, **named)
        made.append(folder)
        if len(made) > survived:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(KeyboardInterrupt):
            StudyFolder(out).create(study)
    StudyFolder(out).create(study)
    assert {"study.yaml", "runs", "data"} == {path.name for path in out.iterdir()}
