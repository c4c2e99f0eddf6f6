"""Configurations are read strictly, and names stay in their folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from squall._process.documents import DocumentError, dump_yaml, load_yaml, read_json, read_yaml
from squall._process.files import HALF_WRITTEN, write_beside
from squall._process.names import file_name
from squall.cli import main
from squall.runs.config import ConfigError, from_dict
from squall.runs.folder import RunFolder, RunFolderError
from squall.study.definition import read_study

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE = {
    "a key twice": ("a: 1\nloss: {x: 1}\nloss: {y: 2}", "line 3: the key 'loss' stands twice, first in line 2"),
    "a nested key twice": ("a:\n  b: 1\n  b: 2", "line 3"),
    "itself": ("a: &a [*a]", "contains itself"),
    "deep": ("a: " + "[" * 3000, "nested deeper"),
    "deep by aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 900)), "deeper"),
    "a billion laughs": (LAUGHS, "values"),
    "many values": ("a:\n" + "- 1\n" * 25_000, "values"),
    "a date": ("x: 2001-01-01", "put it in quotes"),
    "a set": ("x: !!set {a}", "'set' is not allowed"),
    "bytes": ("x: !!binary aGVsbG8=", "'binary' is not allowed"),
    "an object": ("x: !!python/object/apply:os.system [id]", "not allowed"),
    "a list as key": ("? [1]\n: 2", "a key must be"),
    "an integer of thousands of digits": ("a: " + "9" * 5000, "4300"),
    "two documents": ("a: 1\n---\nb: 2", "not YAML"),
    "a control character": ("a: \x01", "not YAML"),
    "no YAML": ("a: {b: [", "not YAML"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_every_document_that_is_not_plain_is_refused_wherever_it_is_read(tmp_path, capsys, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(DocumentError, match=message):
        read_yaml(text)
    with pytest.raises(ConfigError):
        read_study(path)
    with pytest.raises(RunFolderError):
        RunFolder(tmp_path).read_config()
    assert main(["train", "--config", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert time.process_time() - began < 10


@pytest.mark.parametrize("read", [load_yaml, read_study, lambda path: RunFolder(path.parent).read_config()])
def test_a_pipe_or_a_device_as_configuration_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="is a named pipe, not a file"):
        read(tmp_path / "config.yaml")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert main(["train", "--loss", str(tmp_path / "config.yaml")]) == 2
    with pytest.raises(ConfigError, match="must hold keys"):
        from_dict({"loss": str(tmp_path / "config.yaml")})


def test_plain_values_come_back_as_they_were():
    values = {
        "a": "1e-3",
        "b": 1e-3,
        "c": "010",
        "d": "1:30",
        "e": "yes",
        "f": True,
        "g": None,
        "h": "null",
        "i": 1e300,
    }
    values |= {
        "i": 1e300,
        "j": float("inf"),
        "k": "2001-01-01",
        "l": [1, {"x": "~"}],
        "m": 5e-324,
        "n": "=",
        "o": -(10**20),
    }
    assert read_yaml(dump_yaml(values)) == values
    assert read_yaml("base: &b {x: 1, y: 2}\nchanged: {<<: *b, y: 3}")["changed"] == {"x": 1, "y": 3}
    assert read_yaml("{a: 1e-3, b: 1:30, c: 010}") == {"a": 1e-3, "b": "1:30", "c": "010"}


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": 1, "a": 2}', "", "{", "\x00"])
def test_json_that_cannot_be_read_is_one_kind_of_error(tmp_path, text):
    with pytest.raises(DocumentError):
        read_json(text)
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"evaluation\.json is damaged"):
        RunFolder(tmp_path).read_json("evaluation.json")


def test_json_of_another_kind_names_what_is_missing(tmp_path):
    folder = RunFolder(tmp_path)
    for text in ("[1]", "3", "null"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(RunFolderError, match="is damaged"):
            folder.read_json("x.json")
    (tmp_path / "x.json").write_text('{"checkpoints": {"best": {}}}')
    with pytest.raises(RunFolderError, match=r"x\.json is damaged: it has no 'step'"):
        folder.read_json("x.json")["checkpoints"]["best"]["step"]
    (tmp_path / "metrics.jsonl").write_text('1\n[1]\nnull\n{}\n{"step": "x"}\n{"step": 2, "loss": 1.0}\n{"st')
    assert folder.read_metrics() == [{"step": 2, "loss": 1.0}]


NULLS = {
    "loss: null": "loss is None, but must hold keys",
    "loss: [1]": "loss is [1]",
    "loss: mse": "must hold keys and values",
    "training: {steps: null}": "training.steps is null",
    "data: {path: null}": "data.path is null",
    "data: {memory_gib: .inf}": "data.memory_gib is inf",
}


@pytest.mark.parametrize(("text", "message"), NULLS.items())
def test_a_null_or_another_kind_is_refused_by_its_key(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError):
        from_dict(read_yaml(text))


NAMES = [
    "../../notes",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "C:x",
    "a\x00b",
    "con",
    "NUL.txt",
    "x" * 300,
    "é" * 200,
    ".x",
    "x.",
]


@pytest.mark.parametrize("name", [*NAMES, "\udcff", "a\nb", "\u202ea", " a", "-", "β/β"])
def test_a_name_from_data_is_one_safe_part_of_a_path(name):
    safe = file_name(name)
    assert Path(safe).name == safe
    assert 0 < len(safe.encode()) <= 120
    assert safe.isprintable()
    assert not safe.startswith(".")
    assert not set(safe) & set('<>:"/\\|?*')
    assert file_name(safe) == safe


def test_different_names_stay_different_and_plain_ones_stay_as_they_are():
    assert len({file_name(name) for name in NAMES}) == len(NAMES)
    for name in ("paper-small", "kl-0.3-seed-0", "cahn-hilliard, T = 0.1", "ρu"):
        assert file_name(name) == name


def test_a_temporary_file_is_exclusive_unguessable_and_as_the_umask_says(tmp_path):
    names = set()
    before = os.umask(0o027)
    try:
        for _ in range(3):
            with write_beside(tmp_path / "x.json") as part:
                names.add(part.name)
                assert HALF_WRITTEN.fullmatch(part.name)
                assert part.stat().st_size == 0
                part.write_text("{}")
    finally:
        os.umask(before)
    assert len(names) == 3
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_lock_of_a_strangers_folder_empties_no_file_of_mine(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("thesis")
    folder = RunFolder(tmp_path / "run")
    folder.create()
    (folder.path / ".lock").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic"), folder.locked():
        pass
    assert mine.read_text() == "thesis"


def test_a_field_name_from_a_stranger_leaves_no_figure_elsewhere(tmp_path):
    import numpy as np

    from squall.report import write_figures

    rollouts = {"truth": np.ones((1, 3, 2, 4)), "prediction": np.ones((1, 3, 2, 4))}
    folder = RunFolder(tmp_path / "a" / "b" / "run")
    folder.create()
    folder.write_arrays("rollouts.npz", **rollouts, time=np.arange(3.0), axis_0=np.arange(4.0))
    curves = {"time": [0, 1, 2], "states": [1, 1, 1]}
    checkpoint = {"step": 1, "curves": curves, "baselines": {}}
    folder.write_json("evaluation.json", {"fields": ["../../../out", "v" * 400], "checkpoints": {"last": checkpoint}})
    paths = write_figures(folder.path)
    assert {path.parent for path in paths} == {folder.path / "figures"}
    assert {path.name for path in tmp_path.rglob("*.png")} == {path.name for path in paths}
    assert json.loads((folder.path / "evaluation.json").read_text())["fields"][0] == "../../../out"


def leave_half(folder: Path) -> list[str]:
    """What killed writers of this version leave: files, an animation, a folder."""
    names = [".e.json.0123456789abcdef.part", ".p.gif.0123456789abcdef.part.gif", ".model.0123456789abcdef.part"]
    for name in names[:2]:
        (folder / name).write_text("half")
    (folder / names[2]).mkdir()
    (folder / names[2] / "README.md").write_text("half")
    return names


def test_the_next_writer_into_a_folder_removes_what_a_killed_one_left(tmp_path):
    leave_half(tmp_path)
    mine = [".mine.4711.part", "x.0123456789abcdef.part", ".0123456789abcdef.part", "forecast.part.nc"]
    for name in mine:
        (tmp_path / name).write_text("kept")
    with write_beside(tmp_path / "x.json") as part:
        part.write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "x.json"])


def test_what_a_living_process_writes_is_not_removed(tmp_path):
    program = (
        "import sys, pathlib; from squall._process.files import write_beside\n"
        "with write_beside(pathlib.Path(sys.argv[1])) as part:\n"
        "    part.write_text('whole'); print('ready', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "theirs.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        left = leave_half(tmp_path)
        with write_beside(tmp_path / "ours.json") as part:
            part.write_text("{}")
        other.communicate("")
    assert (tmp_path / "theirs.json").read_text() == "whole"
    assert all((tmp_path / name).exists() for name in left)  # they could be those of the other writer
    with write_beside(tmp_path / "ours.json") as part:
        part.write_text("[]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.json", "theirs.json"]
