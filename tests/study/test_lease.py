"""Leases: one holder at a time, whatever is killed, suspended or has a wrong clock."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from squall.study import lease
from squall.study.definition import read_study
from squall.study.folder import StudyFolder
from squall.study.lease import Leases


@pytest.fixture
def clock(monkeypatch):
    """Seconds of this process's own clock, moved by the test."""
    now = [1000.0]
    monkeypatch.setattr(lease, "_now", lambda: now[0])
    return now


@pytest.fixture
def elsewhere(monkeypatch):
    """Other processes seem to be on another machine."""
    monkeypatch.setattr(lease, "_ended", lambda holder: False)


def numbers(leases: Leases, name: str) -> list[str]:
    return sorted(path.name for path in (leases.path / name).iterdir())


def test_a_lease_has_one_holder(tmp_path):
    a, b = Leases(tmp_path / "l"), Leases(tmp_path / "l")
    assert a.claim("run")
    assert not a.claim("run")
    assert not b.claim("run")
    assert b.claim("other")
    a.release("run", done=False)
    assert b.claim("run")
    assert a.lost() == b.lost() == []


def test_of_work_that_is_done_nothing_remains(tmp_path):
    leases = Leases(tmp_path / "l")
    leases.claim("run")
    leases.release("run", done=True)
    assert list(leases.path.iterdir()) == []


def test_what_a_killed_process_left_of_work_that_is_done_is_removed_and_of_a_living_one_is_not(tmp_path, monkeypatch):
    ours, theirs = Leases(tmp_path / "l"), Leases(tmp_path / "l")
    theirs.claim("run")
    ours.clear("run")
    ours.clear("other")
    assert numbers(ours, "run") == ["1"]
    monkeypatch.setattr(lease, "_ended", lambda holder: True)
    ours.clear("run")
    assert list(ours.path.iterdir()) == []


def test_a_lease_that_does_not_change_expires_and_its_holder_notices(tmp_path, clock, elsewhere):
    a, b = Leases(tmp_path / "l"), Leases(tmp_path / "l")
    assert a.claim("run")
    assert not b.claim("run")  # b sees it for the first time
    clock[0] += b.expiry - 1
    assert not b.claim("run")
    clock[0] += 2
    assert b.claim("run")
    assert a.lost() == ["run"]
    a.release("run", done=True)  # takes nothing from b
    assert b.lost() == []
    assert numbers(b, "run") == ["2"]


def test_a_lease_that_is_touched_does_not_expire(tmp_path, clock, elsewhere):
    a, b = Leases(tmp_path / "l", heartbeat=0.005), Leases(tmp_path / "l")
    a.claim("run")
    before = a.held["run"].stat().st_mtime_ns
    with a.beating():
        for _ in range(3):
            assert not b.claim("run")
            clock[0] += b.expiry - 1
            deadline = time.monotonic() + 600
            while a.held["run"].stat().st_mtime_ns == before and time.monotonic() < deadline:
                time.sleep(0.001)
            before = a.held["run"].stat().st_mtime_ns
    assert a.lost() == []


@pytest.mark.parametrize("jump", [-1e9, -3600, 3600, 1e9])
def test_a_clock_that_jumps_ends_no_lease(tmp_path, clock, elsewhere, jump):
    """The time of the file is the disk's; whoever watches compares it with nothing."""
    a, b = Leases(tmp_path / "l"), Leases(tmp_path / "l")
    a.claim("run")
    assert not b.claim("run")
    changed = time.time() + jump
    os.utime(a.held["run"], (changed, changed))  # the disk's clock has jumped; the holder is alive
    clock[0] += b.expiry + 1
    assert not b.claim("run")
    assert a.lost() == []


def test_of_two_that_judge_a_lease_dead_one_gets_it(tmp_path, clock, elsewhere, monkeypatch):
    """Also where the faster one has given it back before the slower one acts."""
    a, b, c = (Leases(tmp_path / "l") for _ in range(3))
    a.claim("run")
    for watcher in (b, c):
        assert not watcher.claim("run")
    clock[0] += a.expiry + 1
    create = lease._create

    def slow(folder, number):
        monkeypatch.setattr(lease, "_create", create)
        assert c.claim("run")
        c.release("run", done=False)
        assert a.claim("run")
        return create(folder, number)

    monkeypatch.setattr(lease, "_create", slow)
    assert not b.claim("run")
    assert a.lost() == []
    assert numbers(a, "run") == ["3"]


