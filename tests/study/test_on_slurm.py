"""Jobs of a batch system: their script, and what they do when their time is over."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from squall.cli import main
from squall.study.on_slurm import StudyJob

submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install 'squall[slurm]'")

STUDY = {
    "name": "queued",
    "seeds": 1,
    "base": {
        "data": {"validation": 1, "test": 2},
        "model": {"hidden": 3},
        "training": {"steps": 1500, "batch": 8, "log_every": 50, "validate_every": 500, "checkpoint_every": 100},
        "device": {"accelerator": "cpu"},
    },
    "variants": {"CH": {"system": {"name": "cahn-hilliard", "trajectories": 6, "steps": 10}, "model.name": "node"}},
    "grids": {"all": {"axes": [["CH"]], "show": ["table"]}},
}


@pytest.fixture
def words(tmp_path) -> list[str]:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return ["study", "run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]


def test_the_job_script_is_shown_and_nothing_is_written(tmp_path, words, capsys):
    options = ["--on", "slurm", "--jobs", "4", "--workers", "8", "--resources", "{time: 240, partition: long}"]
    assert main([*words, *options, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for line in ("array=0-3%4", "cpus-per-task=8", "time=240", "partition=long", "signal=USR2@90", "job-name=queued"):
        assert f"#SBATCH --{line}\n" in printed
    assert f"squall {' '.join(words)} --workers 8 --together 1 --part 1/1\n" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "slurm"], "Could not detect .srun"),
        (["--on", "slurm", "--dry-run", "--resources", "{tme: 3}"], r"Unavailable parameter\(s\): \['tme'\]"),
        (["--on", "slurm", "--jobs", "0"], "--jobs is 0, but must be at least 1"),
        (["--on", "slurm", "--dry-run", "--grids", "none"], "none"),
        (["--dry-run"], "--dry-run is for --on slurm"),
        (["--address", "a:1"], "--address is for --on ray"),
    ],
)
def test_jobs_that_cannot_be_submitted_are_refused(tmp_path, words, capsys, monkeypatch, options, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*words, *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process of the job in /proc")
def test_a_job_whose_time_is_over_saves_at_its_step_and_is_queued_again(tmp_path, words, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=4)
    job = executor.submit(StudyJob([*words, "--workers", "1"]))
    deadline = time.monotonic() + 600
    while not list(out.glob("runs/*/checkpoints/last-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    controller = job._process.pid
    (task,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)
    saved: set[str] = set()
    while not job.done() and time.monotonic() < deadline:
        saved |= {path.name for path in out.glob("runs/*/checkpoints/last-*")}
        time.sleep(0.02)
    job.result()
    assert "Requeued" in job.stderr() + job.stdout()
    assert any(int(name[5:]) % 100 for name in saved), "saved between two checkpoints"
    (metrics,) = out.glob("runs/*/metrics.jsonl")
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(50, 1501, 50))
    assert list(out.glob("runs/*/trial.json"))
