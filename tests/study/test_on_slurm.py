"""Jobs of a batch system: their script, and what they do when their time is over."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


SLURM = """
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={name} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""One node on loopback, without munge and cgroups."""


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
        (["--on", "slurm", "--resources", "{time: 1}"], "time is 1 minutes, but must be at least 3: SLURM signals a"),
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


def test_what_slurm_refuses_is_said_in_its_words(tmp_path, words, capsys, monkeypatch):
    for name, does in {"srun": "exit", "sbatch": "echo 'sbatch: error: invalid partition: nope' >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main([*words, "--on", "slurm", "--resources", "{partition: nope}"]) == 2
    assert "SLURM takes no job: sbatch: error: invalid partition: nope. Look at" in capsys.readouterr().err


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


def slurm(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout


def wait_until(holds: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, slurm("squeue")
        time.sleep(0.1)


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Path]:
    """SLURM's own servers; the folder has their logs."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    if not (shutil.which("slurmctld") and shutil.which("slurmd")):
        pytest.skip("SLURM is not installed: apt-get install slurmctld slurmd")
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder:  # the path of a socket is short
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            ports = [server.getsockname()[1] for server in (one, other)]
        name = socket.gethostname().partition(".")[0]
        path = Path(folder, "slurm.conf")
        path.write_text(SLURM.format(name=name, ports=ports, user=getpass.getuser(), folder=folder))
        monkeypatch.setenv("SLURM_CONF", str(path))
        servers = [subprocess.Popen([name, "-D"], stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
        try:
            for _ in range(100):
                time.sleep(0.2)
                state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, timeout=30).stdout
                if state.strip() == "idle":
                    break
            else:
                pytest.skip(f"SLURM does not start here: {Path(folder, 'slurmd.log').read_text()[-200:]}")
            yield Path(folder)
            slurm("scancel", "--user", getpass.getuser())
            wait_until(lambda: not slurm("squeue", "-h"), 60)
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait(30)


@pytest.mark.slow
def test_on_a_real_cluster_jobs_share_a_study_are_queued_again_cancelled_and_resumed(
    tmp_path, words, cluster, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changed = STUDY["base"]["training"] | {"steps": 6000, "validate_every": 6000, "checkpoint_every": 6000}
    study = STUDY | {"seeds": 2, "base": STUDY["base"] | {"training": changed}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"

    def submitted(jobs: int) -> list[str]:
        assert main([*words, "--on", "slurm", "--jobs", str(jobs), "--resources", "{time: 10}"]) == 0
        return capsys.readouterr().out.splitlines()[:jobs]

    first, second = submitted(2)
    wait_until(lambda: sum(path.stat().st_size > 0 for path in out.glob("runs/*/metrics.jsonl")) == 2)
    slurm("scancel", "--signal=USR2", first)  # what SLURM sends before the time of a job is over
    slurm("scancel", second)
    wait_until(lambda: slurm("squeue", "-h", "-o", "%i %T").split() == [first, "PENDING"])
    steps = [int(path.name[5:]) for path in out.glob("runs/*/checkpoints/last-*")]
    assert len(steps) == 2
    assert all(0 < step < 6000 for step in steps)
    assert not list(out.glob("runs/*/trial.json"))
    before = {path: path.read_text() for path in out.glob("runs/*/metrics.jsonl")}

    slurm("scontrol", "update", f"JobId={first}", "StartTime=now")  # SLURM lets it wait for two minutes
    submitted(1)
    wait_until(lambda: not slurm("squeue", "-h"))
    assert len(list(out.glob("runs/*/trial.json"))) == 2
    for path in out.glob("runs/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(50, 6001, 50))
        assert path.read_text().startswith(before[path]), "resumed where it was saved"
