"""Two and three gloo processes, in the environment that torchrun gives them, against one."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import distributed

from squall.cli import main
from squall.runs import ranks
from squall.runs.config import DeviceConfig, from_dict
from squall.runs.folder import RunFolder
from squall.runs.train import run
from squall.training import sharded
from squall.training.state import one_process

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["squall.cli.execute", "squall.cli.train", "lightning_fabric", "torch.distributed", "torch._dynamo"]
)

EVERYTHING = ["--training.input_noise", "0.01", "--training.clip", "1", "--training.average", "0.9"]
EVERYTHING += ["--training.accumulate", "2", "--training.unroll", "2"]

SHARDED = ["--device.strategy", "fsdp"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ch.hdf5"
    sizes = ["--trajectories", "6", "--steps", "30", "--points", "12"]
    assert main(["simulate", "cahn-hilliard", "--out", str(path), *sizes]) == 0
    return path


def train(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    split = ["--data.path", str(data), "--data.validation", "1", "--data.test", "2"]
    sizes = ["--model.hidden", "8", "--training.batch", "11", "--device.accelerator", "cpu", "--device.threads", "1"]
    every = ["--training.log_every", "10", "--training.validate_every", "25", "--training.checkpoint_every", "10"]
    return ["train", *split, *sizes, *every, "--training.steps", str(steps), "--out", str(out), *more]


def _rank(environment: dict[str, str], words: list[str], said: Path, dies_at: int) -> None:
    os.environ.update(environment)
    sharded.UNIT = 100  # so that a small model has several parts
    if dies_at:
        from squall.training.state import Training

        def dying(self: Training, metrics: dict[str, float], log=Training.log) -> None:
            if self.step >= dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            log(self, metrics)

        Training.log = dying
    with said.open("w") as file, redirect_stderr(file), redirect_stdout(file):
        sys.exit(main(words))


def together(tmp_path: Path, *ranks: list[str], dies_at: int = 0) -> tuple[list[int], list[str]]:
    """The exit codes and the output of one process for each list of words; the last one may die."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = str(len(ranks))
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = [tmp_path / f"rank-{rank}.txt" for rank in range(len(ranks))]
    processes = []
    for rank, words in enumerate(ranks):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        last = rank == len(ranks) - 1
        processes.append(FORKS.Process(target=_rank, args=(environment, words, said[rank], dies_at if last else 0)))
        processes[-1].start()
    for process in processes:
        process.join(300)
    stuck = [process for process in processes if process.exitcode is None]
    for process in stuck:
        process.kill()
    text = [path.read_text() for path in said]
    assert not stuck, text
    return [process.exitcode for process in processes], text


def lines(out: Path) -> list[dict[str, float]]:
    """The lines of metrics, without the time."""
    flat = []
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        line |= {f"validation/{name}": x for name, x in line.pop("validation", {}).items()}
        flat.append({name: x for name, x in line.items() if name != "seconds" and x is not None})
    return flat


def assert_equal(out: Path, expected: Path) -> None:
    """Weights, log lines and the best checkpoint of two runs to 1e-6."""
    for kind in ("last", "best"):
        ours, theirs = RunFolder(out).load(kind), RunFolder(expected).load(kind)
        assert ours.step == theirs.step
        a, b = (torch.cat([x.flatten() for _, x in sorted(side.weights.items())]) for side in (ours, theirs))
        assert (a - b).norm() <= 1e-6 * b.norm()
    for ours, theirs in zip(lines(out), lines(expected), strict=True):
        assert ours.pop("gradient_noise", 0) == pytest.approx(theirs.pop("gradient_noise", 0), abs=1e-6)  # a difference
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(train(data, out, 100)) == 0
    return out


