"""Runs that go on: with more steps, from the weights of another run, elsewhere than before."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import squall
from squall.cli import main
from squall.runs.folder import RunFolder, RunFolderError, fingerprint

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ch.hdf5"
    system = squall.CahnHilliard(points=12)
    states = system.simulate(system.initial_states(6, torch.Generator().manual_seed(0)), 20)
    squall.data.write(path, states, dt=system.dt, lengths=system.width)
    return path


def train(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    split = ["--data.validation", "1", "--data.test", "2", "--device.threads", "1"]
    small = ["--model.hidden", "6", "--training.batch", "8", f"--training.steps={steps}"]
    every = [f"--training.{name}_every=5" for name in ("validate", "log", "checkpoint")]
    return ["train", "--data.path", str(data), *split, *small, *every, "--out", str(out), *more]


def weights(run: Path, kind: str = "last") -> dict[str, torch.Tensor]:
    path = sorted((run / "checkpoints").glob(f"{kind}-*"))[-1] / "weights.safetensors"
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(run: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def environment(run: Path) -> dict:
    return json.loads((run / "environment.json").read_text())


@pytest.fixture(scope="module")
def short(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "short"
    assert main(train(data, run, 10)) == 0
    return run


def test_a_run_with_more_steps_goes_on_to_the_bits_of_one_trained_in_one_go(data, short, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    assert main(train(data, tmp_path / "whole", 20)) == 0
    assert main(train(data, run, 20)) == 0
    for kind in ("last", "best"):
        assert same(weights(run, kind), weights(tmp_path / "whole", kind))
    assert lines(run) == lines(tmp_path / "whole")
    assert RunFolder(run).read_config()["training"]["steps"] == 20
    (segment,) = environment(run)["segments"]
    assert (segment["steps"], segment["until"]) == (10, 10)
    assert segment["versions"] == environment(short)["versions"]
    assert main(["evaluate", str(run)]) == 0


def test_fewer_steps_or_another_change_beside_are_refused(data, short, capsys):
    before = {path: path.read_bytes() for path in short.glob("*.*")}
    assert main(train(data, short, 5)) == 2
    assert "training.steps: 10 -> 5" in capsys.readouterr().err
    assert main(train(data, short, 20, "--training.seed", "1")) == 2
    error = capsys.readouterr().err
    assert "training.seed: 0 -> 1" in error
    assert "training.steps" not in error
    assert before == {path: path.read_bytes() for path in before}


def test_a_kill_between_the_two_files_of_a_run_that_goes_on(data, short, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(short, run)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", killed)
        assert main(train(data, run, 20)) == 130
    assert RunFolder(run).read_config()["training"]["steps"] == 10  # of the earlier segment, and no edit
    assert main(train(data, run, 20)) == 0
    assert RunFolder(run).read_config()["training"]["steps"] == 20
    assert len(environment(run)["segments"]) == 1


def test_a_run_that_goes_on_elsewhere_says_so_and_records_it(data, short, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    assert main(train(data, run, 10)) == 0  # finished: nothing to say
    assert environment(run) == environment(short)
    capsys.readouterr()
    assert main(train(data, run, 15)) == 0
    here = environment(short)["cpu"]
    assert f"may round otherwise: cpu: {here} -> OTHER" in " ".join(capsys.readouterr().err.split())
    assert environment(run)["cpu"] == "OTHER"
    assert environment(run)["segments"][0]["cpu"] == here


def test_a_run_starts_from_the_weights_of_another(data, short, tmp_path, monkeypatch, capsys):
    run, words = tmp_path / "run", ["--init", str(short), "--training.learning_rate", "1e-12"]
    assert main(train(data, run, 5, *words)) == 0
    there = weights(short, "best")
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, there[name], rtol=0, atol=1e-10)
    record = environment(run)["init"]
    path = short / "checkpoints" / f"best-{record['step']:08d}" / "weights.safetensors"
    assert record["run"] == str(short.resolve())
    assert (record["checkpoint"], record["sha256"]) == ("best", hashlib.sha256(path.read_bytes()).hexdigest())
    assert main(train(data, run, 10, *words)) == 0  # goes on, and keeps what it started from
    assert environment(run)["init"] == record
    capsys.readouterr()
    assert main(train(data, run, 15, *words[2:])) == 2
    assert "started from" in capsys.readouterr().err
    assert main(train(data, short, 15, "--init", str(run))) == 2
    assert "started from new weights" in " ".join(capsys.readouterr().err.split())


def test_weights_that_do_not_fit_and_runs_that_are_none_are_refused(data, short, tmp_path, capsys):
    assert main(train(data, tmp_path / "run", 5, "--init", str(short), "--model.hidden", "7")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "do not fit the model" in error
    assert "settings under 'model'" in error
    assert main(train(data, tmp_path / "run", 5, "--init", str(tmp_path / "none"))) == 2
    assert "is not a run folder" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_start_whose_weights_changed_before_the_first_checkpoint_is_refused(data, short, tmp_path, capsys):
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(short, other)
    assert main(train(data, run, 5, "--init", str(other))) == 0
    shutil.rmtree(run / "checkpoints")  # as after a kill before the first one
    assert main(train(data, run, 5, "--init", str(other))) == 0
    shutil.rmtree(run / "checkpoints")
    assert main(train(data, other, 15)) == 0
    for path in (other / "checkpoints").glob("best-*"):
        shutil.rmtree(path)
    capsys.readouterr()
    assert main(train(data, run, 5, "--init", str(other))) == 2
    assert "has other weights than when" in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_data_has_one_checksum_of_all_its_files(tmp_path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "a").write_bytes(b"12")
    (folder / "b" / "c").write_bytes(b"3")
    first = fingerprint(folder)
    assert (first["files"], first["bytes"]) == (2, 3)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    (folder / "b" / "c").write_bytes(b"4")
    assert fingerprint(folder) != first
    (tmp_path / "copy" / "b" / "c").rename(tmp_path / "copy" / "b" / "d")
    assert fingerprint(tmp_path / "copy") != first


def test_a_run_is_bound_to_the_folder_of_data_that_it_was_trained_on(data, tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    shutil.copy(data, files / "a.hdf5")
    assert main(train(files, tmp_path / "run", 5)) == 0
    assert main(train(files, tmp_path / "run", 10)) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    shutil.copy(data, files / "b.hdf5")
    with pytest.raises(RunFolderError, match="is not the file"):
        _ = squall.open_run(tmp_path / "run").experiment


def test_a_run_whose_learning_rate_falls_to_its_end_is_not_continued(data, tmp_path, capsys):
    run, schedule = tmp_path / "run", ("--training.schedule", "cosine")
    assert main(train(data, run, 5, *schedule)) == 0
    assert main(train(data, run, 10, *schedule)) == 2
    assert "more steps would be another run" in " ".join(capsys.readouterr().err.split())