def test_the_lease_of_a_process_of_this_machine_ends_with_it(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from squall.study.lease import Leases\n"
        "print(Leases(Path(sys.argv[1])).claim('run'), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "l"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    ours = Leases(tmp_path / "l")
    assert not ours.claim("run")
    process.kill()
    process.wait()
    process.stdout.close()
    assert ours.claim("run")


def test_a_number_of_a_process_that_another_has_now_is_no_sign_of_life(tmp_path):
    ours = Leases(tmp_path / "l")
    ours.claim("run")
    path = ours.held["run"]
    holder = json.loads(path.read_text())
    if "machine" not in holder:
        pytest.skip("this system does not say when a process began")
    path.write_text(json.dumps(holder | {"started": "1"}))
    assert Leases(tmp_path / "l").claim("run")


def test_a_disk_without_hard_links_is_named_and_works(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    a, b = Leases(tmp_path / "l"), Leases(tmp_path / "l")
    with pytest.warns(UserWarning, match="has no hard links"):
        assert a.claim("run")
    assert not b.claim("run")


def test_a_lease_that_was_cut_short_is_dead_unless_it_changes(tmp_path, clock):
    (tmp_path / "l" / "run").mkdir(parents=True)
    (tmp_path / "l" / "run" / "1").write_text('{"tok')
    leases = Leases(tmp_path / "l")
    assert not leases.claim("run")
    clock[0] += leases.expiry + 1
    assert leases.claim("run")


def compete(path: Path, count: int, seed: int) -> None:
    """Do every piece of work that nobody holds: create its file, after a pause. All but the first may be killed."""
    leases, draw = Leases(path / "l"), random.Random(seed)
    left = [str(i) for i in range(count)]
    while left:
        name = draw.choice(left)
        if (path / name).exists():
            left.remove(name)
        elif leases.claim(name):
            if not (path / name).exists():
                time.sleep(draw.random() * 0.01)
                if seed and draw.random() < 0.1:
                    os.kill(os.getpid(), signal.SIGKILL)
                (path / name).touch(exist_ok=False)  # an error if it is done twice
                if seed and draw.random() < 0.1:
                    os.kill(os.getpid(), signal.SIGKILL)
            leases.release(name, done=True)


def test_eight_workers_killed_at_random_do_all_work_and_none_twice(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = [context.Process(target=compete, args=(tmp_path, 60, seed)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    codes = [worker.exitcode for worker in workers]
    assert set(codes) == {0, -signal.SIGKILL}
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == sorted(map(str, range(60)))


TINY = {
    "name": "shared",
    "seeds": 7,
    "baseline": "mean",
    "base": {
        "data": {"validation": 1, "test": 1},
        "model": {"hidden": 3},
        "training": {"steps": 40, "batch": 4, "log_every": 10, "validate_every": 20, "checkpoint_every": 5},
        "device": {"accelerator": "cpu"},
    },
    "variants": {
        "CH": {"system": {"name": "cahn-hilliard", "trajectories": 4, "steps": 6}, "model.name": "hnn"},
        "mean": {"loss.name": "mse"},
    },
    "grids": {"all": {"axes": [["CH"], ["mean"]], "show": ["table"]}},
}


@pytest.mark.slow
def test_four_commands_on_one_folder_killed_at_random_finish_it_together(tmp_path):
    """Every run is trained to its end once: a finished folder is never written again."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(TINY))
    out, draw = tmp_path / "out", random.Random(0)
    words = [sys.executable, "-m", "squall.cli", "study", "run", str(tmp_path / "study.yaml"), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen:
        options = {"start_new_session": True, "env": environment, "stdout": subprocess.DEVNULL}
        return subprocess.Popen([*words, "--workers", "1"], stderr=subprocess.PIPE, text=True, **options)

    commands = [start() for _ in range(4)]
    finished: dict[Path, int] = {}
    folder = StudyFolder(out)
    for begun in (1, 4):  # of seven runs
        deadline = time.monotonic() + 600
        while len(list(out.glob("runs/*/metrics.jsonl"))) < begun and time.monotonic() < deadline:
            time.sleep(0.01)
        victim = commands.pop(draw.randrange(len(commands)))
        os.killpg(victim.pid, signal.SIGKILL)
        victim.communicate()
        for path in out.glob("runs/*/trial.json"):
            finished.setdefault(path, path.stat().st_mtime_ns)
    for command in commands:
        _, errors = command.communicate(timeout=600)
        assert command.returncode == 0, errors
    study = read_study(tmp_path / "study.yaml")
    assert {folder.state(trial) for trial in study.trials} == {"done"}
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    for trial in study.trials:
        lines = folder.run(trial).read_metrics()
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == list(range(10, 41, 10)), trial.name
    assert not list((out / ".leases").iterdir())