def test_processes_train_what_one_trains_and_one_writes(data, alone, tmp_path):
    out = tmp_path / "two"
    codes, said = together(tmp_path, *[train(data, out, 100)] * 2)  # 6 and 5 transitions of a minibatch of 11
    assert codes == [0, 0]
    assert str(out) in said[0]
    assert not said[1]
    assert_equal(out, alone)
    assert json.loads((out / "environment.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    "option",
    [["--loss.name", "mse"], ["--model.name", "unet", "--model.arguments", "{width: 4, levels: 1}", *SHARDED]],
)
def test_all_options_of_a_training_are_those_of_one_process(data, tmp_path, option):
    def words(out: str) -> list[str]:
        return train(data, tmp_path / out, 30, "--device.precision", "64-true", *EVERYTHING, *option)

    assert main(words("one")) == 0
    assert together(tmp_path, *[words("three")] * 3)[0] == [0, 0, 0]
    assert_equal(tmp_path / "three", tmp_path / "one")


@pytest.mark.parametrize("strategy", [[], SHARDED])
def test_when_a_process_dies_all_stop_and_the_run_goes_on_with_another_number_of_them(data, alone, tmp_path, strategy):
    out = tmp_path / "killed"
    codes, said = together(tmp_path, *[train(data, out, 100, *strategy)] * 3, dies_at=50)
    assert codes == [2, 2, -signal.SIGKILL]
    assert "another process of this training ended" in said[0]
    assert "Traceback" not in "".join(said)
    assert 40 <= RunFolder(out).checkpoint_steps("last")[0] <= 50
    shutil.copytree(out, tmp_path / "one")
    assert together(tmp_path, *[train(data, out, 100, *strategy)] * 2)[0] == [0, 0]
    assert_equal(out, alone)
    segments = json.loads((out / "environment.json").read_text())["segments"]
    assert [segment["processes"] for segment in segments] == [3]
    with pytest.warns(UserWarning, match="processes: 3 -> 1"):
        run(from_dict(RunFolder(alone).read_config()), tmp_path / "one")
    assert_equal(tmp_path / "one", alone)


def test_processes_that_were_started_for_different_things_refuse(data, tmp_path):
    out = tmp_path / "run"
    same, other = train(data, out, 10), train(data, out, 10, "--training.seed", "3")
    codes, said = together(tmp_path, same, other)
    assert codes == [2, 2]
    assert "process 1 of 2 was started for something else" in said[0]
    assert "training.seed: 0 -> 3" in said[0]
    assert not said[1]  # the first has said it
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes(data.read_bytes() + b"more")
    codes, said = together(tmp_path, same, train(copy, out, 10))
    assert codes == [2, 2]
    assert "file.sha256" in said[0]
    codes, said = together(tmp_path, same, same, train(tmp_path / "nowhere.hdf5", out, 10))
    assert codes == [2, 2, 2]
    assert "process 2 of 3: " in said[0]
    assert "there is no such file" in said[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--loss.name", "top_k"], "TopK sees the part of the minibatch"),
        (["--loss.differentiate_weights", "true"], "differentiate_weights needs the whole minibatch"),
        (["--training.accumulate", "6"], "each takes at least 12"),
        (["--device.devices", "3"], "torchrun started 2 process(es)"),
    ],
)
def test_what_several_processes_cannot_do_as_one_is_refused(data, tmp_path, option, message):
    codes, said = together(tmp_path, *[train(data, tmp_path / "run", 10, *option)] * 2)
    assert codes == [2, 2]
    assert message in said[0]
    assert not said[1]
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_in_one_process_ends_in_all(data, tmp_path):
    words = train(data, tmp_path / "run", 10, "--training.learning_rate", "1e30")
    codes, said = together(tmp_path, words, words)
    assert codes == [2, 2]
    assert all("training diverged at step 2" in text for text in said)


def test_one_process_is_one_process_within_a_job_of_slurm_too(tmp_path, monkeypatch):
    (tmp_path / "srun").touch(mode=0o755)  # Fabric warns where it finds it, which a test takes for an error
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    settings = from_dict({"data": {"path": "data.hdf5"}, "device": {"accelerator": "cpu"}})
    assert ranks.joined(settings.device, []).world_size == one_process().world_size == 1
    for name, value in {"NTASKS": "4", "NTASKS_PER_NODE": "4", "JOB_NAME": "train", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert ranks.joined(settings.device, []).world_size == one_process().world_size == 1


def test_the_threads_of_the_group_end_before_python(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr(ranks.atexit, "register", at_exit.append)
    ranks.joined(DeviceConfig(accelerator="cpu"), [])
    (leave,) = at_exit
    leave()  # where no group was started
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    leave()
    assert not distributed.is_initialized()


def test_torchrun_starts_the_processes_as_the_page_says(data, alone, tmp_path):
    out, page = tmp_path / "run", Path(__file__).parents[2] / "docs" / "scale_out.md"
    command = next(line for line in page.read_text().splitlines() if line.startswith("torchrun "))
    launcher = command.split(" train ")[0].replace("--nproc-per-node 4", "--standalone --nproc-per-node 2")
    command = [sys.executable, "-m", "torch.distributed.run", *launcher.split()[1:], *train(data, out, 100)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(out)]
    assert_equal(out, alone)


@pytest.mark.slow
def test_fabric_starts_the_processes_by_its_command_and_by_device_devices(data, alone, tmp_path):
    out, squall = tmp_path / "run", Path(ranks.__file__).parents[1] / "__main__.py"
    fabric = ["-m", "lightning_fabric.cli", "--accelerator", "cpu", "--devices", "2"]
    for launcher, steps, more in ((fabric, 50, []), ([], 100, ["--device.devices", "2"])):
        command = [sys.executable, *launcher, str(squall), *train(data, out, steps, *more)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    assert_equal(out, alone)
