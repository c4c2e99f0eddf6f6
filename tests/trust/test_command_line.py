"""No traceback and no hang from the command line; no value dropped in silence."""

import gc
import os
import re
import shlex
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from processes import run_program

import squall.data
from squall._process.startup import imports_uncollected
from squall.cli import main
from squall.cli.study import parser as study_parser
from squall.runs.config import ConfigError, from_dict


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    states = np.random.default_rng(0).normal(size=(6, 11, 1, 16))
    return squall.data.write(tmp_path_factory.mktemp("data") / "u.hdf5", states, dt=0.1)


def config_of(tmp_path, data) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"data: {{path: {data}, validation: 1, test: 1}}\nmodel: {{hidden: 4}}\n"
        "training: {steps: 4, batch: 8}\ndevice: {accelerator: cpu}\n"
    )
    return path


@pytest.mark.parametrize("order", [("file", "group", "key"), ("key", "group", "file"), ("key=", "file=", "group")])
def test_the_more_specific_value_wins_wherever_it_stands(tmp_path, data, order):
    path = config_of(tmp_path, data)
    parts = {
        "file": ["--config", str(path)],
        "file=": [f"--config={path}"],
        "group": ["--training", '{"steps": 3, "batch": 8, "seed": 5}'],
        "key": ["--training.steps", "2"],
        "key=": ["--training.steps=2"],
    }
    words = [word for name in order for word in parts[name]]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "steps: 2\n" in text
    assert "seed: 5\n" in text
    assert "hidden: 4\n" in text


def test_an_option_that_is_given_twice_is_said(tmp_path, data, capsys):
    words = ["--training.steps", "3", "--training.steps=2", "--out", str(tmp_path / "run")]
    assert main(["train", "--config", str(config_of(tmp_path, data)), *words]) == 0
    assert "--training.steps is given 2 times: the last one counts" in capsys.readouterr().err


def test_a_key_twice_in_a_value_of_the_command_line_is_refused(tmp_path, data, capsys):
    words = ["--model.arguments", "{a: 1, a: 2}", "--out", str(tmp_path / "run")]
    assert main(["train", "--config", str(config_of(tmp_path, data)), *words]) == 2
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "a pipe as data": ("train", "--data.path", "pipe"),
    "a folder as data": ("train", "--data.path", "folder"),
    "a device as data": ("train", "--data.path", "/dev/zero"),
    "a loop of links as data": ("train", "--data.path", "loop"),
    "a NUL in a path": ("train", "--data.path", "a\0b"),
    "a very long path": ("train", "--data.path", "x" * 5000),
    "a pipe as initial states": ("simulate", "cahn-hilliard", "--points", "8", "--initial", "pipe", "--out", "o.hdf5"),
    "several arrays": ("simulate", "cahn-hilliard", "--points", "8", "--initial", "a.npz", "--out", "o.hdf5"),
    "an array of objects": ("simulate", "cahn-hilliard", "--points", "8", "--initial", "o.npy", "--out", "o.hdf5"),
    "more points than there is memory": ("simulate", "cahn-hilliard", "--points", "1" + 15 * "0", "--out", "o.hdf5"),
    "more steps than numbers": ("simulate", "cahn-hilliard", "--steps", "1" + 30 * "0", "--out", "o.hdf5"),
    "no width": ("simulate", "cahn-hilliard", "--points", "8", "--width", "1e-300", "--out", "o.hdf5"),
    "a relative import": ("train", "--data.path", "{data}", "--model.name", "..x"),
    "a function as model": ("train", "--data.path", "{data}", "--model.name", "sys.exit"),
    "a class that is no module as model": ("train", "--data.path", "{data}", "--model.name", "pathlib.Path"),
    "a model larger than the memory": ("train", "--data.path", "{data}", "--model.hidden", "1" + 12 * "0"),
    "a model larger than numbers": ("train", "--data.path", "{data}", "--model.hidden", "1" + 30 * "0"),
    "a batch larger than numbers": ("train", "--data.path", "{data}", "--training.batch", "1" + 30 * "0"),
    "a pipe as run folder": ("evaluate", "pipe"),
    "a file as run folder": ("compare", "a.npz"),
    "a pipe as study": ("study", "run", "pipe"),
    "a folder as study": ("study", "run", "folder"),
    "a pipe as study folder": ("study", "status", "pipe"),
}


@pytest.mark.parametrize("words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_by_a_sentence_in_time(tmp_path, data, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    np.savez("a.npz", x=np.zeros((2, 8)))
    np.save("o.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    began = time.process_time()
    small = ["--data.validation", "1", "--data.test", "1"] if words[0] == "train" else []
    batch = ["--training.batch", "8"] if words[0] == "train" and "--training.batch" not in words else []
    assert main([*(word.replace("{data}", str(data)) for word in words), *small, *batch]) == 2
    error = capsys.readouterr().err
    assert "squall: " in error
    assert "Traceback" not in error
    assert "allow_pickle" not in error
    assert time.process_time() - began < 10
    assert before == {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_bug_of_ours_keeps_its_traceback_and_says_where_to_report_it(monkeypatch):
    monkeypatch.setattr("squall.cli.evaluate.run", Mock(side_effect=KeyError("a bug")))
    with pytest.raises(KeyError) as caught:
        main(["evaluate", "x"])
    assert "Please report" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "line",
    [
        "train --training.steps 1:30",
        "train --training.learning_rate=1:30",
        "train --loss.temperature 1:30",
        "train --training '{steps: 1:30}'",
        "train --config c.yaml",
        "train --training group.yaml",
        "train --training=group.yaml",
        "simulate cahn-hilliard --out x --width 1:30",
        "data describe x --lengths 2 1:30",
        "evaluate x --events '{u: 1:30}'",
    ],
)
def test_a_number_of_base_60_is_refused_and_not_another_number(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("training: {batch: 1:30}\n")
    Path("group.yaml").write_text("batch: 1:30\n")
    assert main(shlex.split(line)) == 2
    assert "is '1:30', but must be a number" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", "group.yaml"}


def test_text_with_a_colon_stays_as_it_is():
    for text in ("1:30", "1:30.5", "+1:30:00"):
        with pytest.raises(ConfigError, match=f"is '{re.escape(text)}', but must be a number"):
            from_dict({"training": {"steps": text}})
        assert from_dict({"data": {"path": text}}).data.path == text
    arguments = study_parser().parse_args(["run", "smoke", "--part", "1:30", "--resources", "{time: 1:30}"])
    assert (arguments.run.part, arguments.run.resources) == ("1:30", {"time": "1:30"})


@pytest.mark.parametrize("module", ["torch._C", "jsonargparse"])
def test_an_interrupt_while_the_command_is_loaded_leaves_no_traceback(module):
    ended = run_program(INTERRUPTED, module, modules=())
    assert (ended.returncode, ended.stderr) == (130, "squall: interrupted\n")


INTERRUPTED = """
import os, runpy, signal, sys

_, module = sys.argv
sys.argv[:] = ["squall", "train", "--help"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Interrupts:
    def find_spec(self, name, *place):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
runpy.run_module("squall.cli", run_name="__main__", alter_sys=False)
"""


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    with imports_uncollected():
        assert gc.isenabled()  # PyTorch is there
    monkeypatch.delitem(sys.modules, "torch")
    with imports_uncollected():
        assert not gc.isenabled()
    gc.unfreeze()
    assert gc.isenabled()
