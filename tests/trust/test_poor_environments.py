"""A poor environment costs a warning, never the work."""

import ast
import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

import squall.data
from squall._process import files
from squall._process.console import results_console, with_safe_output
from squall._process.limits import too_large
from squall._process.progress import progress_bar
from squall.cli import main
from squall.runs.folder import RunFolder
from squall.study import runner


@pytest.fixture
def data(tmp_path):
    states = np.random.default_rng(0).normal(size=(6, 11, 1, 16))
    return squall.data.write(tmp_path / "u.hdf5", states, dt=0.1)


def train(data, *more: str) -> list[str]:
    words = f"train --data.path {data} --data.validation 1 --data.test 1 --model.hidden 4 --training.batch 8"
    return [*words.split(), "--training.steps", "3", "--device.accelerator", "cpu", *more]


class Broken(io.StringIO):
    """A stream whose reader is gone, or whose disk is full."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))


class Encoded(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def text(self) -> str:
        self.seek(0)
        return self.read()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-16"])
def test_every_encoding_can_print_what_squall_prints(encoding, monkeypatch):
    out = Encoded(encoding)
    monkeypatch.setattr(sys, "stdout", out)

    @with_safe_output
    def command() -> int:
        print("T ≤ 1e-3 (rate)² × β… \udcff")
        from rich.table import Table

        table = Table("KL(w ‖ u)", "ρ")
        table.add_row("1", "∞")
        results_console().print(table)
        return 0

    assert command() == 0
    text = out.text()
    assert "(rate)" in text
    if encoding == "ascii":
        assert text.isascii()
        assert "T <= 1e-3 (rate)^2 x beta... ?" in text
        assert "rho" in text


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_messages_that_cannot_be_written_do_not_stop_a_training(data, tmp_path, monkeypatch, code):
    monkeypatch.setattr(sys, "stderr", Broken(code))
    assert main(train(data, "--out", str(tmp_path / "run"))) == 0
    assert list((tmp_path / "run" / "checkpoints").glob("last-00000003"))


def test_results_that_are_lost_are_an_error_unless_their_reader_left(monkeypatch, capsys):
    @with_safe_output
    def command() -> int:
        print("results")
        return 0

    for code, expected in ((errno.EPIPE, 0), (errno.ENOSPC, 2)):
        monkeypatch.setattr(sys, "stdout", Broken(code))
        assert command() == expected
    assert "could not be printed" in capsys.readouterr().err


def test_streams_that_are_closed_or_missing_are_no_streams(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        assert with_safe_output(lambda: print("x") or 0)() == 0


def test_no_data_file_takes_the_place_of_a_closed_standard_stream(tmp_path):
    program = (
        "import os, sys\nfrom squall._process.console import with_safe_output\n"
        "run = with_safe_output(lambda: os.open(sys.argv[1], os.O_CREAT | os.O_RDWR))\n"
        "os._exit(run())"
    )
    script = f'"$0" -c "$1" {tmp_path}/file <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, sys.executable, program]).returncode > 2


@pytest.mark.parametrize("terminal", [None, "dumb"])
def test_a_log_is_told_how_far_a_training_is_in_whole_lines(terminal):
    text = io.StringIO()
    variables = {"TERM": terminal or ""}
    console = Console(file=text, width=40, force_terminal=terminal is not None, _environ=variables)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=1000, status="")
        for step in range(1, 1001):
            progress.update(task, completed=step)
            progress.update(task, status="loss 0.1 (rate)²  T 0.2 (rate)²  ESS/n 0.5")
    lines = text.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[5].startswith("training: 500 of 1000 steps")
    assert all(line.endswith("ESS/n 0.5") for line in lines[1:])


def test_a_long_step_is_told_once_a_minute(monkeypatch):
    now = iter(range(0, 10_000, 40))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    text = io.StringIO()
    with progress_bar(Console(file=text)) as progress:
        task = progress.add_task("training", total=10**6)
        for step in range(10):
            progress.update(task, completed=step)
    assert 4 <= len(text.getvalue().splitlines()) <= 6


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, code):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks"), RunFolder(tmp_path).locked():
        pass


def test_a_file_system_that_cannot_wait_for_the_disk_reserve_or_link_is_written_to(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    for name in ("fsync", "posix_fallocate", "link"):
        monkeypatch.setattr(os, name, unsupported)
    path = squall.data.write(tmp_path / "u.hdf5", np.ones((2, 3, 1, 4)), dt=0.1)
    assert squall.data.open(path).read().shape == (2, 3, 1, 4)
    with files.write_beside(tmp_path / "x") as part:
        part.write_text("1")
    assert (tmp_path / "x").read_text() == "1"


def test_a_training_outside_the_main_thread_goes_without_signals(data, tmp_path):
    codes: list[int] = []
    words = train(data, "--out", str(tmp_path / "run"))
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_cache_of_compiled_loops_that_fails_is_a_warning(monkeypatch):
    compiled = pytest.importorskip("squall._process.compiled")
    from numba.core.caching import IndexDataCacheFile

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def double(x):
        return 2 * x

    for name in ("load", "save"):
        monkeypatch.setattr(IndexDataCacheFile, name, fail)
    with pytest.warns(UserWarning, match="numba's cache"):
        assert compiled.compiled(double)(3) == 6


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OverflowError("int too large to convert to float"),
        ZeroDivisionError("float division by zero"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("Storage size calculation overflowed with sizes=[1000000000000, 1000000000000]"),
    ],
)
def test_memory_that_does_not_suffice_gets_a_sentence(monkeypatch, capsys, error):
    monkeypatch.setattr("squall.cli.evaluate.run", Mock(side_effect=error))
    assert too_large(error)
    assert main(["evaluate", "x"]) == 2
    assert "too large or too small" in capsys.readouterr().err


def test_a_working_folder_that_is_gone_is_said(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'cd {gone} && rmdir {gone} && exec "$0" --help'
    command = str(Path(sys.executable).parent / "squall")
    environment = {**os.environ, "PYTHONPATH": str(Path(squall.__file__).parents[1])}
    result = subprocess.run(["sh", "-c", script, command], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (2, "squall: the working folder is gone: change into another one\n")


def test_no_file_is_written_or_read_in_the_encoding_of_the_machine():
    """In cp1252, the default of Windows, a table with a Greek letter could not be written."""
    careless = []
    for path in Path(squall.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and ast.unparse(call.func.value) not in ("os", "archive")
            ):
                name, texts = call.func.attr, [x.value for x in call.args if isinstance(x, ast.Constant)]
                named = any(word.arg == "encoding" for word in call.keywords) or "utf-8" in texts
                binary = name == "open" and (not texts or "b" in str(texts[0]))
                if name in ("read_text", "write_text", "open") and not named and not binary:
                    careless.append(f"{path.name}:{call.lineno}")
    assert not careless


@pytest.mark.parametrize(("backend", "warned"), [("nonsense", 1), ("svg", 0)])
def test_a_wrong_backend_of_matplotlib_costs_a_warning_and_a_right_one_is_kept(backend, warned):
    program = (
        "import os, warnings, sys\n"
        "from squall._process.extras import import_matplotlib\n"
        "with warnings.catch_warnings(record=True) as caught:\n    import_matplotlib()\n"
        "import matplotlib\n"
        "print(len(caught), os.environ['MPLBACKEND'], matplotlib.rcParams['backend'] == sys.argv[1])"
    )
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "PYTHONPATH": str(Path(squall.__file__).parents[1]), "MPLBACKEND": backend}
    command = [sys.executable, "-c", program, backend]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    assert printed.split() == [str(warned), backend, str(not warned)]


def test_a_study_runs_in_its_own_process_where_no_workers_can_be_started(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a semaphore in /dev/shm

    where: list[int] = []

    def run_batch(*_: object) -> None:
        where.append(os.getpid())
        signal.raise_signal(signal.SIGTERM)  # is noticed by the worker, and raises nothing here
        raise LookupError

    monkeypatch.setattr(runner, "ProcessPoolExecutor", full)
    monkeypatch.setattr(runner, "run_batch", run_batch)
    with pytest.warns(UserWarning, match="one after another"), runner._processes(4) as workers:
        assert isinstance(workers.submit([]).exception(), LookupError)
    assert where == [os.getpid()]
    assert workers.size == 1
