import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from processes import run_program

from squall._process.files import write_beside, writing_into
from squall.runs.folder import CheckpointError, RunFolder, RunFolderError
from squall.training.loop import Checkpoint


def checkpoint(step: int) -> Checkpoint:
    state = {"optimizer": {"state": {0: {"step": torch.tensor(step)}}}, "score": (0, 1.5), "seconds": 2.0}
    return Checkpoint(step, {"a.weight": torch.full((2, 3), float(step), dtype=torch.float64)}, state)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_a_checkpoint_comes_back_as_it_was(folder):
    folder.save("last", checkpoint(5))
    found = folder.load("last")
    assert found.step == 5
    assert torch.equal(found.weights["a.weight"], checkpoint(5).weights["a.weight"])
    assert found.state == checkpoint(5).state
    assert folder.load("best") is None


def test_the_newest_two_of_each_kind_are_kept(folder):
    for step in (1, 2, 30, 4):
        folder.save("last", checkpoint(step))
        folder.save("best", checkpoint(step + 1))
    assert folder.checkpoint_steps("last") == [30, 4]
    assert folder.checkpoint_steps("best") == [31, 5]


def test_checkpoints_that_a_killed_process_had_no_time_to_drop_are_dropped_with_the_next(folder):
    for step in (1, 2, 3):
        folder.save("last", checkpoint(step))
    path = folder.path / "checkpoints"
    shutil.copytree(path / "last-00000002", path / "last-00000001")
    folder.save("last", checkpoint(4))
    assert folder.checkpoint_steps("last") == [4, 3]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "checksums.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(folder, name, damage):
    folder.save("last", checkpoint(1))
    folder.save("last", checkpoint(2))
    path = folder.path / "checkpoints" / "last-00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"last-00000002 is damaged.*the checkpoint before it is used"):
        assert folder.load("last").step == 1


def test_no_readable_checkpoint_is_an_error_that_says_what_to_do(folder):
    folder.save("last", checkpoint(1))
    (folder.path / "checkpoints" / "last-00000001" / "state.pt").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match=r"Move .* to go on without them"),
    ):
        folder.load("last")


def test_the_best_weights_are_the_newest_that_are_asked_for_and_the_last_stand_in_for_them(folder):
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        folder.newest()
    folder.save("last", checkpoint(2))
    assert folder.newest()[0] == "last"
    folder.save("best", checkpoint(1))
    assert (folder.newest()[0], folder.newest()[1].step) == ("best", 1)
    (folder.path / "checkpoints" / "best-00000001" / "state.pt").write_bytes(b"")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert folder.newest()[1].step == 2
        with pytest.raises(CheckpointError, match=r"no 'best' checkpoint of .* can be read"):
            folder.newest(("best",))
    assert [str(x.message).endswith("the last one is used") for x in warned] == [False, True, False]


def test_metrics_are_taken_back_to_a_step(folder):
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "loss": float("nan") if step == 2 else 1.0})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # what a kill leaves
    folder.rewind_metrics(2)
    assert folder.read_metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def failing():
        with write_beside(path) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        failing()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_removes_the_folders_that_it_made_alone(tmp_path, monkeypatch):
    def write(folder, in_between):
        with writing_into(folder):
            in_between()
            raise OSError("disk full")

    def failing(folder, in_between=lambda: None):
        with pytest.raises(OSError, match=r"disk full|too long"):
            write(folder, in_between)

    failing(tmp_path / "new" / "deep")
    failing(tmp_path / "new" / ("x" * 300))
    assert list(tmp_path.iterdir()) == []
    failing(tmp_path / "new" / "deep", lambda: (tmp_path / "new" / "file").touch())
    assert [*(tmp_path / "new").iterdir()] == [tmp_path / "new" / "file"]

    theirs = tmp_path / "theirs"
    exists = Path.exists

    def made_meanwhile(path):
        there = exists(path)
        if path == theirs and not there:
            os.mkdir(path)
        return there

    monkeypatch.setattr(Path, "exists", made_meanwhile)
    failing(theirs)
    assert theirs.is_dir(), "another process made it"


def test_a_full_disk_leaves_the_checkpoint_before(folder):
    """A limit on the size of files stands for the disk, in a process of its own."""
    program = f"""
import resource, signal, torch
from squall.runs.folder import RunFolder
from squall.training.loop import Checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = RunFolder({str(folder.path)!r})
folder.save("last", Checkpoint(1, {{"w": torch.zeros(3)}}, {{}}))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    folder.save("last", Checkpoint(2, {{"w": torch.zeros(100_000)}}, {{}}))
except OSError as error:
    print("refused", error.filename or error)
"""
    result = run_program(program, modules=("squall.runs.folder",))
    assert result.returncode == 0, result.stderr
    assert "refused" in result.stdout
    assert folder.load("last").step == 1
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["last-00000001"]


def test_a_folder_has_one_writer(folder):
    with folder.locked():
        program = f"from squall.runs.folder import RunFolder\nwith RunFolder({str(folder.path)!r}).locked(): pass"
        result = run_program(program, modules=("squall.runs.folder",))
        assert "another process is writing into" in result.stderr
    with folder.locked():
        pass


def test_a_training_that_goes_on_removes_what_a_kill_left_half_written(folder):
    folder.save("last", checkpoint(1))
    (folder.path / "checkpoints" / ".last-00000002.0123456789abcdef.part").mkdir()
    (folder.path / ".metrics.jsonl.0123456789abcdef.part").write_text("half")
    folder.rewind_metrics(1)
    folder.save("last", checkpoint(2))
    assert not list(folder.path.rglob("*.part"))
    assert folder.load("last").step == 2


def test_numbers_that_json_does_not_have_become_null(folder):
    folder.write_json("a.json", {"a": [1.0, float("inf")], "b": {"c": float("nan")}})
    assert json.loads((folder.path / "a.json").read_text()) == {"a": [1.0, None], "b": {"c": None}}


def test_what_is_no_run_folder_is_said(tmp_path):
    with pytest.raises(RunFolderError, match=r"not a run folder: it has no config.yaml"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"a file of that name is in the way"):
        RunFolder(tmp_path / "file").create()
