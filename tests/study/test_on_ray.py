"""A study on a Ray cluster that the test starts and stops."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from squall.study import runner
from squall.study.definition import read_study
from squall.study.folder import StudyFolder
from squall.study.on_ray import ClusterError, ray_workers
from squall.study.runner import run_study

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'squall[ray]'")

# Seconds on any machine, of which a test wants to see the first: files are looked at every 0.1 to 0.5 s.
STEPS = 3000

STUDY = {
    "name": "far",
    "seeds": 2,
    "base": {
        "data": {"validation": 1, "test": 2},
        "model": {"hidden": 3},
        "training": {"steps": STEPS, "batch": 8, "log_every": 10, "validate_every": 1000, "checkpoint_every": 30},
        "device": {"accelerator": "cpu"},
    },
    "variants": {"CH": {"system": {"name": "cahn-hilliard", "trajectories": 6, "steps": 10}, "model.name": "node"}},
    "grids": {"all": {"axes": [["CH"]], "show": ["table", "fields"]}},
}


def results_of(out: Path) -> dict[str, object]:
    lines = {path.parent.name: path.read_text().splitlines() for path in sorted(out.glob("runs/*/metrics.jsonl"))}
    kept = {name: [json.loads(line) | {"seconds": 0} for line in of_run] for name, of_run in lines.items()}
    return {"metrics": kept} | {p.parent.name: json.loads(p.read_text()) for p in out.glob("runs/*/evaluation.json")}


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield started
    started.shutdown()


@pytest.mark.slow
def test_a_study_on_two_nodes_of_which_one_dies_equals_the_local_one(tmp_path, cluster):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    study, out = read_study(path), tmp_path / "out"
    folder, nodes = StudyFolder(out), [cluster.add_node(num_cpus=1) for _ in range(2)]
    reached: dict[str, int] = {}
    after: dict[str, list[int]] = {trial.name: [] for trial in study.trials}

    def kill() -> None:
        while not all(folder.run(trial).checkpoint_steps("last") for trial in study.trials):
            time.sleep(0.05)
        reached.update({trial.name: folder.run(trial).checkpoint_steps("last")[-1] for trial in study.trials})
        cluster.remove_node(nodes[0], allow_graceful=False)
        while watching.is_set():
            for trial in study.trials:
                after[trial.name].append(folder.steps_done(trial))
            time.sleep(0.05)

    watching = threading.Event()
    watching.set()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()

    def on(count):
        return ray_workers(count, address=cluster.address, collect_seconds=0.2)

    try:
        assert run_study(study, out, workers=2, on=on) == []
    finally:
        watching.clear()
    killer.join()
    assert max(reached.values()) < STEPS, "nothing was left to do when the node died"
    assert all(min(steps) >= reached[name] for name, steps in after.items()), "a run began again from nothing"
    run_study(study, tmp_path / "here", workers=1)
    assert results_of(out) == results_of(tmp_path / "here")
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == sorted(
        p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*")
    )


@pytest.mark.slow
def test_a_study_that_is_stopped_saves_its_trainings_and_resumes(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(runner, "PROGRESS_SECONDS", 0.1)
    values = json.loads(json.dumps(STUDY)) | {"seeds": 1}
    values["base"]["training"]["checkpoint_every"] = 10_000
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(values))
    study = read_study(path)
    cluster.add_node(num_cpus=1)

    def on(count):
        return ray_workers(count, address=cluster.address, collect_seconds=0.2)

    def interrupt(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, out, on=on, progress=interrupt)
    (steps,) = (StudyFolder(out).run(trial).checkpoint_steps("last") for trial in study.trials)
    assert steps
    assert steps[0] < STEPS
    run_study(study, out, on=on)
    run_study(study, tmp_path / "here", workers=1)
    assert results_of(out) == results_of(tmp_path / "here")


@pytest.mark.parametrize("listening", [False, True])
def test_an_address_that_does_not_answer_is_an_error_within_seconds(tmp_path, listening):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listening:
            server.close()
        words = ["study", "run", str(path), "--out", str(tmp_path / "out"), "--on", "ray", "--address"]
        command = [sys.executable, "-m", "squall.cli", *words, f"127.0.0.1:{port}"]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=120
        )  # Ray alone would wait for minutes
    assert result.returncode == 2
    text = " ".join(result.stderr.split())
    assert f"squall: no Ray cluster that can be used answers at 127.0.0.1:{port}" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_resources_that_ray_does_not_know_are_refused():
    with pytest.raises(ClusterError, match="refuses the resources"), ray_workers(1, resources={"gpu": 1}):
        pass
